"""`inverted`: another reward turned upside down. The control arm that rewards what is wrong.

low + high - x, x being the value of the term `of` (its key in the spec; with weight 0 it is only measured). Spurious
Rewards (arXiv 2506.10947) calls it the incorrect reward when x is accuracy: what gains from both x and its inverse is
not gaining from x.

Outcomes: `ok`, or, where the other term failed, its failure.
"""

from pydantic import Field, model_validator

from reward_server.reward import Context, Params, Reward
from services.api import RewardGroup
from services.contract import Score


class InvertedParams(Params):
    of: str = Field(min_length=1, max_length=64, description="key of the other term", examples=["math_verify"])
    low: float = Field(0.0, ge=-1e6, le=1e6, description="becomes `high`")
    high: float = Field(1.0, ge=-1e6, le=1e6, description="becomes `low`")

    @model_validator(mode="after")
    def is_a_range(self) -> "InvertedParams":
        if self.low > self.high:
            raise ValueError(f"low ({self.low}) is greater than high ({self.high})")
        return self


async def score(_group: RewardGroup, params: InvertedParams, context: Context) -> list[Score]:
    found = await context.scores_of(params.of)
    ends = params.low + params.high
    return [item if item.value is None else Score.of(ends - item.value) for item in found]


REWARD = Reward(
    name="inverted",
    description="`low` + `high` - the value of another term: a control.",
    needs=(),
    range=(None, None),
    params=InvertedParams,
    score=score,
    depends=lambda params: (params.of,),
)
