"""A run's pause, in Redis: the orchestrator admits no new groups while it lasts. Those on their way are finished and
trained; then the trainer waits, for as long as it takes."""

import time
from typing import Any

from redis.asyncio import Redis

from services.contract import Wire
from services.keys import Keys


class Pause(Wire):
    """`at`: Unix seconds at which it was last set or lifted, 0 when it never was."""

    paused: bool = False
    at: float = 0.0

    def excuses(self, seconds: float) -> bool:
        """Whether nothing need have come in so many seconds: the run is paused, or was meanwhile."""
        return self.paused or time.time() - self.at < seconds


async def read(redis: Redis, run_id: str) -> Pause:
    answer: Any = await redis.get(Keys(run_id).pause)
    return Pause() if answer is None else Pause.model_validate_json(answer)


async def put(redis: Redis, run_id: str, paused: bool) -> None:
    """Set or lift it; doing so twice changes nothing but the time."""
    await redis.set(Keys(run_id).pause, Pause(paused=paused, at=time.time()).model_dump_json())
