"""The demo's arms: what the model is rewarded for."""

from typing import Literal, get_args

from services.demo.task import ANSWER_PATTERN
from services.spec import RewardTerm, Switch

Arm = Literal["self_certainty", "verifiable", "both", "random", "format", "plurality", "intuitor_then_grpo"]
ARMS: tuple[Arm, ...] = get_args(Arm)
COMPARED: tuple[Arm, ...] = ("self_certainty", "verifiable", "both", "random")
"""What `rlif demo-all` runs unless it is told otherwise."""


def rewards(arm: Arm, seed: int = 0, steps: int = 100) -> list[RewardTerm]:
    """The reward terms of an arm. Self-certainty and exact match are measured in every arm, trained on where they are
    the arm's reward; in `both`, each is normalised inside its group and the two are added. `random` and
    `format` are controls: chance, and any answer at all in the demanded form. `plurality` rewards the answer that most
    of a group give; `intuitor_then_grpo` goes over from one to the other after half of the `steps`."""
    terms = [
        RewardTerm(name="self_certainty", weight=float(arm in ("self_certainty", "both"))),
        RewardTerm(name="exact_match", weight=float(arm in ("verifiable", "both")), params={"regex": ANSWER_PATTERN}),
    ]
    if arm == "random":
        return [*terms, RewardTerm(name="random", weight=1.0, params={"seed": seed})]
    if arm == "format":
        return [*terms, RewardTerm(name="format", weight=1.0, params={"regex": ANSWER_PATTERN, "match": "search"})]
    if arm == "plurality":
        params = {"answer": "regex", "regex": ANSWER_PATTERN}
        return [*terms, RewardTerm(name="majority_vote", weight=1.0, params=params)]
    if arm == "intuitor_then_grpo":
        half = max(1, steps // 2)
        first, then = (Switch(kind="switch", at=half, before=before, after=1 - before) for before in (1.0, 0.0))
        schedules = {"self_certainty": first, "exact_match": then}
        return [term.model_copy(update={"weight": 1.0, "schedule": schedules[term.name]}) for term in terms]
    return terms
