"""HTTP bodies of the reward and rollout servers (what they carry is defined in `services.contract`)."""

from typing import Any, Literal, Self

from pydantic import BaseModel, Field, model_validator

from services.contract import (
    LOWEST_TEMPERATURE,
    Completion,
    FinishReason,
    Group,
    GroupScores,
    Items,
    Message,
    Sampling,
    Score,
    Task,
    TokenIds,
    Version,
    Wire,
)
from services.spec import RewardSpec

# ---- POST /v1/rollouts -----------------------------------------------------------------------------------------


class RolloutRequest(Wire):
    """One group to generate. `min_weight_version`: wait (within the deadline) until the server serves at least it."""

    group_id: str = Field(min_length=1, max_length=128)
    messages: Items[Message] | None = Field(None, min_length=1)
    prompt: str | None = None
    prompt_token_ids: TokenIds | None = Field(None, min_length=1)
    n: int = Field(1, ge=1, le=1024)
    sampling: Sampling = Sampling()
    min_weight_version: Version | None = None

    @model_validator(mode="after")
    def one_prompt(self) -> Self:
        given = [name for name in ("messages", "prompt", "prompt_token_ids") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of `messages`, `prompt`, `prompt_token_ids` (got {given or 'none'})")
        return self


class RolloutsRequest(Wire):
    requests: Items[RolloutRequest] = Field(min_length=1, max_length=1024)


class RolloutGroup(Wire):
    group_id: str
    prompt_token_ids: TokenIds
    completions: Items[Completion]

    def of(self, task: Task, sampling: Sampling, index: int = 0) -> Group:
        """With what was asked, which the answer does not repeat."""
        return Group(
            group_id=self.group_id,
            index=index,
            task=task,
            prompt_token_ids=self.prompt_token_ids,
            completions=self.completions,
            sampling=sampling,
        )


class RolloutsResponse(Wire):
    """`groups` in the order of the requests."""

    groups: Items[RolloutGroup]
    model: str
    weight_version: Version


# ---- POST /v1/score --------------------------------------------------------------------------------------------


class ScoreItem(Wire):
    messages: Items[Message] | None = Field(None, min_length=1)
    prompt: str | None = None
    prompt_token_ids: TokenIds | None = None
    completion: str | None = None
    completion_token_ids: TokenIds | None = None

    @model_validator(mode="after")
    def one_of_each(self) -> Self:
        prompts = [name for name in ("messages", "prompt", "prompt_token_ids") if getattr(self, name) is not None]
        if len(prompts) != 1:
            raise ValueError(f"give exactly one of `messages`, `prompt`, `prompt_token_ids` (got {prompts or 'none'})")
        if (self.completion is None) == (self.completion_token_ids is None):
            raise ValueError("give exactly one of `completion` and `completion_token_ids`")
        return self


class TokenSpan(BaseModel):
    """Which of a completion's tokens count; all of them by default. A span is cut to the tokens that there are."""

    last: int | None = Field(None, ge=1, description="only the last so many tokens count (all, where there are fewer)")
    span: tuple[int | None, int | None] | None = Field(
        None,
        description="only the tokens [start, end) count, as in Python: from 0, negative from the end, null for open",
    )

    @model_validator(mode="after")
    def one_span(self) -> Self:
        if self.last is not None and self.span is not None:
            raise ValueError("give one of `last` and `span`, not both")
        return self

    @property
    def tokens(self) -> slice:
        """The tokens that count, of a sequence of all."""
        if self.last is not None:
            return slice(-self.last, None)
        return slice(None) if self.span is None else slice(*self.span)

    def describe(self) -> str:
        start, end = self.tokens.start, self.tokens.stop
        return f"[{'' if start is None else start}:{'' if end is None else end}]"


class ScoreRequest(Wire, TokenSpan):
    """`preset` picks the definition of self-certainty: `paper` (default), or what the two reference codes compute.

    `last` or `span` choose the tokens that `scores` are of; `per_token` has them all. `top_k` is topk_confidence's.
    """

    items: Items[ScoreItem] = Field(min_length=1, max_length=4096)
    metrics: Items[str] = Field(default=["self_certainty"], min_length=1, max_length=32)
    per_token: bool = False
    temperature: float = Field(1.0, ge=LOWEST_TEMPERATURE, le=100)
    preset: Literal["paper", "open_r1", "verl"] = "paper"
    top_k: int = Field(20, ge=1, le=256)
    min_weight_version: Version | None = None


class ScoreResult(Wire):
    """An empty completion has `n_tokens` 0 and no scores; a span that leaves nothing of one has none either.

    `per_token` and `tokens` only when asked for.
    """

    n_tokens: int
    scores: dict[str, float]
    per_token: dict[str, list[float]] | None = None
    tokens: list[str] | None = None


class ScoreResponse(Wire):
    results: Items[ScoreResult]
    model: str
    weight_version: Version
    vocab_size: int


# ---- POST /v1/rewards ------------------------------------------------------------------------------------------


class CompletionText(Wire):
    text: str
    token_ids: TokenIds | None = None
    finish_reason: FinishReason | None = None


class RewardGroup(Wire):
    """`weight_version` is the policy's that made the completions: a spec's schedules go by it.

    `min_weight_version`: a scorer that follows by `match` waits until it serves at least it.
    """

    group_id: str = Field(min_length=1, max_length=128)
    task: Task
    prompt_token_ids: TokenIds | None = None
    completions: Items[CompletionText] = Field(min_length=1, max_length=1024)
    weight_version: Version | None = None
    min_weight_version: Version | None = None


MOST_COMPLETIONS = 16384
"""In one call for rewards: more would hold up the other callers of the server."""


class RewardsRequest(Wire):
    """`spec` is a name: a preset, a built-in reward, or one that was put; the server's default when left out."""

    spec: str | None = None
    groups: Items[RewardGroup] = Field(min_length=1, max_length=1024)

    @model_validator(mode="after")
    def bounded(self) -> Self:
        count = sum(len(group.completions) for group in self.groups)
        if count > MOST_COMPLETIONS:
            raise ValueError(f"groups: at most {MOST_COMPLETIONS} completions in one call (got {count})")
        return self


class RewardsResponse(Wire):
    groups: Items[GroupScores]


# ---- POST /v1/specs/preview ------------------------------------------------------------------------------------


class PreviewGroup(Wire):
    """Scores of a group that were measured: by component, one for each of its `size` completions."""

    group_id: str = Field(min_length=1, max_length=128)
    source: str = Field("default", min_length=1, max_length=128)
    size: int = Field(ge=1, le=1024)
    components: dict[str, Items[Score]] = Field(max_length=64)
    weight_version: Version | None = None

    @model_validator(mode="after")
    def one_score_a_completion(self) -> Self:
        for key, scores in self.components.items():
            if len(scores) != self.size:
                raise ValueError(f"components: {key!r} has {len(scores)} scores for {self.size} completions")
        return self


class PreviewRequest(Wire):
    spec: RewardSpec
    groups: Items[PreviewGroup] = Field(min_length=1, max_length=1024)

    @model_validator(mode="after")
    def bounded(self) -> Self:
        count = sum(group.size for group in self.groups)
        if count > MOST_COMPLETIONS:
            raise ValueError(f"groups: at most {MOST_COMPLETIONS} completions in one call (got {count})")
        return self


class PreviewResponse(Wire):
    """`missing`: terms of the spec that some group they are routed to has no scores of; there they count as missing."""

    groups: Items[GroupScores]
    spec_id: str
    missing: Items[str]


# ---- GET /v1/rewards, /v1/specs, /v1/model ---------------------------------------------------------------------


class RewardEntry(Wire):
    """What a reward needs, its range (none where unbounded), its parameters' JSON schema, whether it works here.

    `example` are terms of a spec; `builds_on` (keys of other terms) and `reads` (metrics of the scoring pass) are its.
    """

    name: str
    description: str
    details: str
    needs: list[str]
    range: tuple[float | None, float | None]
    builds_on: list[str]
    reads: list[str]
    params: dict[str, Any]
    example: list[dict[str, Any]]
    available: bool
    unavailable_because: str | None


class RewardsList(Wire):
    rewards: Items[RewardEntry]


class SpecEntry(Wire):
    """A spec by name. `version` counts the puts of the name, 0 for what came with the server; `updated_at`: Unix s."""

    name: str
    version: int
    spec_id: str
    built_in: bool
    updated_at: float | None
    spec: RewardSpec


class SpecsList(Wire):
    specs: Items[SpecEntry]


class SpecVersions(Wire):
    versions: Items[SpecEntry]
