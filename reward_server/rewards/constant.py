"""`constant`: the same for every completion. A control, and a fixed offset in a raw sum.

Outcomes: `ok`. Inside a group all values are equal, so every normalisation but `none` makes it 0: a run on it alone
shows what happens without any reward.
"""

from pydantic import Field

from reward_server.reward import Context, Params, Reward
from services.api import RewardGroup
from services.contract import Score


class ConstantParams(Params):
    value: float = Field(1.0, ge=-1e6, le=1e6)


async def score(group: RewardGroup, params: ConstantParams, _context: Context) -> list[Score]:
    return [Score.of(params.value)] * len(group.completions)


REWARD = Reward(
    name="constant",
    description="`value` for every completion: a control.",
    needs=(),
    range=(None, None),
    params=ConstantParams,
    score=score,
)
