"""What the orchestrator knows of the run (read from Redis as it changes), and what it tells of itself."""

import asyncio
import bisect
import logging
import os
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import orjson
from prometheus_client import Counter, Gauge, Histogram

from services import pause
from services.contract import Group, ScoredGroup, Version
from services.keys import Keys
from services.queue import Depth, GroupQueue
from services.redis import insist
from services.weights.pointer import Heartbeat, heartbeats, newest_version

log = logging.getLogger(__name__)

IN_FLIGHT = Gauge("rlif_orchestrator_groups_in_flight", "Groups being generated or scored")
GROUPS = Counter("rlif_orchestrator_groups_total", "Groups by what became of them", ["outcome"])
STALENESS = Histogram(
    "rlif_orchestrator_staleness_versions",
    "Weight versions published since the one that made a group, when it was pushed",
    buckets=(0, 1, 2, 3, 4, 6, 8, 12, 16),
)
SECONDS = Histogram(
    "rlif_orchestrator_call_seconds",
    "Time of one call to a server, failing over included",
    ["service"],
    buckets=(0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600),
)
LAG = Gauge(
    "rlif_weight_lag_versions", "Published weight versions that a replica does not serve yet", ["service", "replica"]
)
TOKENS = Counter("rlif_orchestrator_completion_tokens_total", "Completion tokens pushed")

SPEED_SECONDS = 30.0
"""Tokens and groups per second are means over this long."""
STATUS_SECONDS = 1.0


class RunFailed(Exception):
    """The run cannot go on; the message says why in one line."""


def made_by(group: Group) -> Version:
    """The oldest version that made any token of the group."""
    return min(completion.weight_version for completion in group.completions)


def newest_of(group: Group) -> Version:
    """The newest version that made any token of the group."""
    spans = (span.weight_version for completion in group.completions for span in completion.version_spans)
    return max([*(completion.weight_version for completion in group.completions), *spans])


def lag(newest: Version | None, served: Version | None) -> int:
    """Versions that `served` (none: the base model) is behind; at least 1 when it is of an outlived lineage."""
    if newest is None or (served is not None and served >= newest):
        return 0
    return max(1, newest.version - (served.version if served else -1))


@dataclass
class Tally:
    """What this process did. `buried_in_a_row` counts groups given up since the last one that was pushed."""

    state: str = "starting"
    pushed: int = 0
    buried: int = 0
    left_out: int = 0
    buried_in_a_row: int = 0
    in_flight: int = 0
    pushed_at: float = field(default_factory=time.monotonic)
    _recent: deque[tuple[float, int]] = field(default_factory=deque)

    def note_pushed(self, group: ScoredGroup, version: Version) -> None:
        tokens = sum(len(completion.token_ids) for completion in group.completions)
        GROUPS.labels("pushed").inc()
        TOKENS.inc(tokens)
        STALENESS.observe(max(0, version.version - made_by(group).version))
        self.pushed += 1
        self.buried_in_a_row = 0
        self.pushed_at = time.monotonic()
        self._recent.append((self.pushed_at, tokens))

    def note_in_flight(self, change: int) -> None:
        self.in_flight += change
        IN_FLIGHT.set(self.in_flight)

    @property
    def tokens_per_second(self) -> float:
        return sum(tokens for _, tokens in self._lately()) / SPEED_SECONDS

    @property
    def groups_per_second(self) -> float:
        return len(self._lately()) / SPEED_SECONDS

    def _lately(self) -> list[tuple[float, int]]:
        """Groups pushed within SPEED_SECONDS: when, and their tokens."""
        now = time.monotonic()
        while self._recent and self._recent[0][0] < now - SPEED_SECONDS:
            self._recent.popleft()
        return list(self._recent)


