"""`format`: does the completion have the demanded shape?

1 when the regular expression matches (Python's `re`, run in a process that can be killed), else 0. The shape
`think_answer` is open-r1's format reward: `<think>..</think><answer>..</answer>`, and nothing besides.

Outcomes: `ok`, `timeout` (the pattern took too long on this text; e.g. `(a+)+b` does). Caveat: a control as much as a
reward: models have gained from it alone (Spurious Rewards, arXiv 2506.10947).
"""

import asyncio
from typing import Literal

from pydantic import Field

from reward_server.reward import Context, Params, Reward
from reward_server.rewards import patterns
from services.api import RewardGroup
from services.contract import Outcome, Score

SHAPES = {
    "think_answer": r"\s*<think>\n?.*?\n?</think>\s*<answer>\n?.*?\n?</answer>\s*",
    "boxed": r".*\\boxed\s*\{.+\}.*",
}


class FormatParams(Params):
    """`regex` wins over `shape`. `.` matches newlines too."""

    shape: Literal["think_answer", "boxed"] = "think_answer"
    regex: patterns.Pattern | None = None
    match: Literal["fullmatch", "search"] = Field("fullmatch", description="the whole completion, or some part of it")


async def score(group: RewardGroup, params: FormatParams, context: Context) -> list[Score]:
    pattern = params.regex or SHAPES[params.shape]

    async def one(text: str) -> Score:
        verdict = await patterns.match(pattern, text, params.match, context)
        if verdict.status != "ok":
            return Score.failed(Outcome(verdict.status), verdict.detail, verdict.seconds)
        return Score.of(float(verdict.result["found"]), seconds=verdict.seconds)

    return list(await asyncio.gather(*(one(completion.text) for completion in group.completions)))


REWARD = Reward(
    name="format",
    description="1 when the completion matches a regular expression (default: `<think>..</think><answer>..</answer>`).",
    needs=(),
    range=(0.0, 1.0),
    params=FormatParams,
    score=score,
)
