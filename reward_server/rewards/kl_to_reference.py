"""`kl_to_reference`: minus the mean KL divergence of the scorer's next-token distributions from a reference model's.

-mean_t sum_j p_j (log p_j - log q_j) over the whole vocabulary (no estimate from the sampled token), p being the
scorer's distribution and q the reference model's, both at `temperature`: a positive weight keeps the scorer's model
near the reference. `POST /v1/score` gives the divergence itself. The reference model must have the scorer's vocabulary.

`last` or `span` average over those tokens alone, `top_fraction` over those where it is largest. Outcomes: `ok`,
`skipped` (no tokens, or none in the span), `error` (the scorer cannot take the completion).
"""

from reward_server.reward import Context, Reward
from reward_server.rewards.tokens import TokenMeanParams, score_tokens
from reward_server.token_scores import Scoring
from services.api import RewardGroup
from services.contract import Score


def scoring(params: TokenMeanParams) -> Scoring:
    return Scoring(("kl_to_reference",), params.temperature)


async def score(_group: RewardGroup, params: TokenMeanParams, context: Context) -> list[Score]:
    return await score_tokens(scoring(params), params, context, lambda divergences: -params.mean(divergences))


REWARD = Reward(
    name="kl_to_reference",
    description="Minus the mean KL divergence of the scorer's next-token distributions from a reference model's.",
    needs=("scorer", "reference_model"),
    range=(None, 0.0),
    params=TokenMeanParams,
    score=score,
    scoring=scoring,
)
