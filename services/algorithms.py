"""The trainer's objective as a recipe sets it: a named algorithm is a set of defaults for keys that stand alone.

A key given in the recipe wins over its algorithm's default. What each key does to the loss, and the equations:
docs/algorithms.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from services.contract import Sampling
from services.section import Section
from services.spec import Combine, Normalize

Name = Literal["grpo", "dr_grpo", "dapo", "gspo", "rloo", "reinforce_pp", "cispo"]
Level = Literal["token", "sequence"]
Aggregation = Literal["per_sequence", "token_mean", "constant"]
KLEstimator = Literal["k1", "k2", "k3"]


@dataclass(frozen=True)
class Algorithm:
    """`normalize` is how its paper makes advantages of rewards inside a group: the reward server's part of it."""

    paper: str
    normalize: Normalize
    keys: Mapping[str, Any]


ALGORITHMS: dict[Name, Algorithm] = {
    "grpo": Algorithm("Shao et al. 2024, arXiv 2402.03300", "group_std", {}),
    "dr_grpo": Algorithm(
        "Liu et al. 2025, arXiv 2503.20783", "group_mean", {"aggregation": "constant", "kl_beta": 0.0}
    ),
    "dapo": Algorithm(
        "Yu et al. 2025, arXiv 2503.14476",
        "group_std",
        {"clip_high": 0.28, "aggregation": "token_mean", "kl_beta": 0.0},
    ),
    "gspo": Algorithm(
        "Zheng et al. 2025, arXiv 2507.18071",
        "group_std",
        {"policy_ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "kl_beta": 0.0},
    ),
    "rloo": Algorithm(
        "Ahmadian et al. 2024, arXiv 2402.14740",
        "leave_one_out",
        {"surrogate": "none", "aggregation": "constant", "aggregation_length": 1, "kl_estimator": "k2"},
    ),
    "reinforce_pp": Algorithm(
        "Hu et al. 2025, arXiv 2501.03262",
        "none",
        {"whiten": True, "aggregation": "token_mean", "kl_estimator": "k2"},
    ),
    "cispo": Algorithm(
        "MiniMax 2025, arXiv 2506.13585",
        "group_std",
        {"surrogate": "cispo", "clip_low": 1.0, "clip_high": 4.0, "aggregation": "token_mean", "kl_beta": 0.0},
    ),
}


class Importance(Section):
    """The weight from the rollout's policy to the trainer's, for each token or (the product) for each sequence.

    `truncate` cuts it at `high`; `mask` drops what lies outside `low`..`high` and leaves the rest as it is.
    """

    level: Level = "token"
    mode: Literal["truncate", "mask"] = "truncate"
    low: float | None = Field(None, gt=0)
    high: float = Field(2.0, gt=0)

    @model_validator(mode="after")
    def low_masks(self) -> Self:
        if self.low is not None and self.mode == "truncate":
            raise ValueError(f"low: {self.low} is for mode: mask; truncate has only `high`")
        if self.low is not None and self.low >= self.high:
            raise ValueError(f"low: {self.low} must be less than high ({self.high})")
        return self


class ClipCov(Section):
    """Keeps the policy gradient off a `share` of the tokens, drawn from those whose covariance of logprob and
    advantage lies between `low` and `high`."""

    share: float = Field(2e-4, gt=0, le=1)
    low: float = 1.0
    high: float = 5.0

    @model_validator(mode="after")
    def is_a_range(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low: {self.low} must be less than high ({self.high})")
        return self


class Reference(Section):
    """The policy that the KL term is taken to: the `frozen` base model, or the `ema` of the trained weights, which
    takes up 1 - `decay` of them after every step. `offload`: it waits in the CPU's memory between its forwards."""

    kind: Literal["frozen", "ema"] = "frozen"
    decay: float = Field(0.99, gt=0, lt=1)
    offload: bool = False


class Objective(Section):
    """What one step minimises.

    `kl_beta` weighs the KL to the reference policy (0: no reference is loaded). `old_logprobs`: the ratio is taken
    against `recomputed` logprobs (the importance weight then bridges to the rollout's; `importance: null` leaves it
    out) or against the `rollout`'s directly (no importance weight is due).
    """

    algorithm: Name = "grpo"
    policy_ratio: Level = "token"
    surrogate: Literal["clip", "cispo", "none"] = "clip"
    clip_low: float = Field(0.2, gt=0, le=1)
    clip_high: float = Field(0.2, gt=0)
    dual_clip: float | None = Field(None, gt=1)
    """With a negative advantage the surrogate is held at this many times it (Ye et al. 2020)."""
    aggregation: Aggregation = "per_sequence"
    aggregation_length: int | None = Field(None, ge=1)
    """What `constant` divides a completion's sum by; by default rollout.sampling.max_tokens."""
    whiten: bool = False
    """Advantages get mean 0 and deviation 1 over all tokens of the step."""
    kl_beta: float = Field(0.005, ge=0)
    kl_estimator: KLEstimator = "k3"
    reference: Reference = Reference()
    old_logprobs: Literal["recomputed", "rollout"] = "recomputed"
    importance: Importance | None = Importance()
    entropy_bonus: float = Field(0.0, ge=0)
    clip_cov: ClipCov | None = None
    epochs_per_batch: int = Field(1, ge=1, le=64)
    minibatches: int = Field(1, ge=1, le=1024)
    """Of whole groups: a step makes epochs_per_batch x minibatches optimizer updates."""

    @model_validator(mode="before")
    @classmethod
    def algorithm_has_defaults(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        given = _migrated(given)
        algorithm = ALGORITHMS.get(given.get("algorithm", "grpo"))
        keys = dict(algorithm.keys) if algorithm else {}
        if given.get("aggregation", "constant") != "constant":
            keys.pop("aggregation_length", None)
        return {**keys, **given}

    @model_validator(mode="after")
    def keys_agree(self) -> Self:
        if self.aggregation_length is not None and self.aggregation != "constant":
            raise ValueError(
                f"aggregation_length: {self.aggregation_length} is for aggregation: constant, not {self.aggregation}"
            )
        if self.dual_clip is not None and self.surrogate != "clip":
            raise ValueError(f"dual_clip: {self.dual_clip} is for surrogate: clip, not {self.surrogate}")
        if self.clip_cov is not None and self.policy_ratio != "token":
            raise ValueError(
                "clip_cov: chooses single tokens, and policy_ratio: sequence has one ratio for all of them"
            )
        return self

    @property
    def updates(self) -> int:
        """Optimizer updates in one step."""
        return self.epochs_per_batch * self.minibatches


def _migrated(given: dict[str, Any]) -> dict[str, Any]:
    """Recipes that runs of an earlier version wrote out have `importance_cap`."""
    if "importance_cap" not in given or "importance" in given:
        return given
    cap = given["importance_cap"]
    rest = {key: value for key, value in given.items() if key != "importance_cap"}
    return {**rest, "importance": None if cap is None else {"high": cap}}


def default_combine(algorithm: Name) -> Combine:
    """How the rewards that a recipe lists without `combine` become advantages."""
    return Combine(normalize=ALGORITHMS[algorithm].normalize)


def contradiction(algorithm: Name, combine: Combine) -> str:
    """One line when advantages are not made as the algorithm's paper makes them, or nothing."""
    known = ALGORITHMS[algorithm]
    if combine.normalize == known.normalize:
        return ""
    return (
        f"combine.normalize: {combine.normalize}, but {algorithm} ({known.paper}) is defined with {known.normalize}; "
        "it is trained as asked"
    )


def cut_sampling(sampling: Sampling) -> str:
    """One line when completions are drawn from less than the policy's whole distribution, or nothing."""
    if sampling.top_p == 1 and sampling.top_k == 0:
        return ""
    return (
        f"rollout.sampling: top_p {sampling.top_p:g}, top_k {sampling.top_k}: completions are drawn from a part of the "
        "policy's distribution and trained as if from all of it; top_p 1 and top_k 0 have no such bias"
    )
