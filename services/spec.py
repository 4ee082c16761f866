"""A reward spec: which rewards a completion gets, and how they become one advantage. Shared by recipe and wire.

The names and parameters of the rewards are known to the reward server alone; here only the shape is checked.
"""

import hashlib
import json
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from services.contract import Count, Items, Wire

Normalize = Literal["group_std", "group_mean", "leave_one_out", "rank", "none"]


# ---- schedules: a factor on a term's weight, by the trainer's version (optimizer step) --------------------------


class Ramp(Wire):
    """`before` up to version `start`, `after` from version `end` on, linear in between."""

    kind: Literal["ramp"]
    start: Count = 0
    end: int = Field(ge=1, lt=2**63)
    before: float = 0.0
    after: float = 1.0

    @model_validator(mode="after")
    def ends_later(self) -> Self:
        if self.end <= self.start:
            raise ValueError(f"end: must be greater than start (got start {self.start}, end {self.end})")
        return self

    def factor(self, version: int) -> float:
        share = min(1.0, max(0.0, (version - self.start) / (self.end - self.start)))
        return (1.0 - share) * self.before + share * self.after


class Switch(Wire):
    """`before` below version `at`, `after` from it on: e.g. Intuitor first, GRPO after."""

    kind: Literal["switch"]
    at: int = Field(ge=1, lt=2**63)
    before: float = 1.0
    after: float = 0.0

    def factor(self, version: int) -> float:
        return self.before if version < self.at else self.after


class Alternate(Wire):
    """`factors` in turn, each for `every` versions, over and over."""

    kind: Literal["alternate"]
    every: int = Field(1, ge=1, lt=2**63)
    factors: Items[float] = Field(min_length=2, max_length=64)

    def factor(self, version: int) -> float:
        return self.factors[version // self.every % len(self.factors)]


Schedule = Annotated[Ramp | Switch | Alternate, Field(discriminator="kind")]


# ---- terms and how they are joined ------------------------------------------------------------------------------


class Gate(Wire):
    """The term counts only where the raw value of another term lies within the bounds.

    Elsewhere, also where the other has no value, it counts as `otherwise`; by default it is left out, as if missing.
    """

    reward: str = Field(min_length=1, max_length=64, description="key of the other term")
    at_least: float | None = None
    at_most: float | None = None
    otherwise: float | None = None

    @model_validator(mode="after")
    def has_bounds(self) -> Self:
        if self.at_least is None and self.at_most is None:
            raise ValueError("give `at_least`, `at_most` or both")
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            raise ValueError(f"at_least ({self.at_least}) is greater than at_most ({self.at_most}): it never opens")
        return self

    def is_open(self, value: float | None) -> bool:
        if value is None:
            return False
        low = self.at_least is None or value >= self.at_least
        return low and (self.at_most is None or value <= self.at_most)


class RewardTerm(Wire):
    """One reward in a spec. `weight: 0` measures it without training on it; `sources` routes by task source."""

    name: str = Field(min_length=1, max_length=64)
    weight: float = 1.0
    sources: Items[str] | None = Field(None, min_length=1)
    params: dict[str, Any] = Field(default_factory=dict)
    label: str | None = Field(None, min_length=1, max_length=64)
    """Key in `components`; needed only when one reward occurs twice with different parameters."""
    bundle: str | None = Field(None, min_length=1, max_length=64)
    """Terms of one bundle are weighted, summed raw and normalised as one, then added with weight 1."""
    clip: tuple[float, float] | None = None
    """Raw values are cut to this range before anything else."""
    gate: Gate | None = None
    schedule: Schedule | None = None

    @field_validator("clip")
    @classmethod
    def clip_is_a_range(cls, clip: tuple[float, float] | None) -> tuple[float, float] | None:
        if clip is not None and clip[0] > clip[1]:
            raise ValueError(f"the lower end comes first (got {list(clip)})")
        return clip

    @property
    def key(self) -> str:
        return self.label or self.name

    def weight_at(self, version: int) -> float:
        return self.weight if self.schedule is None else self.weight * self.schedule.factor(version)


class Combine(Wire):
    """`normalize_then_sum`: normalise each reward inside its group, weight, add. `sum_then_normalize`: the other order
    (all terms are one bundle).

    `eps` is added to the group's standard deviation (ddof 1), as GRPO does. `clip` bounds the advantage's magnitude.
    `skip_unanimous` (key of a term): a group in which that reward says the same of all completions is not trained on.
    """

    order: Literal["normalize_then_sum", "sum_then_normalize"] = "normalize_then_sum"
    normalize: Normalize = "group_std"
    eps: float = Field(1e-4, ge=0)
    clip: float | None = Field(None, gt=0)
    skip_unanimous: str | None = Field(None, min_length=1, max_length=64)


class RewardSpec(Wire):
    rewards: Items[RewardTerm] = Field(min_length=1, max_length=64)
    combine: Combine = Combine()

    @field_validator("rewards")
    @classmethod
    def unique_keys(cls, rewards: list[RewardTerm]) -> list[RewardTerm]:
        keys = [term.key for term in rewards]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise ValueError(f"reward {twice[0]!r} occurs twice: give one of them a `label`")
        for place, term in enumerate(rewards):
            if term.gate is not None and term.gate.reward not in keys:
                raise ValueError(f"[{place}].gate.reward: no term has the key {term.gate.reward!r} (keys: {keys})")
        return rewards

    @model_validator(mode="after")
    def unanimity_of_a_term(self) -> Self:
        key, keys = self.combine.skip_unanimous, [term.key for term in self.rewards]
        if key is not None and key not in keys:
            raise ValueError(f"combine.skip_unanimous: no term has the key {key!r} (keys: {keys})")
        return self

    @property
    def is_scheduled(self) -> bool:
        return any(term.schedule is not None for term in self.rewards)

    @property
    def spec_id(self) -> str:
        """Hash of the content: two specs with one id score alike. Spelling out a default changes nothing."""
        plain = self.model_dump(mode="json", exclude_defaults=True)
        canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]