class Watch:
    """The run as Redis shows it: newest weights, lineage, queue, followers, the trainer's status; `dead` groups (by
    index); the `floor`, the lowest lineage whose groups count. `retried` are all dead groups that were to be made
    again, `again` those of them that come later than their place in the order: not the ones that were made before the
    order began. `gone` are the places in the order that nothing is trained in: of dead groups, of those left out, and
    of those that come later. `paused_at` is when the run was last seen paused.

    `wake` is set whenever it looked, so that its owner looks too. Before the first publication `version` is none.
    """

    def __init__(self, redis: Any, queue: GroupQueue, poll_seconds: float, tally: Tally, wake: asyncio.Event):
        self.redis, self.queue, self.tally, self.wake = redis, queue, tally, wake
        self.keys = Keys(queue.run_id)
        self.poll_seconds = poll_seconds
        self.version: Version | None = None
        self.version_at = time.monotonic()
        self.lineage = 0
        self.depth = Depth(0, 0, 0, 0.0)
        self.floor = 0
        self.dead: list[int] = []
        self.gone: list[int] = []
        self.retried: list[int] = []
        self.again: list[int] = []
        self._unmade: list[int] = []
        self._retried_before = 0
        self.paused = False
        self.paused_at = 0.0
        self.followers: list[Heartbeat] = []
        self.trainer: dict[str, Any] = {}
        self.extra: dict[str, Any] = {}
        self._gone_counts = (-1, -1, -1)
        self._lagging: set[tuple[str, str]] = set()
        self._told = self._heard = 0.0

    def dead_below(self, index: int) -> int:
        """Groups of a lower index that will never be trained."""
        return bisect.bisect_left(self.gone, index)

    async def begin_again(self, retried: int, unmade: list[int]) -> None:
        """The order begins anew: of the first `retried` groups only the `unmade` ones still come later."""
        self._retried_before, self._unmade = retried, unmade
        self._gone_counts = (-1, -1, -1)
        await self.refresh()

    async def refresh(self) -> None:
        """Read everything once. Raises DeadlineExceeded (Redis stayed away) and RunFailed (it lost its data)."""
        run_id = self.keys.run_id
        newest, lineage, floor, trainer, self.followers, paused = await insist(
            self._read, f"run {run_id}: follow the run", self.queue.patience_seconds
        )
        if newest is None and self.version is not None:
            raise RunFailed(f"redis lost the run's data: it knew weights {self.version} and now knows none")
        if newest is not None and newest != self.version:
            log.info("weights %s are published", newest)
            self.version, self.version_at = newest, time.monotonic()
        self.lineage = max(int(lineage or 0), self.version.lineage if self.version else 0)
        self.floor = int(floor or 0)
        self.trainer = orjson.loads(trainer) if trainer else {}
        self.paused = paused.paused
        if self.paused:
            self.paused_at = time.monotonic()
        retried = await self.queue.retried()
        self.depth = await self.queue.depth()
        counts = (self.depth.dead, self.depth.left_out, len(retried))
        if counts != self._gone_counts:
            dead = sorted({group.index for group in await self.queue.dead()})
            left_out = await self.queue.left_out()
            # All at once: who admits by them must not see some of them.
            self._gone_counts, self.retried, self.dead = counts, retried, dead
            self.again = [*self._unmade, *retried[self._retried_before :]]
            self.gone = sorted([*{*dead, *left_out}, *self.again])
        self._note_lags()
        self._heard = time.monotonic()
        self.wake.set()

    def _note_lags(self) -> None:
        """Replicas that are gone leave the metric, too."""
        found = {(beat.service, beat.replica): lag(self.version, beat.version) for beat in self.followers}
        for gone in self._lagging - found.keys():
            LAG.remove(*gone)
        for labels, versions in found.items():
            LAG.labels(*labels).set(versions)
        self._lagging = set(found)

    async def _read(self) -> tuple[Version | None, Any, Any, Any, list[Heartbeat], pause.Pause]:
        run_id = self.keys.run_id
        return (
            await newest_version(self.redis, run_id),
            await self.redis.get(self.keys.lineage),
            await self.redis.get(self.keys.floor),
            await self.redis.hget(self.keys.status, "trainer"),
            await heartbeats(self.redis, run_id),
            await pause.read(self.redis, run_id),
        )

    async def tell(self, at_once: bool = False) -> None:
        """Write the status into Redis, unless that was done within STATUS_SECONDS."""
        if not at_once and time.monotonic() - self._told < STATUS_SECONDS:
            return
        self._told = time.monotonic()
        status = orjson.dumps(self.status())

        async def write() -> Any:
            return await self.redis.hset(self.keys.status, "orchestrator", status)

        await insist(write, f"run {self.keys.run_id}: write the status", self.queue.patience_seconds)

    def status(self) -> dict[str, Any]:
        return {
            "state": self.tally.state,
            "pid": os.getpid(),
            "at": time.time(),
            "weight_version": str(self.version) if self.version else None,
            "groups_pushed": self.tally.pushed,
            "groups_buried": self.tally.buried,
            "groups_left_out": self.depth.left_out,
            "groups_in_flight": self.tally.in_flight,
            "tokens_per_second": round(self.tally.tokens_per_second, 1),
            "groups_per_second": round(self.tally.groups_per_second, 3),
            "queue": {"queued": self.depth.queued, "pending": self.depth.pending, "dead": self.depth.dead},
            "followers": {beat.replica: str(beat.version) if beat.version else None for beat in self.followers},
            **self.extra,
        }

    def ready(self) -> dict[str, str]:
        """For readiness probes: whom the orchestrator still waits for."""
        weights = "ok" if self.version else "the trainer has not published its first weights"
        silent = time.monotonic() - self._heard
        return {"weights": weights, "redis": "ok" if silent < 10 else f"no answer for {silent:.0f} s"}

    async def follow(self) -> None:
        """Keep up until cancelled: news of weights wake it at once, everything else is polled."""
        async with self.redis.pubsub() as news:
            while True:
                await insist(
                    lambda: _listen(news, self.keys.weights_news, self.poll_seconds),
                    f"run {self.keys.run_id}: wait for news of weights",
                    self.queue.patience_seconds,
                )
                await self.refresh()
                await self.tell()


async def _listen(news: Any, channel: str, seconds: float) -> None:
    if not news.subscribed:
        await news.subscribe(channel)
    await news.get_message(ignore_subscribe_messages=True, timeout=seconds)
