"""Where the console looks: a run's Redis, its reward servers, and the folders of runs to compare it with."""

import asyncio
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from services.clients import RewardClient
from services.console.history import History
from services.console.samples import Samples
from services.queue import GroupQueue
from services.redis import connect
from services.startup import StartupError

MOST_HISTORIES = 8
"""Other runs whose steps stay in memory: those looked at last."""
PATIENCE_SECONDS = 2.0
"""How long a page waits for a redis that is away."""


@dataclass(frozen=True)
class Source:
    """`reward_urls`: reward servers that shade tokens and hold the spec (all of them are given a new one). `run_dir`:
    the run's own folder where it can be seen, whose neighbours' curves may be laid over this run's."""

    redis_url: str
    run_id: str
    reward_urls: tuple[str, ...] = ()
    run_dir: Path | None = None


@dataclass
class Desk:
    """What the pages of one process share. `histories`: of runs in the same redis, by name, the last used last.
    `reading`: what brings one up to date; whoever asks meanwhile shares its result."""

    source: Source
    redis: Any
    queue: GroupQueue
    samples: Samples
    rewards: list[RewardClient]
    histories: dict[str, History] = field(default_factory=dict)
    reading: dict[str, asyncio.Task[History]] = field(default_factory=dict)
    streams: int = 0
    """Pages that are being kept up to date."""

    @property
    def run_id(self) -> str:
        return self.source.run_id

    async def history(self, run_id: str | None = None) -> History:
        """The steps of a run (this one), up to date. Raises DeadlineExceeded."""
        name = run_id or self.run_id
        task = self.reading.get(name)
        if task is None:
            task = self.reading[name] = asyncio.create_task(self._read(name))
            task.add_done_callback(lambda _: self.reading.pop(name))
        return await asyncio.shield(task)

    async def _read(self, name: str) -> History:
        found = self.histories.pop(name, None) or History(self.redis, name)
        self.histories[name] = found
        others = [other for other in self.histories if other != self.run_id]
        for other in others[:-MOST_HISTORIES]:
            del self.histories[other]
        await found.refresh()
        return found

    async def close(self) -> None:
        reading = list(self.reading.values())
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)
        for client in self.rewards:
            await client.close()
        await self.redis.aclose()


def sit_down(source: Source) -> Desk:
    """Tokens for the reward servers come from RLIF_API_TOKEN and RLIF_ADMIN_TOKEN. Raises StartupError: no URL."""
    tokens = (os.environ.get("RLIF_API_TOKEN") or None, os.environ.get("RLIF_ADMIN_TOKEN") or None)
    try:
        redis = connect(source.redis_url)
        rewards = [RewardClient(url, *tokens, retry_seconds=0) for url in source.reward_urls]
    except ValueError as error:
        raise StartupError(str(error)) from error
    queue = GroupQueue(redis, source.run_id, patience_seconds=PATIENCE_SECONDS)
    return Desk(source, redis, queue, Samples(redis, source.run_id), rewards)
