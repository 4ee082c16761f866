"""`self_certainty`: how far the model's next-token distributions are from uniform, on average over the completion.

SC = mean_t KL(U || p_t) = mean_t [ logsumexp(z_t) - mean_j z_tj - log V ], natural logarithm (arXiv 2505.19590).

`last` or `span` average over those tokens alone, `top_fraction` over the most certain of them. Outcomes: `ok`,
`skipped` (no tokens, or none in the span), `error` (the scorer cannot take the completion).
"""

from typing import Literal

from pydantic import Field

from reward_server.reward import Context, Reward
from reward_server.rewards.tokens import TokenMeanParams, score_tokens
from reward_server.token_scores import Scoring
from services.api import RewardGroup
from services.contract import Score


class SelfCertaintyParams(TokenMeanParams):
    preset: Literal["paper", "open_r1", "verl"] = Field(
        "paper",
        description="KL(U || p), or as open-r1 (unshifted, no log V, no temperature) or verl (no log V) compute it",
    )


def scoring(params: SelfCertaintyParams) -> Scoring:
    return Scoring(("self_certainty",), params.temperature, params.preset)


async def score(_group: RewardGroup, params: SelfCertaintyParams, context: Context) -> list[Score]:
    return await score_tokens(scoring(params), params, context, params.mean)


REWARD = Reward(
    name="self_certainty",
    description="Mean KL divergence from the uniform to the scorer's next-token distribution over the completion.",
    needs=("scorer",),
    range=(0.0, None),
    params=SelfCertaintyParams,
    score=score,
    scoring=scoring,
)
