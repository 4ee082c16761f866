"""The sections of a recipe, each read by the service that it is of."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from services import prompts
from services.algorithms import Objective
from services.contract import Sampling
from services.section import Section

PathLike = TypeVar("PathLike", Path, str)
Beta = Annotated[float, Field(ge=0, lt=1)]


def of_scheme(url: str, *schemes: str) -> str:
    try:
        parts = urlsplit(url)
    except ValueError:  # its words quote the password
        raise ValueError("not a URL; percent-encode what is special in the password") from None
    if parts.scheme not in schemes or not (parts.netloc or parts.path):
        raise ValueError(f"not a URL that starts with {' or '.join(f'{scheme}://' for scheme in schemes)}")
    return url


ServerUrl = Annotated[str, AfterValidator(lambda url: of_scheme(url, "http", "https"))]
REDIS_SCHEMES = ("redis", "rediss", "unix")
RedisUrl = Annotated[str, AfterValidator(lambda url: of_scheme(url, *REDIS_SCHEMES))]


def _plain(path: PathLike) -> PathLike:
    bad = next((mark for mark in str(path) if mark in "\"'\\" or not mark.isprintable()), None)
    if bad is not None:
        raise ValueError(f"{bad!r} cannot be in a path here: it would end a line or a quotation elsewhere")
    return path


PlainPath = Annotated[Path, AfterValidator(_plain)]
"""Ends up in shell scripts and in redis.conf."""
PlainName = Annotated[str, AfterValidator(_plain)]


def _place(given: Any) -> Any:
    """A folder, or a bucket's URL."""
    if not isinstance(given, str) or "://" not in given:
        return _plain(Path(given)) if isinstance(given, str | Path) else given
    if "@" in given:
        raise ValueError("a bucket's keys are taken from the environment (AWS_ACCESS_KEY_ID), not from its URL")
    if not re.fullmatch(r"s3://[A-Za-z0-9][A-Za-z0-9.-]+(/[\w.=-]+)*/?", given, re.ASCII):
        raise ValueError("not the URL of a bucket; write it as s3://bucket or s3://bucket/prefix")
    return given.rstrip("/")


PlaceOfWeights = Annotated[Path | str, BeforeValidator(_place)]


