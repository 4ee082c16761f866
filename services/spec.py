"""A reward spec: which rewards a completion gets, and how they become one advantage. Shared by recipe and wire.

The names and parameters of the rewards are known to the reward server alone; here only the shape is checked.
"""

import hashlib
import json
from typing import Any, Literal

from pydantic import Field, field_validator

from services.contract import Wire

Normalize = Literal["group_std", "group_mean", "leave_one_out", "rank", "none"]


class RewardTerm(Wire):
    """One reward in a spec. `weight: 0` measures it without training on it; `sources` routes by task source."""

    name: str = Field(min_length=1, max_length=64)
    weight: float = 1.0
    sources: list[str] | None = Field(None, min_length=1)
    params: dict[str, Any] = Field(default_factory=dict)
    label: str | None = Field(None, min_length=1, max_length=64)
    """Key in `components`; needed only when one reward occurs twice with different parameters."""
    bundle: str | None = Field(None, min_length=1, max_length=64)
    """Terms of one bundle are weighted, summed raw and normalised as one, then added with weight 1."""

    @property
    def key(self) -> str:
        return self.label or self.name


class Combine(Wire):
    """`normalize_then_sum`: normalise each reward inside its group, weight, add. `sum_then_normalize`: the other order
    (all terms are one bundle).

    `eps` is added to the group's standard deviation (ddof 1), as GRPO does.
    """

    order: Literal["normalize_then_sum", "sum_then_normalize"] = "normalize_then_sum"
    normalize: Normalize = "group_std"
    eps: float = Field(1e-4, ge=0)


class RewardSpec(Wire):
    rewards: list[RewardTerm] = Field(min_length=1, max_length=64)
    combine: Combine = Combine()

    @field_validator("rewards")
    @classmethod
    def unique_keys(cls, rewards: list[RewardTerm]) -> list[RewardTerm]:
        keys = [term.key for term in rewards]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise ValueError(f"reward {twice[0]!r} occurs twice: give one of them a `label`")
        return rewards

    @property
    def spec_id(self) -> str:
        """Hash of the content: two specs with one id score alike."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]
