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
    """What the pages of one process share. `histories`: of runs in the same redis, by name."""

    source: Source
    redis: Any
    queue: GroupQueue
    samples: Samples
    rewards: list[RewardClient]
    histories: dict[str, History] = field(default_factory=dict)
    reading: asyncio.Lock = field(default_factory=asyncio.Lock)
    streams: int = 0
    """Pages that are being kept up to date."""

    @property
    def run_id(self) -> str:
        return self.source.run_id

    async def history(self, run_id: str | None = None) -> History:
        """The steps of a run (this one), up to date. Raises DeadlineExceeded."""
        name = run_id or self.run_id
        async with self.reading:
            found = self.histories.setdefault(name, History(self.redis, name))
            await found.refresh()
        return found

    async def close(self) -> None:
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
