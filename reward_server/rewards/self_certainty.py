"""`self_certainty`: how far the model's next-token distributions are from uniform, on average over the completion.

SC = mean_t KL(U || p_t) = mean_t [ logsumexp(z_t) - mean_j z_tj - log V ] (natural logarithm), Intuitor, arXiv 2505.19590.
"""

from typing import Literal

from pydantic import Field

from reward_server.reward import Context, Params, Reward
from services.api import RewardGroup
from services.contract import Score


class SelfCertaintyParams(Params):
    temperature: float = Field(1.0, gt=0, le=100, description="divides the logits first")
    preset: Literal["paper", "open_r1", "verl"] = Field("paper", description="the definition; see /v1/score")


async def score(group: RewardGroup, params: SelfCertaintyParams, context: Context) -> list[Score]:
    raise NotImplementedError


REWARD = Reward(
    name="self_certainty",
    description="Mean KL divergence from the uniform to the scorer's next-token distribution over the completion.",
    needs=("scorer",),
    range=(0.0, None),
    params=SelfCertaintyParams,
    score=score,
)
