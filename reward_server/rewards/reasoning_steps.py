"""`reasoning_steps`: does the completion look like a step-by-step answer?

min(1, count / target), counting `Step 1:`, numbered and bulleted lines, and the openers `First,` `Second,` `Next,`
`Finally,`: open-r1's reasoning steps reward.

Outcomes: `ok`. Caveat: it counts marks, not reasoning; three bullets with nothing in them score 1.
"""

import asyncio
import re

from pydantic import Field

from reward_server.reward import Context, Params, Reward
from services.api import RewardGroup
from services.contract import Score

MARKS = re.compile(
    r"^[ \t]{0,16}(?:[Ss]tep[ ]\d{1,6}\b|\d{1,6}[.)]\s|[-*\u2022][ ])"
    r"|\bStep[ ]\d{1,6}:|\b(?:First|Second|Third|Next|Finally),",
    re.MULTILINE,
)


class ReasoningStepsParams(Params):
    target: int = Field(3, ge=1, le=1000, description="this many steps give 1")


async def score(group: RewardGroup, params: ReasoningStepsParams, _context: Context) -> list[Score]:
    def share(text: str) -> float:
        return min(1.0, len(MARKS.findall(text)) / params.target)

    return await asyncio.to_thread(lambda: [Score.of(share(completion.text)) for completion in group.completions])


REWARD = Reward(
    name="reasoning_steps",
    description="min(1, count of step marks / `target`).",
    needs=(),
    range=(0.0, 1.0),
    params=ReasoningStepsParams,
    score=score,
)
