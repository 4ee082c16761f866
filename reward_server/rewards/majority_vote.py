"""`majority_vote`: is the completion's answer the one that most of its group give?

1 for the modal answer, else 0 (TTRL, arXiv 2504.16084; the plurality vote of Intuitor's GRPO-PV). Answers are the same
when verified equal (`reward_server.rewards.answers`). Completions without an answer get 0 and never win; those whose
answer could not be read or compared are left out of the count.

Outcomes: `ok`, `no_answer`, `skipped` (a tie with `ties: skip`, or less than `min_share`), and the failures of single
answers: `timeout`, `error`, `unparsable`. Caveat: trained on for long, it ends in a constant answer (arXiv 2505.21444).
"""

from collections import Counter
from typing import Literal

from pydantic import Field

from reward_server.reward import Context, Reward
from reward_server.rewards.answers import Answer, AnswerParams, answers
from services.api import RewardGroup
from services.contract import Score


class MajorityVoteParams(AnswerParams):
    """`ties`: of answers that are equally frequent, `all` win, or the group says nothing (`skip`), or the one wins that
    occurs `first` in the group (what TTRL's code does; the result then depends on the order of the completions)."""

    ties: Literal["all", "skip", "first"] = "all"
    min_share: float = Field(0.0, ge=0, le=1, description="a mode with a smaller share of the group says nothing")


def vote(given: list[Answer], params: MajorityVoteParams) -> list[Score]:
    """One Score an answer; the share is of the completions whose answer is known, those that gave none included."""
    known = sum(answer.is_known for answer in given)
    counts = Counter(answer.cluster for answer in given if answer.cluster is not None)
    most = max(counts.values(), default=0)
    winners = [cluster for cluster, count in counts.items() if count == most]
    if most < params.min_share * known:
        detail = f"the most frequent answer has {most} of {known} votes, less than the share {params.min_share:g}"
        return [answer.skipped(detail) for answer in given]
    if len(winners) > 1 and params.ties == "skip":
        return [answer.skipped(f"{len(winners)} answers have {most} votes each") for answer in given]
    if params.ties == "first":
        winners = winners[:1]
    return [answer.score(float(answer.cluster in winners)) for answer in given]


async def score(group: RewardGroup, params: MajorityVoteParams, context: Context) -> list[Score]:
    return vote(await answers(group, params, context), params)


REWARD = Reward(
    name="majority_vote",
    description="1 when the completion gives the answer that most completions of its group give, else 0.",
    needs=("math-verify",),
    range=(0.0, 1.0),
    params=MajorityVoteParams,
    score=score,
)
