"""The wire types that every service shares; this module imports nothing else of rlif.

A group's way: a `Task` becomes a `Group` (rollout server), then a `ScoredGroup` (reward server), travels the Redis
stream, and is consumed by the trainer, which publishes a `WeightVersion`. JSON over HTTP; msgpack on the stream
(`services.codec`). NaN and infinity are refused everywhere.
"""

import hashlib
import math
from dataclasses import dataclass
from enum import StrEnum
from functools import total_ordering
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

FinishReason = Literal["stop", "length", "abort"]
LOWEST_TEMPERATURE = 1e-4
"""Below it, logits divided by the temperature are no longer finite in float32."""


def _sharp_or_greedy(temperature: float) -> float:
    if 0 < temperature < LOWEST_TEMPERATURE:
        raise ValueError(f"0 (greedy), or at least {LOWEST_TEMPERATURE:g}")
    return temperature


Temperature = Annotated[float, Field(ge=0, le=100), AfterValidator(_sharp_or_greedy)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
"""A number of things or steps; it fits the 64 bits that JSON writers, Redis and tensors have for it."""

Item = TypeVar("Item")
Items = Annotated[list[Item], Field(fail_fast=True)]
"""A list of which only the first bad item is told: a million of them would be a million errors."""


@dataclass(frozen=True)
class Packed:
    """Of a list of numbers: in msgpack it is one array of `dtype` (numpy's name, little-endian)."""

    dtype: str


TokenIds = Annotated[list[int], Field(fail_fast=True), Packed("<i4")]
Logprobs = Annotated[list[float], Field(fail_fast=True), Packed("<f4")]
"""float32 is what engines compute: nothing is rounded twice."""
MOST_FIELDS = 100


class Wire(BaseModel):
    """A message: unknown fields, NaN and infinity are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def few_fields(cls, given: Any) -> Any:
        """Each unknown field is an error of its own: so many are one."""
        if isinstance(given, dict) and len(given) > MOST_FIELDS:
            raise ValueError(f"known fields are {', '.join(cls.model_fields)} (got {len(given)} fields)")
        return given


@total_ordering
class Version(BaseModel):
    """A policy version, ordered by (lineage, version).

    `version` counts optimizer steps; `lineage` is raised at every restore from a checkpoint, so that a restored
    trainer may publish a lower step that followers still take.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    lineage: Count = 0
    version: Count = 0

    def __lt__(self, other: "Version") -> bool:
        return (self.lineage, self.version) < (other.lineage, other.version)

    def __str__(self) -> str:
        return f"{self.lineage}.{self.version}"


class VersionSpan(Wire):
    """From completion token `start` on, tokens were made by `weight_version`."""

    start: Count
    weight_version: Version


class Message(Wire):
    role: Literal["system", "user", "assistant", "tool"]
    content: str


class TestCase(Wire):
    __test__ = False  # a name pytest would otherwise collect

    input: str
    output: str


class Reference(BaseModel):
    """What a verifiable reward compares with. Further fields of a data set ride along untouched."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    answer: str | None = None
    tests: Items[TestCase] | None = None


class Task(Wire):
    """One problem. `source` names the data set it came from and is what reward routes match on."""

    task_id: str = Field(min_length=1, max_length=256)
    source: str = Field("default", min_length=1, max_length=128)
    messages: Items[Message] | None = Field(None, min_length=1)
    prompt: str | None = None
    reference: Reference | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def one_prompt(self) -> Self:
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("give exactly one of `messages` and `prompt`")
        return self


class Sampling(Wire):
    """How completions are drawn. `top_k: 0` and `top_p: 1` switch those filters off; `temperature: 0` is greedy."""

    temperature: Temperature = 1.0
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: Count = 0
    max_tokens: int = Field(256, ge=1, lt=2**63)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: Items[Annotated[str, Field(min_length=1)]] = Field(default_factory=list, max_length=16)


class Completion(Wire):
    """One sampled answer.

    `logprobs[t]` is the behaviour policy's log-probability (natural log, float32) of `token_ids[t]` at the sampling
    temperature, before top-p/top-k. `token_ids` include the EOS token when the model stopped by itself.
    `weight_version` made the first token; `version_spans` is empty unless the version changed midway.
    """

    text: str
    token_ids: TokenIds
    logprobs: Logprobs
    finish_reason: FinishReason
    weight_version: Version = Version()
    version_spans: Items[VersionSpan] = Field(default_factory=list)

    @model_validator(mode="after")
    def one_logprob_a_token(self) -> Self:
        if len(self.token_ids) != len(self.logprobs):
            raise ValueError(f"{len(self.token_ids)} token_ids but {len(self.logprobs)} logprobs")
        return self


class Group(Wire):
    """The completions of one task. `index` is the task's place in the run's order (a counter over epochs)."""

    group_id: str = Field(min_length=1, max_length=128)
    index: Count = 0
    task: Task
    prompt_token_ids: TokenIds = Field(min_length=1)
    completions: Items[Completion] = Field(min_length=1)
    sampling: Sampling


class Outcome(StrEnum):
    """What came of scoring one completion with one reward."""

    ok = "ok"
    correct = "correct"
    wrong = "wrong"
    no_answer = "no_answer"
    unparsable = "unparsable"
    timeout = "timeout"
    error = "error"
    skipped = "skipped"


FAILED = frozenset({Outcome.unparsable, Outcome.timeout, Outcome.error, Outcome.skipped})
"""Outcomes that carry no value: the score is missing, never 0. (`no_answer` is a judgement: none was given.)"""


class Score(Wire):
    """One reward of one completion. `value` is none exactly when the outcome is one of `FAILED`."""

    value: float | None
    outcome: Outcome
    detail: str = ""
    seconds: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def value_unless_failed(self) -> Self:
        if (self.value is None) != (self.outcome in FAILED):
            raise ValueError(f"outcome `{self.outcome}` {'carries no' if self.value is not None else 'needs a'} value")
        return self

    @classmethod
    def failed(cls, outcome: Outcome, detail: str, seconds: float = 0.0) -> Self:
        return cls(value=None, outcome=outcome, detail=detail[:500], seconds=seconds)

    @classmethod
    def of(cls, value: float, outcome: Outcome = Outcome.ok, detail: str = "", seconds: float = 0.0) -> Self:
        """A score from a computed number; NaN and infinity become an `error` outcome."""
        if not math.isfinite(value):
            return cls.failed(Outcome.error, f"the reward is not finite: {value}", seconds)
        return cls(value=value, outcome=outcome, detail=detail[:500], seconds=seconds)


class CompletionScore(Wire):
    """Everything the reward server says of one completion.

    `components` are raw (unweighted, unnormalised) scores by reward name. `reward` is their weighted sum; none when one
    that counts in it has failed. With `valid` false the completion has no usable reward at all: `advantage` is 0 and
    must not be trained on.
    """

    components: dict[str, Score]
    reward: float | None
    advantage: float
    valid: bool


class GroupScores(Wire):
    """The scored part of a group; `scores` run parallel to the group's completions.

    `skipped` says why the spec leaves the whole group out of training (its completions are then not valid).
    """

    group_id: str
    scores: Items[CompletionScore]
    spec_id: str
    skipped: str = ""
    scorer_weight_version: Version | None = None


class ScoredGroup(Group):
    """A group with its scores: what travels the stream."""

    scores: Items[CompletionScore]
    spec_id: str
    skipped: str = ""
    scorer_weight_version: Version | None = None

    @model_validator(mode="after")
    def one_score_a_completion(self) -> Self:
        if len(self.scores) != len(self.completions):
            raise ValueError(f"{len(self.completions)} completions but {len(self.scores)} scores")
        return self

    @classmethod
    def join(cls, group: Group, scored: GroupScores) -> Self:
        if group.group_id != scored.group_id:
            raise ValueError(f"scores of group {scored.group_id} offered for group {group.group_id}")
        return cls(
            **{name: getattr(group, name) for name in Group.model_fields},
            scores=scored.scores,
            spec_id=scored.spec_id,
            skipped=scored.skipped,
            scorer_weight_version=scored.scorer_weight_version,
        )


class TensorEntry(Wire):
    """One tensor of a weight version: where it lies and what its bytes hash to (xxh3-128 of the raw bytes, hex)."""

    name: str
    shape: list[int]
    dtype: str
    file: str
    checksum: str


class Adapter(Wire):
    """What a version of low-rank adapters is added to: a model whose weights have the checksum `base` when they are of
    `dtype`. A layer's weight becomes W + `scale` * B A, in that dtype."""

    base: str
    dtype: Literal["float32", "bfloat16"]
    scale: float


class WeightVersion(Wire):
    """A published set of weights. `location` is what the transport needs to find it (a directory).

    A `delta` holds what changed since `base`; the manifest is that of the result. A `disk` version has no base. One of
    transport `adapter` holds the matrices A and B of every layer that `adapter` says what to do with.
    """

    run_id: str
    lineage: Count
    version: Count
    transport: str
    location: str
    manifest: Items[TensorEntry]
    created_at: float
    base: Version | None = None
    adapter: Adapter | None = None

    @property
    def id(self) -> Version:
        return Version(lineage=self.lineage, version=self.version)

    @model_validator(mode="after")
    def adapters_are_complete(self) -> Self:
        if (self.transport == "adapter") != (self.adapter is not None):
            raise ValueError(f"transport {self.transport} does not go with adapter {self.adapter}")
        return self

    @field_validator("manifest")
    @classmethod
    def unique_names(cls, manifest: list[TensorEntry]) -> list[TensorEntry]:
        names = [entry.name for entry in manifest]
        if len(set(names)) != len(names):
            raise ValueError("a tensor name occurs twice")
        return manifest


def group_id(run_id: str, epoch: int, task_id: str, attempt: int = 0) -> str:
    """The same (run, epoch, task, attempt) gives the same id, whoever computes it and whenever."""
    digest = hashlib.sha256("\x1f".join([run_id, str(epoch), task_id, str(attempt)]).encode())
    return digest.hexdigest()[:32]


def group_seed(run_seed: int, group: str) -> int:
    """A sampling seed (63 bits) for one group: a function of the run's seed and the group's id alone."""
    digest = hashlib.sha256(f"{run_seed}\x1f{group}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
