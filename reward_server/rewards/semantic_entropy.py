"""`semantic_entropy`: how much the answers of a group disagree. The same number for each of its completions.

H = -sum_c p_c log p_c over the clusters of equal answers, natural logarithm (EMPO, arXiv 2504.05812; SEED-GRPO,
2505.12346). p_c is the share of the completions whose answer is known; one that gave no answer agrees with nobody and
is a cluster of its own. 0: all agree; log G: no two do.

A number that all of a group share has no advantage in it. Measure it (weight 0), and let it open the gate of another
reward: `gate: {reward: semantic_entropy, at_least: 0.2, at_most: 1.5}`.

Outcomes: `ok`, and the failures of single answers: `timeout`, `error`, `unparsable`.
"""

import math
from collections import Counter

from pydantic import Field

from reward_server.reward import Context, Reward
from reward_server.rewards.answers import Answer, AnswerParams, answers
from services.api import RewardGroup
from services.contract import Score


class SemanticEntropyParams(AnswerParams):
    relative: bool = Field(False, description="divide by log G, so that it ranges from 0 to 1 for any group size")


def entropy(given: list[Answer]) -> tuple[float, int]:
    """(H, the number of completions whose answer is known); H is 0 when there is none."""
    known = sum(answer.is_known for answer in given)
    counts = list(Counter(answer.cluster for answer in given if answer.cluster is not None).values())
    counts += [1] * (known - sum(counts))
    return math.fsum(count / known * math.log(known / count) for count in counts), known


async def score(group: RewardGroup, params: SemanticEntropyParams, context: Context) -> list[Score]:
    given = await answers(group, params, context)
    value, known = entropy(given)
    if params.relative and known > 1:
        value /= math.log(known)
    return [answer.failure or Score.of(value, detail=answer.text[:200], seconds=answer.seconds) for answer in given]


REWARD = Reward(
    name="semantic_entropy",
    description="Entropy of the answers of the group, by clusters of equal ones: a measurement, and a gate for others.",
    needs=("math-verify",),
    range=(0.0, None),
    params=SemanticEntropyParams,
    score=score,
)
