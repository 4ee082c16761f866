"""`varentropy`: minus the mean variance of log p under the scorer's next-token distributions p.

-mean_t sum_j p_j (log p_j + H(p))^2, natural logarithm. The variance is 0 where the model is sure of one token and
where it is undecided between equally likely ones, and large where some tokens are much likelier than other possible
ones: a positive weight rewards the former. `POST /v1/score` gives the variance itself.

`last` or `span` average over those tokens alone, `top_fraction` over those where it is largest. Outcomes: `ok`,
`skipped` (no tokens, or none in the span), `error` (the scorer cannot take the completion).
"""

from reward_server.reward import Context, Reward
from reward_server.rewards.tokens import TokenMeanParams, score_tokens
from reward_server.token_scores import Scoring
from services.api import RewardGroup
from services.contract import Score


def scoring(params: TokenMeanParams) -> Scoring:
    return Scoring(("varentropy",), params.temperature)


async def score(_group: RewardGroup, params: TokenMeanParams, context: Context) -> list[Score]:
    return await score_tokens(scoring(params), params, context, lambda variances: -params.mean(variances))


REWARD = Reward(
    name="varentropy",
    description="Minus the mean variance of log p under the scorer's next-token distributions.",
    needs=("scorer",),
    range=(None, 0.0),
    params=TokenMeanParams,
    score=score,
    scoring=scoring,
)
