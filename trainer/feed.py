"""Rank 0's side of the queue: a step's groups in, acknowledgements and the run's status out."""

import asyncio
import json
import logging
import signal
import threading
import time
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from services.contract import WeightVersion
from services.queue import Entry, GroupQueue
from services.recipe import Recipe
from services.redis import DeadlineExceeded, cancel, connect, insist, wait_for_redis
from services.weights import disk
from trainer.waits import GROUPS_PATIENCE_SECONDS, REDIS_PATIENCE_SECONDS, Waits

log = logging.getLogger(__name__)

Result = TypeVar("Result")

START_SECONDS = 120.0
STATUS_PATIENCE_SECONDS = 300.0
LAST_STATUS_SECONDS = 10.0
"""Who asked the trainer to stop does not wait for long, and redis may have been stopped before it."""
FIRST_LOOK_SECONDS = 10.0
"""A trainer that waits this long for groups looks whether its newest weights are whole; later ever more seldom."""


class Feed:
    """The run's queue for a synchronous caller. After SIGTERM or SIGINT (see `graceful`) `pull` returns none."""

    def __init__(self, redis_url: str, recipe: Recipe, waits: Waits) -> None:
        self.recipe, self.waits = recipe, waits
        self.runner = asyncio.Runner()
        self.redis = connect(redis_url)
        self.runner.run(wait_for_redis(self.redis, START_SECONDS))
        waits.over("redis")
        self.queue = GroupQueue(self.redis, recipe.run.name, max_deliveries=recipe.queue.max_deliveries)
        self.started = time.monotonic()
        self.tokens_per_second = 0.0
        self.stopping = False
        self.published: WeightVersion | None = None
        """The newest weights that this trainer published."""
        self._waiting: asyncio.Task[Any] | None = None

    def _ask(self, call: Coroutine[Any, Any, Result]) -> Result:
        """A call that only a redis that is away makes long."""
        with self.waits.on("redis", "no answer", REDIS_PATIENCE_SECONDS):
            return self.runner.run(call)

    def claim(self, at_least: int, consumed: Sequence[str], trained: Sequence[str]) -> int:
        """Take the run over: a lineage of our own, and the entries an earlier trainer left. `consumed` entries and
        `trained` groups (ids) are those whose effect the restored checkpoint holds."""
        lineage = self._ask(self.queue.claim_lineage(at_least))
        self._ask(self.queue.recall(trained))
        self._ask(self.queue.recover(set(consumed)))
        return lineage

    def pull(self) -> list[Entry] | None:
        """One step's groups, by their place in the run's order; none when a signal asked to stop.

        Raises DeadlineExceeded after `trainer.batch_deadline_seconds`, and DamagedWeights: nobody can load what was
        published, so nothing will come. Whoever starts again publishes anew.
        """
        what = f"{self.recipe.trainer.groups_per_step} scored groups from the orchestrator"
        try:
            with self.waits.on("groups", what, GROUPS_PATIENCE_SECONDS):
                entries = self.runner.run(self._pull())
        except asyncio.CancelledError:
            if not self.stopping:
                raise
            return None
        return sorted(entries, key=lambda entry: entry.group.index) if entries is not None else None

    async def _pull(self) -> list[Entry] | None:
        trainer = self.recipe.trainer
        self._waiting = asyncio.current_task()
        try:
            if self.stopping:
                return None
            pulling = asyncio.create_task(self.queue.pull(trainer.groups_per_step, trainer.batch_deadline_seconds))
            looking = asyncio.create_task(self._look_at_weights())
            try:
                await asyncio.wait({pulling, looking}, return_when=asyncio.FIRST_COMPLETED)
                return pulling.result() if pulling.done() else looking.result()
            finally:
                await cancel(pulling, looking)
        finally:
            self._waiting = None

    async def _look_at_weights(self) -> None:
        """Never returns. Raises DamagedWeights."""
        pause = FIRST_LOOK_SECONDS
        while True:
            await asyncio.sleep(pause)
            pause *= 2
            weights = self.published
            if weights is not None and weights.transport == "disk":
                try:
                    await asyncio.to_thread(disk.verify, Path(weights.location), weights.manifest)
                except disk.DamagedWeights as error:
                    raise disk.DamagedWeights(f"the published weights {weights.id} are damaged: {error}") from error

    def begin(self, entries: Sequence[Entry]) -> None:
        self._ask(self.queue.begin(entries))

    def finish(self, entries: Sequence[Entry]) -> None:
        self._ask(self.queue.finish(entries))

    def ack(self, entry_ids: Sequence[str], lineage: int) -> None:
        """Raises Fenced when another trainer has taken the run over."""
        self._ask(self.queue.ack(entry_ids, lineage))

    def report(self, state: str, step: int, lineage: int) -> None:
        """The trainer's field of the run's status hash, which console and command line read. States: `waiting` (for
        groups), `training`, `stopped` (by a signal), `done`."""
        status = {
            "step": step,
            "steps": self.recipe.trainer.steps,
            "state": state,
            "lineage": lineage,
            "seconds": time.monotonic() - self.started,
            "tokens_per_second": self.tokens_per_second,
            "at": time.time(),
        }

        async def store() -> None:
            await self.redis.hset(self.queue.keys.status, "trainer", json.dumps(status))

        patience = LAST_STATUS_SECONDS if self.stopping else STATUS_PATIENCE_SECONDS
        try:
            self._ask(insist(store, f"run {self.recipe.run.name}: status", patience))
        except DeadlineExceeded as error:
            if not self.stopping:
                raise
            log.warning("stopping without a last status: %s", error)

    def stop(self, number: int, _frame: object) -> None:
        if not self.stopping:
            log.info("%s: stopping after this step", signal.Signals(number).name)
        self.stopping = True
        if self._waiting is not None:
            self._waiting.get_loop().call_soon_threadsafe(self._waiting.cancel)

    def close(self) -> None:
        self.runner.run(self.redis.aclose())
        self.runner.close()


@contextmanager
def graceful(feed: Feed | None) -> Iterator[None]:
    """Within, SIGTERM and SIGINT end the run after its step. Ranks without a feed ignore them: rank 0 tells them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = feed.stop if feed is not None else signal.SIG_IGN
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
