"""`margin`: how far the scorer's likeliest next token is ahead of the second, on average over the completion.

mean_t [ log p_(1) - log p_(2) ], or of the probabilities themselves: mean_t [ p_(1) - p_(2) ].

`last` or `span` average over those tokens alone, `top_fraction` over those of the widest margin. Outcomes: `ok`,
`skipped` (no tokens, or none in the span), `error` (the scorer cannot take the completion).
"""

from typing import Literal

from pydantic import Field

from reward_server.reward import Context, Reward
from reward_server.rewards.tokens import TokenMeanParams, score_tokens
from reward_server.token_scores import Scoring
from services.api import RewardGroup
from services.contract import Score

METRIC = {"logprobs": "margin", "probabilities": "probability_margin"}


class MarginParams(TokenMeanParams):
    between: Literal["logprobs", "probabilities"] = Field("logprobs", description="`probabilities` lies in 0 to 1")


def scoring(params: MarginParams) -> Scoring:
    return Scoring((METRIC[params.between],), params.temperature)


async def score(_group: RewardGroup, params: MarginParams, context: Context) -> list[Score]:
    return await score_tokens(scoring(params), params, context, params.mean)


REWARD = Reward(
    name="margin",
    description="Mean difference of the two largest log-probabilities (or probabilities) of the scorer.",
    needs=("scorer",),
    range=(0.0, None),
    params=MarginParams,
    score=score,
    scoring=scoring,
)