class Run(Section):
    """`deterministic`: groups are sampled by seeds of their own ids, in batches that do not depend on timing."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    dir: PlainPath
    seed: int = Field(0, ge=0, lt=2**31)
    deterministic: bool = False


class Lora(Section):
    """Low-rank adapters of `rank` on the layers that `targets` name; their product counts `alpha` / `rank` times."""

    rank: int = Field(16, ge=1, le=1024)
    alpha: int = Field(32, ge=1)
    targets: list[str] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], min_length=1
    )


class Model(Section):
    """A Hugging Face name or a local folder. With `lora` only adapters are trained (none: all weights)."""

    path: PlainName
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    trust_remote_code: bool = False
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    lora: Lora | None = None


class Fields(Section):
    """Columns of the data set. One of `prompt` (text) and `messages` (a list of role/content). `source` names the
    column of a row's data set, where a file holds several.

    `reference` names the columns of what else the rewards read there, e.g. `{choices: options}`, or for IFEval
    `{instruction_id_list: instruction_id_list, kwargs: kwargs}`.
    """

    prompt: str | None = None
    messages: str | None = None
    answer: str | None = None
    tests: str | None = None
    id: str | None = None
    source: str | None = None
    reference: dict[str, str] = Field(default_factory=dict)

    @field_validator("reference")
    @classmethod
    def has_no_names_of_its_own(cls, reference: dict[str, str]) -> dict[str, str]:
        taken = sorted({"answer", "tests"} & set(reference))
        if taken:
            raise ValueError(f"{taken[0]!r} has a key of its own: fields.{taken[0]}")
        return reference

    @property
    def columns(self) -> list[str]:
        named = [self.prompt, self.messages, self.answer, self.tests, self.id, self.source]
        return list(dict.fromkeys([name for name in named if name is not None] + list(self.reference.values())))


class Data(Section):
    """A JSONL or Parquet file, a folder `save_to_disk` made, or a Hugging Face data set name.

    Without `fields` the columns have the names that `rlif data prepare` gives them: `prompt` or `messages`, and any of
    `answer`, `tests`, `id`, `source`; all others are the reference's. `source` is of rows that do not name their own.
    `answer_pattern` is a regex with one group that cuts the answer out of the answer column (GSM8K: `####\\s*(.+)`).
    `prompt` names what is said around a problem (services/prompts.yaml); `system_prompt` is a text of your own instead.
    """

    path: PlainName
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    source: str = "default"
    fields: Fields | None = None
    prompt: Annotated[str, AfterValidator(lambda name: prompts.named(name).name)] | None = None
    system_prompt: str | None = None
    answer_pattern: str | None = None
    shuffle: bool = True
    limit: int | None = Field(None, ge=1)
    max_prompt_tokens: int = Field(512, ge=1)

    @model_validator(mode="after")
    def one_prompt_column(self) -> Self:
        if self.fields is not None and (self.fields.prompt is None) == (self.fields.messages is None):
            raise ValueError("fields: give exactly one of `prompt` and `messages`")
        return self

    @property
    def names_sources(self) -> bool:
        """Whether the rows may name their own."""
        return self.fields is None or self.fields.source is not None

    @model_validator(mode="after")
    def one_prompt_around_it(self) -> Self:
        if self.prompt is None:
            return self
        if self.system_prompt is not None:
            raise ValueError(f"system_prompt: prompt {self.prompt!r} brings its own; give one of the two")
        if self.fields is not None and self.fields.messages is not None and prompts.named(self.prompt).templates:
            raise ValueError(f"prompt: {self.prompt!r} is put around the text of fields.prompt, not fields.messages")
        return self

    @model_validator(mode="after")
    def pattern_cuts_one_answer(self) -> Self:
        if self.answer_pattern is None:
            return self
        try:
            groups = re.compile(self.answer_pattern).groups
        except re.error as error:
            raise ValueError(f"answer_pattern: {self.answer_pattern!r} is not a regular expression: {error}") from error
        if groups != 1:
            raise ValueError(f"answer_pattern: {self.answer_pattern!r} needs exactly one group, it has {groups}")
        if self.fields is not None and self.fields.answer is None:
            raise ValueError("answer_pattern: is of no use without fields.answer")
        return self


Gpus = Annotated[list[Annotated[int, Field(ge=0)]] | None, Field(min_length=1)]
"""CUDA devices that `rlif up` shows this part, dealt out evenly over its replicas or ranks; none: all of them."""


class Rollout(Section):
    """With `urls` the servers are somebody else's; without, `rlif up` starts `replicas` of them.

    `groups_per_request` groups travel in one HTTP request and, with the transformers engine, in one batch.
    """

    engine: Literal["transformers", "vllm"] = "transformers"
    urls: list[ServerUrl] = Field(default_factory=list)
    replicas: int = Field(1, ge=1, le=64)
    group_size: int = Field(8, ge=1, le=1024)
    groups_per_request: int = Field(1, ge=1, le=1024)
    sampling: Sampling = Sampling()
    max_model_len: int | None = Field(None, ge=2)
    max_batch_sequences: int = Field(256, ge=1)
    tensor_parallel_size: int = Field(1, ge=1)
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    gpus: Gpus = None
    threads: int | None = Field(None, ge=1)
    deadline_seconds: float = Field(600, gt=0)


class Scorer(Section):
    """The reward server and its scorer model. `follow`: `online` newest weights, `match` at least the group's version,
    `frozen` the base model for ever, `ema` a moving average of what was published (`ema_decay` per version; not with
    vLLM). `reference_model`: a frozen model (name or folder) beside it, for kl_to_reference (not with vLLM)."""

    engine: Literal["transformers", "vllm"] = "transformers"
    reference_model: str | None = Field(None, min_length=1)
    urls: list[ServerUrl] = Field(default_factory=list)
    replicas: int = Field(1, ge=1, le=64)
    follow: Literal["online", "match", "frozen", "ema"] = "online"
    ema_decay: float = Field(0.99, gt=0, lt=1)
    max_batch_tokens: int = Field(16384, ge=1)
    max_model_len: int | None = Field(None, ge=2)
    tensor_parallel_size: int = Field(1, ge=1)
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1)
    verifier_workers: int = Field(2, ge=1, le=256)
    plugins: list[Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]] = Field(default_factory=list)
    """Rewards of your own, as module:function (docs/custom-rewards.md)."""
    sandbox: str = Field("none", pattern=r"^(none|bubblewrap|e2b|((sandboxfusion|piston)=)?https?://\S+)$")
    """Where programs in completions are run (docs/sandbox.md)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    gpus: Gpus = None
    threads: int | None = Field(None, ge=1)
    deadline_seconds: float = Field(300, gt=0)

    @model_validator(mode="after")
    def engine_can(self) -> Self:
        if self.engine == "vllm" and self.follow == "ema":
            raise ValueError("follow: ema needs engine: transformers; vLLM serves no moving average of the weights")
        if self.engine == "vllm" and self.reference_model is not None:
            raise ValueError("reference_model: needs engine: transformers; vLLM holds no second model")
        if self.engine == "transformers" and self.tensor_parallel_size > 1:
            raise ValueError("tensor_parallel_size: the transformers engine runs on one device; use engine: vllm")
        if self.engine == "transformers" and self.max_model_len is not None:
            raise ValueError("max_model_len: the transformers engine has no such limit; it is for engine: vllm")
        return self


