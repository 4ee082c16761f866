"""Rank 0's side of the queue: a step's groups in, acknowledgements and the run's status out."""

import asyncio
import json
import logging
import signal
import threading
import time
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from services import commands, pause
from services.commands import AnyOrder, Finish, Obeyed, Stop
from services.contract import WeightVersion
from services.queue import Entry, GroupQueue
from services.recipe import Recipe
from services.redis import DeadlineExceeded, cancel, connect, insist, wait_for_redis
from services.weights import disk
from services.weights.mirror import check
from services.weights.store import is_url
from trainer.checkpoint import Progress
from trainer.waits import GROUPS_PATIENCE_SECONDS, REDIS_PATIENCE_SECONDS, Waits

log = logging.getLogger(__name__)

Result = TypeVar("Result")

START_SECONDS = 120.0
STATUS_PATIENCE_SECONDS = 300.0
ORDER_SECONDS = 0.2
"""How often a trainer that waits looks for orders."""
STEPS_KEPT = 100_000
"""Numbers of a step are about 1 KB: the guard reads them again when it starts."""
LAST_STATUS_SECONDS = 10.0
"""Who asked the trainer to stop does not wait for long, and redis may have been stopped before it."""
FIRST_LOOK_SECONDS = 10.0
"""A trainer that waits this long for groups looks whether its newest weights are whole; later ever more seldom."""


