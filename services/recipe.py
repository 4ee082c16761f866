"""One YAML recipe -> typed settings. Every service reads its own section; a bad key or value is refused by name."""

import os
import re
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args
from urllib.parse import urlsplit

import yaml
from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator

from services.algorithms import Objective, default_combine
from services.contract import Sampling
from services.recipe_watching import Guard, Tracking
from services.section import Section
from services.spec import Combine, RewardSpec, RewardTerm


class RecipeError(ValueError):
    """A recipe that cannot run; the message names key, value and what would be valid, a line for each fault."""


PathLike = TypeVar("PathLike", Path, str)
Beta = Annotated[float, Field(ge=0, lt=1)]


def _of_scheme(url: str, *schemes: str) -> str:
    try:
        parts = urlsplit(url)
    except ValueError:  # its words quote the password
        raise ValueError("not a URL; percent-encode what is special in the password") from None
    if parts.scheme not in schemes or not (parts.netloc or parts.path):
        raise ValueError(f"not a URL that starts with {' or '.join(f'{scheme}://' for scheme in schemes)}")
    return url


ServerUrl = Annotated[str, AfterValidator(lambda url: _of_scheme(url, "http", "https"))]
REDIS_SCHEMES = ("redis", "rediss", "unix")
RedisUrl = Annotated[str, AfterValidator(lambda url: _of_scheme(url, *REDIS_SCHEMES))]


def _plain(path: PathLike) -> PathLike:
    bad = next((mark for mark in str(path) if mark in "\"'\\" or not mark.isprintable()), None)
    if bad is not None:
        raise ValueError(f"{bad!r} cannot be in a path here: it would end a line or a quotation elsewhere")
    return path


PlainPath = Annotated[Path, AfterValidator(_plain)]
"""Ends up in shell scripts and in redis.conf."""
PlainName = Annotated[str, AfterValidator(_plain)]


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
    """Columns of the data set. One of `prompt` (text) and `messages` (a list of role/content).

    `reference` names the columns of what else the rewards read there, e.g. `{choices: options}`, or for IFEval
    `{instruction_id_list: instruction_id_list, kwargs: kwargs}`.
    """

    prompt: str | None = None
    messages: str | None = None
    answer: str | None = None
    tests: str | None = None
    id: str | None = None
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
        named = [self.prompt, self.messages, self.answer, self.tests, self.id]
        return list(dict.fromkeys([name for name in named if name is not None] + list(self.reference.values())))


class Data(Section):
    """A JSONL or Parquet file, a folder `save_to_disk` made, or a Hugging Face data set name.

    `answer_pattern` is a regex with one group that cuts the answer out of the answer column (GSM8K: `####\\s*(.+)`).
    """

    path: PlainName
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    source: str = "default"
    fields: Fields
    system_prompt: str | None = None
    answer_pattern: str | None = None
    shuffle: bool = True
    limit: int | None = Field(None, ge=1)
    max_prompt_tokens: int = Field(512, ge=1)

    @model_validator(mode="after")
    def one_prompt_column(self) -> Self:
        if (self.fields.prompt is None) == (self.fields.messages is None):
            raise ValueError("fields: give exactly one of `prompt` and `messages`")
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
        if self.fields.answer is None:
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
        if self.reference.kind == "ema" and self.zero_stage == 3 and self.kl_beta > 0:
            raise ValueError("reference.kind: ema needs whole weights on every rank: zero_stage 0, 1 or 2, or frozen")
        return self


class Weights(Section):
    """`dir` defaults to a folder of the run; servers on other machines must see it at the same path.

    `transport: delta` publishes one whole version in `snapshot_every`, and between them what changed; trainer and
    servers then keep a copy of the weights each in `mirror_dir` (none: the system's folder for temporary files).
    `in_flight`: completions that are being made when new weights come are finished first (`wait`), go on with the new
    weights (`keep`), or are begun again (`abort`).
    """

    transport: Literal["disk", "delta"] = "disk"
    dir: PlainPath | None = None
    keep: int = Field(3, ge=2)
    snapshot_every: int = Field(20, ge=2)
    mirror_dir: Path | None = None
    in_flight: Literal["wait", "keep", "abort"] = "wait"
    poll_seconds: float = Field(0.2, gt=0)


class Queue(Section):
    """`url` none: RLIF_REDIS_URL; without that, `rlif up` runs a private redis-server with an append-only file in the
    run's folder."""

    url: RedisUrl | None = None
    max_deliveries: int = Field(3, ge=1)