class Pacing(Section):
    """`max_staleness: 0` is exact on-policy training. `dynamic_sampling` (DAPO, arXiv 2503.14476): groups whose
    completions all have the same advantage are left out and replaced, at most `max_refill` for each group of a step;
    beyond that they are trained on after all."""

    max_staleness: int = Field(1, ge=0)
    max_requests_in_flight: int = Field(64, ge=1)
    dynamic_sampling: bool = False
    max_refill: float = Field(3.0, gt=0)


class Checkpoints(Section):
    every: int = Field(10, ge=1)
    keep: int = Field(3, ge=1)


class Offload(Section):
    """What a GPU's rank keeps in the CPU's memory, by DeepSpeed: the `optimizer`'s states, and its step (zero_stage 1,
    2 or 3); the `parameters`, fetched layer by layer (zero_stage 3)."""

    optimizer: bool = False
    parameters: bool = False


class Trainer(Objective):
    """`groups_per_step` prompts make one step, which is one version of the weights. `micro_batch_tokens` bounds the
    tokens of one forward, where a prompt that several completions share counts once (on a CPU it is at most 4096). The
    objective's keys (`algorithm`, ...): services/algorithms.py."""

    steps: int = Field(ge=1)
    groups_per_step: int = Field(ge=1)
    ranks: int = Field(1, ge=1, le=1024)
    zero_stage: int = Field(2, ge=0, le=3)
    learning_rate: float = Field(1e-6, gt=0, lt=1)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    adam_eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(0.1, ge=0)
    """A share of the steps when below 1, else a number of steps."""
    grad_clip: float = Field(1.0, gt=0)
    micro_batch_tokens: int = Field(16384, ge=1)
    gradient_checkpointing: bool = False
    offload: Offload = Offload()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    gpus: Gpus = None
    threads: int | None = Field(None, ge=1)
    checkpoints: Checkpoints = Checkpoints()
    batch_deadline_seconds: float = Field(3600, gt=0)
    """How long to wait for one step's groups before giving up with an error."""

    @model_validator(mode="after")
    def can_be_divided(self) -> Self:
        if self.groups_per_step % self.minibatches:
            raise ValueError(
                f"minibatches: {self.minibatches} does not divide groups_per_step ({self.groups_per_step})"
            )
        return self


class Weights(Section):
    """`dir` defaults to a folder of the run; servers on other machines must see it at the same path, or it is a bucket,
    `s3://bucket/prefix`.

    `transport: delta` publishes one whole version in `snapshot_every`, and between them what changed; trainer and
    servers then keep a copy of the weights each in `mirror_dir` (none: the system's folder for temporary files).
    `nccl` and `ipc` (trainer and servers on GPUs; on the same one) publish one whole version in `snapshot_every`, too,
    and broadcast those between to servers of engine vllm, each broadcast within `broadcast_seconds`.
    `in_flight`: completions that are being made when new weights come are finished first (`wait`), go on with the new
    weights (`keep`), or are begun again (`abort`).
    """

    transport: Literal["disk", "delta", "nccl", "ipc"] = "disk"
    dir: PlaceOfWeights | None = None
    keep: int = Field(3, ge=2)
    snapshot_every: int = Field(20, ge=2)
    mirror_dir: Path | None = None
    broadcast_seconds: float = Field(120, gt=0)
    in_flight: Literal["wait", "keep", "abort"] = "wait"
    poll_seconds: float = Field(0.2, gt=0)


class Queue(Section):
    """`url` none: RLIF_REDIS_URL; without that, `rlif up` runs a private redis-server with an append-only file in the
    run's folder."""

    url: RedisUrl | None = None
    max_deliveries: int = Field(3, ge=1)
