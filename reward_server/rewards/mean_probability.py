"""`mean_probability`: the mean probability of the completion's tokens by the scorer, (1/T) sum_t p_t(y_t).

Unlike the mean log-probability, a few very unlikely tokens do not outweigh the rest (RLPR's argument, arXiv
2506.18254). `last` or `span` average over those tokens alone, `top_fraction` over the likeliest of them. Outcomes:
`ok`, `skipped` (no tokens, or none in the span), `error` (the scorer cannot take the completion).
"""

from reward_server.reward import Context, Reward
from reward_server.rewards.tokens import TokenMeanParams, score_tokens
from reward_server.token_scores import Scoring
from services.api import RewardGroup
from services.contract import Score


def scoring(params: TokenMeanParams) -> Scoring:
    return Scoring(("mean_probability",), params.temperature)


async def score(_group: RewardGroup, params: TokenMeanParams, context: Context) -> list[Score]:
    return await score_tokens(scoring(params), params, context, params.mean)


REWARD = Reward(
    name="mean_probability",
    description="Mean probability of the completion's tokens by the scorer.",
    needs=("scorer",),
    range=(0.0, 1.0),
    params=TokenMeanParams,
    score=score,
    scoring=scoring,
)
