"""Whether reference answers satisfy their own reward: said by a completion, each must be judged correct.

One that is not (math-verify cannot read it, or does not find it equal to itself) would make a wrong answer of every
right one.
"""

import asyncio
import time
from collections.abc import Callable, Sequence

from reward_server.reward import Context
from reward_server.rewards import REWARDS, math_verify
from reward_server.workers import Limits, Turn, WorkerPool
from services.api import CompletionText, RewardGroup
from services.contract import Outcome, Reference, Score, Task

AS_SAID = {"math_verify": "\\boxed{{{}}}", "code_output": "[ANSWER]{}[/ANSWER]"}
"""How a completion gives an answer to each reward; any other takes the bare text."""
DEADLINE_SECONDS = 120.0
AT_ONCE = 16


async def check(
    references: Sequence[Reference], reward: str, workers: int = 2, checked: Callable[[], None] = lambda: None
) -> list[Score]:
    """What `reward` says of each reference's own answer, in killable processes; `checked` is called after each."""
    scoring = REWARDS[reward]
    # Nobody else waits: an answer that takes long may wait for the other long ones.
    warm_up = [math_verify.WARM_UP] if reward == "math_verify" else []
    pool = WorkerPool(workers, Limits(slow_wait_seconds=DEADLINE_SECONDS), warm_up)
    places = asyncio.Semaphore(AT_ONCE)

    async def one(reference: Reference) -> Score:
        text = AS_SAID.get(reward, "{}").format(reference.answer)
        task = Task(task_id="gold", prompt="", reference=reference)
        group = RewardGroup(group_id="gold", task=task, completions=[CompletionText(text=text)])
        async with places:
            context = Context(pool, time.monotonic() + DEADLINE_SECONDS, Turn())
            (score,) = await scoring.score(group, scoring.params(), context)
        checked()
        return score

    pool.start()
    try:
        return list(await asyncio.gather(*map(one, references)))
    finally:
        await pool.stop()


def is_right(score: Score) -> bool:
    return score.outcome is Outcome.correct
