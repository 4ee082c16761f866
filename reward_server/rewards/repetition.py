"""`repetition`: a penalty for saying the same again."""

import asyncio

from pydantic import Field

from reward_server.reward import Context, Params, Reward
from services.api import RewardGroup
from services.contract import Score


class RepetitionParams(Params):
    n: int = Field(3, ge=1, le=64, description="length of the n-grams, in words")
    max_penalty: float = Field(-1.0, le=0, description="what endless repetition comes to")


def penalty(text: str, n: int, max_penalty: float) -> float:
    """(1 - distinct / all n-grams) * max_penalty over lower-case words split at blanks; 0 below n words."""
    words = text.lower().split()
    total = len(words) - n + 1
    if total < 1:
        return 0.0
    distinct = len({tuple(words[start : start + n]) for start in range(total)})
    return (1.0 - distinct / total) * max_penalty


async def score(group: RewardGroup, params: RepetitionParams, _context: Context) -> list[Score]:
    def all_penalties() -> list[Score]:
        return [Score.of(penalty(item.text, params.n, params.max_penalty)) for item in group.completions]

    return await asyncio.to_thread(all_penalties)


REWARD = Reward(
    name="repetition",
    description="`max_penalty` times the share of n-grams that were said before; 0 when nothing is repeated.",
    needs=(),
    range=(None, 0.0),
    params=RepetitionParams,
    score=score,
)