class Paused(Exception):
    """No groups came in time, and none had to: the run is paused, or was meanwhile."""


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
        self.stopping = self.finished = False
        self.published: WeightVersion | None = None
        """The newest weights that this trainer published."""
        self._checking = threading.Lock()
        self._sound: WeightVersion | None = None
        self._unseen = False
        """Whether the last look got no answer."""
        self._waiting: asyncio.Task[Any] | None = None

    def _ask(self, call: Coroutine[Any, Any, Result]) -> Result:
        """A call that only a redis that is away makes long."""
        with self.waits.on("redis", "no answer", REDIS_PATIENCE_SECONDS):
            return self.runner.run(call)

    def claim(
        self, at_least: int, consumed: Sequence[str], trained: Sequence[str], trained_later: Sequence[str] = ()
    ) -> int:
        """Take the run over: a lineage of our own, and the entries an earlier trainer left. `consumed` entries and
        `trained` groups (ids) are those whose effect the restored checkpoint holds. Where it is not the newest that was
        durable once, groups of those `trained_later` are gone from the queue: they, and what lies there, will be made
        again."""
        lineage = self._ask(self.queue.claim_lineage(at_least))
        if lost := self._ask(self.queue.lost(trained_later)):
            log.warning("%d groups that only a lost checkpoint held are made again, and all that follow", len(lost))
            self._ask(self.queue.undo(trained_later))
        self._ask(self.queue.recall(trained))
        self._ask(self.queue.recover(set(consumed)))
        return lineage

    def go_back(self, at_least: int, trained: Sequence[str], undone: Sequence[str]) -> int:
        """A lineage of our own in which only the `trained` groups (ids) were trained: those `undone`, and what lies in
        the queue, will be made again."""
        lineage = self._ask(self.queue.claim_lineage(at_least))
        self._ask(self.queue.undo(undone))
        self._ask(self.queue.recall(trained))
        self._ask(self.queue.recover(set()))
        return lineage

    def pull(self, progress: Progress) -> list[Entry] | None:
        """One step's groups, by their place in the run's order; none when a signal asked to stop, and an empty list
        when there are orders to obey first.

        Raises after `trainer.batch_deadline_seconds` DeadlineExceeded, or Paused: call it again. Raises DamagedWeights:
        nobody can load what was published, so nothing will come. Whoever starts again publishes anew.
        """
        what = f"{self.recipe.trainer.groups_per_step} scored groups from the orchestrator"
        if self._ask(self._pause()).paused:
            what = f"{what} (the run is paused)"
            log.info("waiting for %s", what)
        try:
            with self.waits.on("groups", what, GROUPS_PATIENCE_SECONDS):
                entries = self.runner.run(self._pull(progress))
        except DeadlineExceeded as error:
            if not self._ask(self._pause()).excuses(self.recipe.trainer.batch_deadline_seconds):
                raise
            raise Paused(f"while the run is paused nothing is late: {error}") from error
        except asyncio.CancelledError:
            if not self.stopping:
                raise
            return None
        return sorted(entries, key=lambda entry: entry.group.index) if entries is not None else None

    async def _pause(self) -> pause.Pause:
        run_id = self.recipe.run.name
        return await insist(lambda: pause.read(self.redis, run_id), f"run {run_id}: pause", 60)

    async def _pull(self, progress: Progress) -> list[Entry] | None:
        trainer = self.recipe.trainer
        self._waiting = asyncio.current_task()
        if self.stopping:
            return None
        pulling = asyncio.create_task(self.queue.pull(trainer.groups_per_step, trainer.batch_deadline_seconds))
        ordering = asyncio.create_task(self._orders(progress, trainer.batch_deadline_seconds))
        looking = asyncio.create_task(self._look_at_weights())
        try:
            await asyncio.wait({pulling, ordering, looking}, return_when=asyncio.FIRST_COMPLETED)
            if looking.done():
                looking.result()  # raises
            if not pulling.done() and not await ordering:
                return await pulling  # no order came either: what the queue says of the deadline counts
            await cancel(pulling)
            return [] if pulling.cancelled() else pulling.result()
        finally:
            self._waiting = None
            await cancel(pulling, ordering, looking)

    async def _orders(self, progress: Progress, seconds: float = 0.0) -> list[AnyOrder]:
        """The orders that are due, waiting at most so many seconds for the first."""
        run_id, ends = self.recipe.run.name, time.monotonic() + seconds
        while True:
            given = await insist(
                lambda: commands.after(self.redis, run_id, progress.orders), f"run {run_id}: orders", seconds + 60
            )
            if given:
                obeyed = await insist(
                    lambda: commands.all_obeyed(self.redis, run_id), f"run {run_id}: orders", seconds + 60
                )
                due = list[AnyOrder]()
                for order in given:
                    # Obeyed before, after the checkpoint that is gone on from: at the same step again.
                    if order.id in obeyed and obeyed[order.id].step > progress.step:
                        break
                    due.append(order)
                if due:
                    return due
            if time.monotonic() >= ends:
                return []
            await asyncio.sleep(ORDER_SECONDS)

    def orders(self, progress: Progress) -> list[AnyOrder]:
        """The orders that are due now."""
        return self._ask(self._orders(progress))

    def last_orders(self, progress: Progress) -> list[AnyOrder]:
        """Orders that come after the last step; none when it is over, or nobody gave any in time."""
        if self.finished or self.stopping:
            return []
        seconds = self.recipe.trainer.batch_deadline_seconds
        try:
            with self.waits.on("groups", "the orchestrator to finish", GROUPS_PATIENCE_SECONDS):
                given = self.runner.run(self._interruptible(self._orders(progress, seconds)))
        except asyncio.CancelledError:
            if not self.stopping:
                raise
            return []
        if not given:
            log.warning("the orchestrator did not say within %g s that the last step was looked at", seconds)
        return given

    async def _interruptible(self, call: Coroutine[Any, Any, Result]) -> Result:
        self._waiting = asyncio.current_task()
        try:
            return await call
        finally:
            self._waiting = None

    def note_restored(self, progress: Progress) -> None:
        """Orders whose effect the restored checkpoint holds, and whose trainer died before it could say so: the guard
        waits for that. Not of a stop, for this trainer goes on."""
        run_id = self.recipe.run.name
        what, patience = f"run {run_id}: orders obeyed", STATUS_PATIENCE_SECONDS
        found = self._ask(insist(lambda: commands.unnoted(self.redis, run_id, progress.orders), what, patience))
        for order in found:
            if not isinstance(order, Stop):
                self.note_obeyed(order, progress, f"held by the checkpoint of step {progress.step}")

    def note_obeyed(self, order: AnyOrder, progress: Progress, effect: str) -> None:
        """After what it did is durable, where that matters."""
        self.finished = self.finished or isinstance(order, Finish)
        obeyed, run_id = Obeyed(step=progress.step, lineage=progress.lineage, effect=effect), self.recipe.run.name
        log.info("%s: %s", order.kind, effect)
        self._ask(
            insist(
                lambda: commands.note_obeyed(self.redis, run_id, order.id, obeyed),
                f"run {run_id}: order obeyed",
                STATUS_PATIENCE_SECONDS,
            )
        )

    def tell(self, line: dict[str, Any]) -> None:
        """A step's numbers, for the collapse guard."""
        numbers = {key: value for key, value in line.items() if value is None or isinstance(value, int | float)}

        async def add() -> None:
            fields: Any = {"line": json.dumps(numbers)}
            await self.redis.xadd(self.queue.keys.steps, fields, maxlen=STEPS_KEPT, approximate=True)

        self._ask(insist(add, f"run {self.recipe.run.name}: a step's numbers", STATUS_PATIENCE_SECONDS))

    async def _look_at_weights(self) -> None:
        """Never returns. Raises DamagedWeights."""
        pause = FIRST_LOOK_SECONDS
        while True:
            await asyncio.sleep(pause)
            pause *= 2
            weights = self.published
            if weights is not None:
                await asyncio.to_thread(self._check, weights)

    def _check(self, weights: WeightVersion) -> None:
        """Nothing where a look of an earlier wait still goes on: its thread outlives that. What lies in a bucket is
        found sound once, files may be torn later. Raises DamagedWeights."""
        if not self._checking.acquire(blocking=False):
            return
        try:
            if weights is not self._sound or not is_url(weights.location):
                check(weights, self.recipe.weights.mirror_dir)
            self._sound, self._unseen = weights, False
        except disk.DamagedWeights as error:
            raise disk.DamagedWeights(f"the published weights {weights.id} are damaged: {error}") from error
        except OSError as error:
            if not self._unseen:
                log.warning("the published weights %s cannot be looked at, later again: %s", weights.id, error)
            self._unseen = True
        finally:
            self._checking.release()

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
