"""`repetition`: a penalty for saying the same again.

(1 - distinct / all n-grams) * max_penalty, over lower-case words (or characters); 0 for a completion below n of them.
The repetition penalty of open-r1 (after Yeo et al., arXiv 2502.03373).

Outcomes: `ok`. Caveat: long texts repeat n-grams innocently, so the penalty also leans towards short answers.
"""

import asyncio
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from reward_server.reward import Context, Params, Reward
from services.api import RewardGroup
from services.contract import Score


class RepetitionParams(Params):
    n: int = Field(3, ge=1, le=64, description="length of the n-grams")
    unit: Literal["words", "characters"] = Field(
        "words", description="what n-grams are made of; `characters` for scripts that put no blanks between words"
    )
    max_penalty: float = Field(-1.0, le=0, description="what endless repetition comes to")


def penalty(text: str, n: int, max_penalty: float, unit: Literal["words", "characters"] = "words") -> float:
    """Words are split at blanks; characters leave blanks out."""
    words = text.lower().split()
    units: Sequence[str] = words if unit == "words" else "".join(words)
    total = len(units) - n + 1
    if total < 1:
        return 0.0
    distinct = len({tuple(units[start : start + n]) for start in range(total)})
    return (1.0 - distinct / total) * max_penalty


async def score(group: RewardGroup, params: RepetitionParams, _context: Context) -> list[Score]:
    def all_penalties() -> list[Score]:
        return [Score.of(penalty(item.text, params.n, params.max_penalty, params.unit)) for item in group.completions]

    return await asyncio.to_thread(all_penalties)


REWARD = Reward(
    name="repetition",
    description="`max_penalty` times the share of n-grams that were said before; 0 when nothing is repeated.",
    needs=(),
    range=(None, 0.0),
    params=RepetitionParams,
    score=score,
)
