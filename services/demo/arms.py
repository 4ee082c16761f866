"""The demo's four arms: what the model is rewarded for."""

from typing import Literal, get_args

from services.demo.task import ANSWER_PATTERN
from services.spec import RewardTerm

Arm = Literal["self_certainty", "verifiable", "both", "random"]
ARMS: tuple[Arm, ...] = get_args(Arm)


def rewards(arm: Arm, seed: int = 0) -> list[RewardTerm]:
    """The reward terms of an arm. Self-certainty and exact match are measured in every arm, trained on where they are
    the arm's reward; in `both`, each is normalised inside its group and the two are added."""
    terms = [
        RewardTerm(name="self_certainty", weight=float(arm in ("self_certainty", "both"))),
        RewardTerm(name="exact_match", weight=float(arm in ("verifiable", "both")), params={"regex": ANSWER_PATTERN}),
    ]
    return [*terms, RewardTerm(name="random", weight=1.0, params={"seed": seed})] if arm == "random" else terms
