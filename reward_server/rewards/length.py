"""`length`: how long the completion is. A control, and a way to ask for shorter or longer answers.

count / scale, cut at `limit`. Give it a negative weight to ask for shorter answers. Outcomes: `ok`, `error` (tokens are
to be counted and the completion has no token_ids).
"""

from typing import Literal

from pydantic import Field

from reward_server.reward import Context, Params, Reward
from services.api import RewardGroup
from services.contract import Outcome, Score


class LengthParams(Params):
    """The value is count / scale, at most `limit`. A negative weight in the spec asks for shorter answers."""

    unit: Literal["tokens", "characters"] = "characters"
    scale: float = Field(1000.0, gt=0, description="this many tokens or characters give 1")
    limit: float | None = Field(None, gt=0, description="the largest value; none for no limit")


async def score(group: RewardGroup, params: LengthParams, _context: Context) -> list[Score]:
    scores = []
    for completion in group.completions:
        counted = completion.text if params.unit == "characters" else completion.token_ids
        if counted is None:
            scores.append(Score.failed(Outcome.error, "unit `tokens` needs the completion's token_ids"))
            continue
        value = len(counted) / params.scale
        scores.append(Score.of(value if params.limit is None else min(value, params.limit)))
    return scores


REWARD = Reward(
    name="length",
    description="The completion's length in characters or tokens, divided by `scale`.",
    needs=(),
    range=(0.0, None),
    params=LengthParams,
    score=score,
)