class Evaluation(Section):
    """Held-out tasks, answered and judged `every` so many steps (and before the first) by the run's own servers.

    `rewards` judge: terms, or the name of a spec. `best` names the metric of the best checkpoint: `accuracy` (of the
    first term that judges), `accuracy.<term>`, `value.<term>`, `length`, `stopped` or `auc`; higher is better unless
    `best_is` says lowest. `sampling` none: the rollout's own; `samples` completions of each task. `certainty`: also
    whether the model is surer of right answers (`auc`; needs a scorer).
    """

    data: Data
    every: int = Field(ge=1)
    rewards: str | list[RewardTerm]
    samples: int = Field(1, ge=1, le=1024)
    sampling: Sampling | None = None
    certainty: bool = True
    best: str = Field("accuracy", min_length=1)
    best_is: Literal["highest", "lowest"] = "highest"
    tasks_per_request: int = Field(8, ge=1, le=1024)
    max_requests_in_flight: int = Field(2, ge=1)

    @field_validator("rewards")
    @classmethod
    def spec_is_sound(cls, rewards: str | list[RewardTerm]) -> str | list[RewardTerm]:
        if not rewards:
            raise ValueError("list at least one judge, or name a spec")
        if isinstance(rewards, list):
            RewardSpec(rewards=rewards)
        return rewards

    @property
    def spec(self) -> RewardSpec | None:
        """As `Recipe.spec`, with self-certainty measured beside the judges."""
        if isinstance(self.rewards, str):
            return None
        is_there = any(term.key == "self_certainty" for term in self.rewards)
        more = [RewardTerm(name="self_certainty", weight=0.0)] if self.certainty and not is_there else []
        return RewardSpec(rewards=[*self.rewards, *more])

    @property
    def judge(self) -> str:
        """The term that `accuracy` is of."""
        return self.rewards if isinstance(self.rewards, str) else self.rewards[0].key


class Recipe(Section):
    run: Run
    model: Model
    data: Data
    rollout: Rollout = Rollout()
    rewards: str | list[RewardTerm]
    """A list of terms, or the name of a preset (`intuitor`, `grpo`, ...) or of one built-in reward."""
    combine: Combine | None = None
    scorer: Scorer = Scorer()
    pacing: Pacing = Pacing()
    trainer: Trainer
    weights: Weights = Weights()
    queue: Queue = Queue()
    tracking: Tracking = Tracking()
    evaluation: Evaluation | None = None
    guard: Guard | None = Guard()

    @field_validator("rewards")
    @classmethod
    def spec_is_sound(cls, rewards: str | list[RewardTerm]) -> str | list[RewardTerm]:
        if isinstance(rewards, list):
            if not rewards:
                raise ValueError("list at least one reward")
            RewardSpec(rewards=rewards)
        return rewards

    @model_validator(mode="after")
    def parts_agree(self) -> Self:
        if self.combine is not None and isinstance(self.rewards, str):
            raise ValueError(
                f"combine: the spec {self.rewards!r} brings its own; list the rewards to combine them anew"
            )
        if isinstance(self.rewards, list) and not any(
            term.weight and (term.sources is None or self.data.source in term.sources) for term in self.rewards
        ):
            raise ValueError(
                f"rewards: none has a weight other than 0 for tasks of data.source {self.data.source!r}: "
                "there is nothing to train on"
            )
        if self.trainer.groups_per_step % self.rollout.groups_per_request:
            raise ValueError(
                f"rollout.groups_per_request: {self.rollout.groups_per_request} does not divide "
                f"trainer.groups_per_step ({self.trainer.groups_per_step})"
            )
        if self.rollout.group_size == 1 and not isinstance(self.rewards, str):
            if self.combined.normalize != "none":
                raise ValueError(
                    "rollout.group_size: 1 leaves nothing to normalise in; use at least 2, or normalize: none"
                )
        needed = {
            "rollout": self.rollout.replicas * self.rollout.tensor_parallel_size,
            "scorer": self.scorer.replicas * self.scorer.tensor_parallel_size,
            "trainer": self.trainer.ranks,
        }
        for part, count in needed.items():
            gpus = getattr(self, part).gpus
            if gpus is not None and len(set(gpus)) != count:
                raise ValueError(f"{part}.gpus: {gpus} must be {count} different devices, one for each replica or rank")
        if self.model.lora is not None and self.trainer.reference.kind == "ema":
            raise ValueError("trainer.reference.kind: ema is of whole weights; with model.lora the reference is frozen")
        if self.rollout.sampling.temperature == 0:
            raise ValueError("rollout.sampling.temperature: 0 makes every completion of a group the same; use e.g. 1.0")
        if self.run.deterministic and self.scorer.engine == "vllm":
            raise ValueError(
                "run.deterministic: the last bits of what scorer.engine vllm computes depend on what else is scored at "
                "the time; use transformers"
            )
        if self.run.deterministic and self.pacing.dynamic_sampling:
            raise ValueError(
                "run.deterministic: what replaces the groups that pacing.dynamic_sampling leaves out depends on which "
                "end first; use one of the two"
            )
        if self.run.deterministic and self.weights.in_flight != "wait":
            raise ValueError(
                f"weights.in_flight: with {self.weights.in_flight}, completions depend on when new weights come; "
                "run.deterministic needs wait"
            )
        self._is_watched_soundly()
        need = self.data.max_prompt_tokens + self.rollout.sampling.max_tokens
        for part in ("rollout", "scorer"):
            limit = getattr(self, part).max_model_len
            if limit is not None and need > limit:
                raise ValueError(
                    f"{part}.max_model_len: {limit} is less than data.max_prompt_tokens + "
                    f"rollout.sampling.max_tokens ({need})"
                )
        return self

    @model_validator(mode="after")
    def constant_has_a_length(self) -> Self:
        if self.trainer.aggregation == "constant" and self.trainer.aggregation_length is None:
            # Sections are frozen for those who read them; this one's default lies in another.
            object.__setattr__(self.trainer, "aggregation_length", self.rollout.sampling.max_tokens)
        return self

    @property
    def combined(self) -> Combine:
        """How the rewards that the recipe lists are joined: as it says, or as its algorithm has it."""
        return self.combine or default_combine(self.trainer.algorithm)

    def _is_watched_soundly(self) -> None:
        every = self.trainer.checkpoints.every
        if self.evaluation is not None and self.evaluation.every % every:
            raise ValueError(
                f"evaluation.every: {self.evaluation.every} is not a multiple of trainer.checkpoints.every ({every}): "
                "the best version needs a checkpoint"
            )
        if self.guard is not None and self.guard.action == "raise_beta" and self.trainer.kl_beta == 0:
            raise ValueError("guard.action: raise_beta needs trainer.kl_beta above 0: at 0 no reference is loaded")

    @property
    def has_orders(self) -> bool:
        """Whether the trainer may be given orders, and so waits after its last step for the last of them."""
        return self.evaluation is not None or (self.guard is not None and self.guard.action != "alarm")

    @property
    def spec(self) -> RewardSpec | None:
        """The spec written out in the recipe; none when `rewards` names one the reward server knows."""
        if isinstance(self.rewards, str):
            return None
        return RewardSpec(rewards=self.rewards, combine=self.combined)

    @property
    def weights_dir(self) -> Path:
        return self.weights.dir or self.run.dir / "weights"


