"""`certainty_weighted_vote`: does the completion give the answer that has the most certainty behind it?

Each completion votes for its answer with a weight that grows with the scorer's certainty of it, read off the one
scoring pass of the group. `weights: certainty` takes the certainty itself; `borda` takes (n - rank + 1) ** power, rank
1 being the most certain of n voters and equal ones sharing the mean of their ranks (Kang et al., arXiv 2502.18581).
With `top_share` only the most certain vote (DeepConf's filter, arXiv 2508.15260); the others' answers are judged all
the same.

`value: winner` is 1 for the answer of the greatest weight (all of them, when several have it), else 0; `share` is the
answer's share of all the weight.

Outcomes: `ok`, `no_answer` (value 0, and no vote), `skipped` (no vote has any weight, or the completion has no tokens),
and the failures of single answers and scores: `timeout`, `error`, `unparsable`.
"""

import asyncio
import math
from typing import Literal, Self

from pydantic import Field, model_validator

from reward_server.reward import Context, Reward
from reward_server.rewards.answers import Answer, AnswerParams, answers
from reward_server.token_scores import Scoring
from services.api import RewardGroup
from services.contract import LOWEST_TEMPERATURE, Score
from services.separation import borda_weights


class CertaintyWeightedVoteParams(AnswerParams):
    certainty: Literal["self_certainty", "mean_probability", "mean_logprob"] = "self_certainty"
    temperature: float = Field(1.0, ge=LOWEST_TEMPERATURE, le=100, description="divides the scorer's logits first")
    weights: Literal["certainty", "borda"] = "certainty"
    power: float = Field(1.0, ge=0, le=100, description="of the ranks, with `weights: borda`; 0 counts heads")
    top_share: float = Field(1.0, gt=0, le=1, description="only this share of the answers, the most certain, votes")
    value: Literal["winner", "share"] = "winner"

    @model_validator(mode="after")
    def weights_are_positive(self) -> Self:
        if self.weights == "certainty" and self.certainty == "mean_logprob":
            raise ValueError("certainty: mean_logprob is negative and cannot weigh votes; use `weights: borda` with it")
        return self


def weights(certainties: list[float], params: CertaintyWeightedVoteParams) -> list[float]:
    """The weight of each voter's vote, 0 for those that are filtered out. Equal certainties weigh the same."""
    kept = math.ceil(params.top_share * len(certainties))
    least = sorted(certainties, reverse=True)[kept - 1] if kept else 0.0
    borda = params.weights == "borda"
    found = borda_weights(certainties, params.power).tolist() if borda else certainties
    return [weight if value >= least else 0.0 for weight, value in zip(found, certainties, strict=True)]


def vote(given: list[Answer], certainties: list[float | None], params: CertaintyWeightedVoteParams) -> list[Score]:
    """`certainties` are none where a completion has none: it casts no vote, but its answer is judged."""
    voters = [
        (answer.cluster, certainty)
        for answer, certainty in zip(given, certainties, strict=True)
        if answer.cluster is not None and certainty is not None
    ]
    cast: dict[int, list[float]] = {}
    found = weights([certainty for _, certainty in voters], params)
    for (cluster, _), weight in zip(voters, found, strict=True):
        cast.setdefault(cluster, []).append(weight)
    sums = {cluster: math.fsum(votes) for cluster, votes in cast.items()}
    total, most = math.fsum(found), max(sums.values(), default=0.0)
    if total <= 0.0 and any(answer.cluster is not None for answer in given):
        return [answer.skipped("no vote has any weight") for answer in given]

    def value(cluster: int | None) -> float:
        weight = 0.0 if cluster is None else sums.get(cluster, 0.0)
        if params.value == "winner":
            return float(weight == most)
        return weight / total if total else 0.0

    return [answer.score(value(answer.cluster)) for answer in given]


def scoring(params: CertaintyWeightedVoteParams) -> Scoring:
    return Scoring((params.certainty,), params.temperature)


async def score(group: RewardGroup, params: CertaintyWeightedVoteParams, context: Context) -> list[Score]:
    assert context.token_scores is not None
    given, scored = await asyncio.gather(answers(group, params, context), context.token_scores.read(scoring(params)))
    certainties = [None if isinstance(item, Score) else item.scores[params.certainty] for item in scored]
    sound = [value if value is not None and math.isfinite(value) else None for value in certainties]
    found = vote(given, sound, params)
    return [item if isinstance(item, Score) else judged for item, judged in zip(scored, found, strict=True)]


REWARD = Reward(
    name="certainty_weighted_vote",
    description="1 when the completion gives the answer with the most of the scorer's certainty behind it, else 0.",
    needs=("scorer", "math-verify"),
    range=(0.0, 1.0),
    params=CertaintyWeightedVoteParams,
    score=score,
    scoring=scoring,
)
