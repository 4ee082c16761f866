"""`self_certainty`: how far the model's next-token distributions are from uniform, on average over the completion.

SC = mean_t KL(U || p_t) = mean_t [ logsumexp(z_t) - mean_j z_tj - log V ], natural logarithm (arXiv 2505.19590).
"""

from typing import Literal

from pydantic import Field

from reward_server.reward import Context, Params, Reward
from reward_server.token_scores import Scoring
from services.api import RewardGroup
from services.contract import LOWEST_TEMPERATURE, Score


class SelfCertaintyParams(Params):
    temperature: float = Field(1.0, ge=LOWEST_TEMPERATURE, le=100, description="divides the logits first")
    preset: Literal["paper", "open_r1", "verl"] = Field("paper", description="the definition; see /v1/score")


def scoring(params: SelfCertaintyParams) -> Scoring:
    return Scoring(("self_certainty",), params.temperature, params.preset)


async def score(_group: RewardGroup, params: SelfCertaintyParams, context: Context) -> list[Score]:
    assert context.token_scores is not None
    found = await context.token_scores.read(scoring(params))
    return [item if isinstance(item, Score) else Score.of(item.scores["self_certainty"]) for item in found]


REWARD = Reward(
    name="self_certainty",
    description="Mean KL divergence from the uniform to the scorer's next-token distribution over the completion.",
    needs=("scorer",),
    range=(0.0, None),
    params=SelfCertaintyParams,
    score=score,
    scoring=scoring,
)