def _override(tree: dict[str, Any], assignment: str) -> None:
    key, found, text = assignment.partition("=")
    if not found or not key:
        raise RecipeError(f"override {assignment!r}: write it as key.sub=value")
    *parents, last = key.split(".")
    node: Any = tree
    for part in parents:
        node = node.setdefault(part, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict):
            raise RecipeError(f"override {assignment!r}: `{part}` in {key!r} is not a section")
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"override {assignment!r}: the value is not YAML: {error}") from error


def _valid_here(location: tuple[int | str, ...]) -> str:
    """The keys that would be valid beside a refused one."""
    section: Any = Recipe
    for part in location[:-1]:
        field = getattr(section, "model_fields", {}).get(part)
        kinds = get_args(field.annotation) or (field.annotation,) if field is not None else ()
        section = next((kind for kind in kinds if hasattr(kind, "model_fields")), None)
    names = getattr(section, "model_fields", None)
    return f"; valid keys here: {', '.join(names)}" if names else ""


def _explain(error: ValidationError) -> str:
    lines = []
    for fault in error.errors(include_url=False):
        key = ".".join(str(part) for part in fault["loc"]) or "recipe"
        if fault["type"] == "extra_forbidden":
            lines.append(f"{key}: unknown key{_valid_here(fault['loc'])}")
        elif fault["type"] == "missing":
            lines.append(f"{key}: is required")
        else:
            message = fault["msg"].removeprefix("Value error, ")
            unshown = isinstance(fault["input"], dict) or key == "queue.url"  # a redis URL may carry a password
            given = "" if unshown else f" (got {fault['input']!r:.200})"
            lines.append(f"{key}: {message}{given}" if key != "recipe" else message)
    return "\n".join(lines)


def parse(tree: Any, overrides: list[str] | None = None) -> Recipe:
    """Raises RecipeError."""
    if not isinstance(tree, dict):
        raise RecipeError("a recipe is a YAML mapping with the sections " + ", ".join(Recipe.model_fields))
    tree = deepcopy(tree)
    for assignment in overrides or []:
        _override(tree, assignment)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(_explain(error)) from error


def redis_url(recipe: Recipe) -> str | None:
    """`queue.url`, or where the recipe has none RLIF_REDIS_URL: a password has no place in a file or an argument list.

    Raises RecipeError when that variable holds no redis URL; its value is not shown.
    """
    if recipe.queue.url is not None:
        return recipe.queue.url
    given = os.environ.get("RLIF_REDIS_URL") or None
    try:
        return given and _of_scheme(given, *REDIS_SCHEMES)
    except ValueError as error:
        raise RecipeError(f"RLIF_REDIS_URL: {error}") from None


def load(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe file, with `key.sub=value` overrides (values in YAML). Raises RecipeError."""
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise RecipeError(f"cannot read recipe {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {error}") from error
    return parse(tree, overrides)


def dump(recipe: Recipe) -> str:
    """The recipe with every default written out, as YAML that `load` reads back to the same settings."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
