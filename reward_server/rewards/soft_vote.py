"""`soft_vote`: the share of the group that gives the completion's answer.

|cluster of the answer| / G (EMPO, arXiv 2504.05812), G being the completions whose answer is known. EMPO rewards only
groups of middling disagreement, low < H < high: `min_entropy` and `max_entropy` bound the group's semantic entropy
(see `semantic_entropy`), outside of which the group says nothing.

Outcomes: `ok`, `no_answer` (value 0), `skipped` (entropy out of bounds), and the failures of single answers: `timeout`,
`error`, `unparsable`.
"""

from collections import Counter
from typing import Self

from pydantic import Field, model_validator

from reward_server.reward import Context, Reward
from reward_server.rewards.answers import Answer, AnswerParams, answers
from reward_server.rewards.semantic_entropy import entropy
from services.api import RewardGroup
from services.contract import Score


class SoftVoteParams(AnswerParams):
    min_entropy: float | None = Field(None, ge=0, description="nats; groups below it say nothing")
    max_entropy: float | None = Field(None, ge=0, description="nats; groups above it say nothing")

    @model_validator(mode="after")
    def bounds_are_a_range(self) -> Self:
        low, high = self.min_entropy, self.max_entropy
        if low is not None and high is not None and low > high:
            raise ValueError(f"min_entropy ({low}) is greater than max_entropy ({high})")
        return self


def vote(given: list[Answer], params: SoftVoteParams) -> list[Score]:
    counts = Counter(answer.cluster for answer in given)
    found, known = entropy(given)
    low, high = params.min_entropy, params.max_entropy
    if (low is not None and found < low) or (high is not None and found > high):
        bounds = f"{'0' if low is None else f'{low:g}'} to {'any' if high is None else f'{high:g}'}"
        return [answer.skipped(f"the group's entropy is {found:.4g}, not within {bounds}") for answer in given]
    return [answer.score(counts[answer.cluster] / max(1, known)) for answer in given]


async def score(group: RewardGroup, params: SoftVoteParams, context: Context) -> list[Score]:
    return vote(await answers(group, params, context), params)


REWARD = Reward(
    name="soft_vote",
    description="The share of the group's completions that give the same answer as this one.",
    needs=("math-verify",),
    range=(0.0, 1.0),
    params=SoftVoteParams,
    score=score,
)
