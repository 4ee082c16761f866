"""`token_entropy`: minus the mean entropy of the scorer's next-token distributions.

A positive weight rewards certainty: -mean_t H(p_t), H(p) = -sum_j p_j log p_j, natural logarithm: RENT's reward (arXiv
2505.22660) and EM-RL-token's (arXiv 2505.15134). `POST /v1/score` gives the entropy itself. For a bonus on entropy,
give it a negative weight.

`last` or `span` average over those tokens alone, `top_fraction` over those of the highest entropy. Outcomes: `ok`,
`skipped` (no tokens, or none in the span), `error` (the scorer cannot take the completion).
"""

from reward_server.reward import Context, Reward
from reward_server.rewards.tokens import TokenMeanParams, score_tokens
from reward_server.token_scores import Scoring
from services.api import RewardGroup
from services.contract import Score


def scoring(params: TokenMeanParams) -> Scoring:
    return Scoring(("token_entropy",), params.temperature)


async def score(_group: RewardGroup, params: TokenMeanParams, context: Context) -> list[Score]:
    return await score_tokens(scoring(params), params, context, lambda entropies: -params.mean(entropies))


REWARD = Reward(
    name="token_entropy",
    description="Minus the mean entropy of the scorer's next-token distributions: higher is more certain.",
    needs=("scorer",),
    range=(None, 0.0),
    params=TokenMeanParams,
    score=score,
    scoring=scoring,
)
