"""The orchestrator: tasks to rollouts to rewards to the queue, as many at once as staleness allows.

It keeps no state of its own. What was pushed or buried is in Redis, which task has which index follows from the recipe;
so it may be killed at any time, and on its next start makes only what is missing.
"""

import asyncio
import logging
import signal
import time
from contextlib import ExitStack
from functools import partial
from typing import Any

import orjson

from services import commands
from services.clients import CallError
from services.commands import EvaluationResult, Finish, Stop
from services.console import pages
from services.console.source import Source
from services.keys import Keys
from services.orchestrator import data
from services.orchestrator.admission import Admission
from services.orchestrator.chunk import Chunk, Desk, finish
from services.orchestrator.evaluation import Evaluator
from services.orchestrator.guard import Guard
from services.orchestrator.pacing import Pace
from services.orchestrator.progress import RunFailed, Tally, Watch
from services.orchestrator.servers import Servers
from services.queue import GroupQueue
from services.recipe import Recipe
from services.redis import DeadlineExceeded, cancel, connect, insist, wait_for_redis
from services.startup import StartupError
from services.status import serving_status

log = logging.getLogger(__name__)

REDIS_SECONDS = 120.0
DRAIN_SECONDS = 10.0
REMIND_SECONDS = 30.0


def main(
    recipe: Recipe,
    rollout_urls: list[str],
    reward_urls: list[str],
    redis_url: str,
    stay: bool = False,
    port: int | None = None,
) -> int:
    """Run until the trainer is done. Returns an exit code: 0 done, 1 failed, 130 or 143 stopped by a signal.

    Status, metrics and the console are served on `port` (none: the one after the recipe's `tracking.metrics_port`).
    With `stay` it goes on serving them after that, until a signal comes: for those who start again whatever ends.
    Raises StartupError for what no restart mends: unusable data, servers that do not fit, a spec they refuse.
    """
    try:
        return asyncio.run(orchestrate(recipe, rollout_urls, reward_urls, redis_url, stay, port))
    except (RunFailed, CallError, DeadlineExceeded) as error:
        log.error("the orchestrator gives up: %s", error)
        return 1


async def orchestrate(
    recipe: Recipe,
    rollout_urls: list[str],
    reward_urls: list[str],
    redis_url: str,
    stay: bool = False,
    port: int | None = None,
) -> int:
    """`main` inside a running event loop (of the main thread: it handles signals); errors propagate."""
    wake = asyncio.Event()
    stops: list[signal.Signals] = []

    def on_signal(number: signal.Signals) -> None:
        stops.append(number)
        wake.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)

    source = await asyncio.to_thread(data.load, recipe)
    held_out = None
    if recipe.evaluation is not None:
        held_out = await asyncio.to_thread(data.load, recipe, None, recipe.evaluation.data)
    tally = Tally()
    try:
        redis: Any = connect(redis_url)
    except ValueError as error:
        raise StartupError(str(error)) from error
    try:
        if not await _redis_answers(redis, wake):
            return 128 + stops[0]
        queue = GroupQueue(redis, recipe.run.name, recipe.queue.max_deliveries)
        watch = Watch(redis, queue, recipe.weights.poll_seconds, tally, wake)
        spec_id = recipe.spec.spec_id if recipe.spec else None
        watch.extra = {"recipe_spec_id": spec_id, "started_at": time.time(), "guard": None}
        changed = await _spec_of_last_start(redis, recipe.run.name) != spec_id
        servers = Servers(recipe, rollout_urls, reward_urls, changed)
        watch.extra["spec"] = servers.spec_name
        pace = Pace(recipe.trainer.steps, recipe.trainer.groups_per_step, recipe.pacing.max_staleness)
        desk = Desk(recipe, source, pace, queue, servers, watch, tally)
        with ExitStack() as stack:
            if port is None and recipe.tracking.metrics_port is not None:
                port = recipe.tracking.metrics_port + 1  # the recipe's port itself is the trainer's
            if port is not None:
                console = partial(pages.router, Source(redis_url, recipe.run.name, tuple(reward_urls), recipe.run.dir))
                served = serving_status("orchestrator", port, watch.ready, watch.status, console, pages.PATHS)
                stack.enter_context(served)
            try:
                evaluator = Evaluator(desk, recipe.evaluation, held_out) if recipe.evaluation and held_out else None
                guard = Guard(recipe, recipe.guard, redis, wake) if recipe.guard else None
                return await Loop(desk, wake, stops, stay, evaluator, guard).run()
            finally:
                await servers.close()
    finally:
        await redis.aclose()


async def _redis_answers(redis: Any, wake: asyncio.Event) -> bool:
    """Once it does; False when a signal comes first. Raises as `wait_for_redis` does."""
    answer = asyncio.ensure_future(wait_for_redis(redis, REDIS_SECONDS))
    signalled = asyncio.ensure_future(wake.wait())
    await asyncio.wait([answer, signalled], return_when=asyncio.FIRST_COMPLETED)
    if answer.done():
        await cancel(signalled)
        await answer
        return True
    await cancel(answer)
    return False


async def _spec_of_last_start(redis: Any, run_id: str) -> str | None:
    status = await redis.hget(Keys(run_id).status, "orchestrator")
    return orjson.loads(status).get("recipe_spec_id") if status else None


class Loop:
    """What the orchestrator does whenever something happened. `floor` is the lowest lineage whose groups counted when
    the order began: 0 at first, so that what was undone while nobody was here is found out. `admission` is none before.
    `stopped` is the lineage of the trainer that an order stopped: one that resumes the run has another."""

    def __init__(
        self,
        desk: Desk,
        wake: asyncio.Event,
        stops: list[signal.Signals],
        stay: bool = False,
        evaluator: Evaluator | None = None,
        guard: Guard | None = None,
    ):
        self.desk, self.wake, self.stops, self.stay = desk, wake, stops, stay
        self.evaluator, self.guard = evaluator, guard
        self.evaluating: asyncio.Task[EvaluationResult] | None = None
        self.ended = False
        self.stopped: int | None = None
        self.floor = 0
        self.admission: Admission | None = None
        self.running: dict[asyncio.Task[None], Chunk] = {}
        self.reminded = time.monotonic()

    async def run(self) -> int:
        """Returns the exit code."""
        desk = self.desk
        await desk.watch.refresh()
        if self.evaluator is not None:
            await self.evaluator.load()
        followers = [asyncio.create_task(desk.watch.follow())]
        if self.guard is not None:
            followers.append(asyncio.create_task(self.guard.follow()))
        for follower in followers:
            follower.add_done_callback(lambda _: self.wake.set())
        probes = [
            asyncio.create_task(routes.call(_nothing)) for routes in (desk.servers.rollouts, desk.servers.rewards)
        ]
        for probe in probes:
            probe.add_done_callback(lambda _: self.wake.set())
        try:
            while True:
                self.wake.clear()
                if self.guard is not None:
                    desk.watch.extra["guard"] = self.guard.state()
                for task in [*followers, *probes, *self.running]:
                    if task.done():
                        await task
                        self.running.pop(task, None)
                if self.stops:
                    return await self._drain()
                if self._is_over():
                    if desk.tally.state != "finished":
                        log.info("training is over after %s", desk.watch.version)
                    desk.tally.state = "finished"
                    if self.guard is not None:
                        await self.guard.close()
                    if not self.stay:
                        return 0
                    await cancel(*probes)  # whether there still are servers matters no more
                    probes.clear()
                else:
                    if desk.watch.version is not None and self.admission is None:
                        # Not before: a trainer that publishes has told a redis that lost its data what was trained.
                        self.admission = Admission(desk)
                        await self.admission.begin()
                        log.info("%d groups were pushed or given up before this start", len(self.admission.seen))
                    await self._go_back()
                    if all(probe.done() for probe in probes):
                        await self._evaluate()
                        if not self._is_held():
                            await self._admit()
                    await self._finish()
                    self._look_for_a_stall()
                await self.wake.wait()
        except (RunFailed, CallError, DeadlineExceeded, StartupError) as error:
            desk.tally.state = "failed"
            desk.watch.extra["reason"] = str(error)
            raise
        finally:
            await cancel(*followers, *probes, *self.running, *([self.evaluating] if self.evaluating else []))
            await self._last_status()

    async def _admit(self) -> None:
        desk, admission = self.desk, self.admission
        if admission is not None:
            await admission.offer_room(admission.cursor)
        if desk.watch.paused:
            if desk.tally.state != "paused" or time.monotonic() - self.reminded > REMIND_SECONDS:
                self.reminded = time.monotonic()
                log.warning("the run is paused: no new groups are admitted until it is resumed")
            desk.tally.state = "paused"
            return
        if admission is None:
            desk.tally.state = "waiting for the trainer's first weights"
            return
        while len(self.running) < desk.recipe.pacing.max_requests_in_flight:
            chunk = await admission.next(self.running.values())
            if chunk is None:
                break
            task = asyncio.create_task(finish(chunk, desk))
            task.add_done_callback(lambda _: self.wake.set())
            self.running[task] = chunk
        desk.tally.state = "running"

    def _is_over(self) -> bool:
        watch = self.desk.watch
        said = watch.trainer.get("state") == "done" and watch.trainer.get("at", 0) > watch.extra["started_at"]
        if self.ended or (watch.trainer.get("state") == "stopped" and watch.trainer.get("lineage") == self.stopped):
            return True
        if self.desk.recipe.has_orders:
            return said
        if watch.version is None or watch.version.version < self.desk.pace.steps:
            return said
        # An empty queue after the last step means that a durable checkpoint holds all of it.
        return said or watch.depth.queued + watch.depth.pending == 0

    async def _go_back(self) -> None:
        """After a roll-back: what it undid is made again, from the first index on that is missing."""
        desk, version = self.desk, self.desk.watch.version
        if version is None or desk.watch.floor == self.floor or version.lineage < desk.watch.floor:
            return
        assert self.admission is not None
        log.info("lineages from %d on count (now %s): what was undone is made again", desk.watch.floor, version)
        self.floor = desk.watch.floor
        running = [*self.running, *([self.evaluating] if self.evaluating else [])]
        await cancel(*running)
        self.running, self.evaluating = {}, None
        if self.evaluator is not None:
            await self.evaluator.forget(version, self.floor)
        await self.admission.begin()

    async def _evaluate(self) -> None:
        """Take the result of an evaluation that ended, and start the one that is due."""
        if self.evaluator is None:
            return
        if self.evaluating is not None and self.evaluating.done():
            result = await self.evaluating
            self.evaluating = None
            if self.guard is not None and result.version.lineage >= self.floor:
                await self.guard.note(result)
        due = self.evaluator.due()
        if self.evaluating is None and due is not None:
            self.evaluating = asyncio.create_task(self.evaluator.evaluate(due))
            self.evaluating.add_done_callback(lambda _: self.wake.set())

    def _is_held(self) -> bool:
        """Whether a repeatable run waits for its watchers before it makes more."""
        version = self.desk.watch.version
        if not self.desk.recipe.run.deterministic or version is None:
            return False
        return self.evaluating is not None or (self.guard is not None and self.guard.holds(version))

    async def _finish(self) -> None:
        """Note that an order stopped the trainer. Where it waits for orders: let it go once its last weights were
        looked at, and note that it went."""
        desk, version = self.desk, self.desk.watch.version
        if version is None or self.ended:
            return
        run_id, redis = desk.recipe.run.name, desk.watch.redis
        if desk.watch.trainer.get("state") == "stopped":
            given = await insist(lambda: commands.after(redis, run_id, 0), f"run {run_id}: orders", REDIS_SECONDS)
            obeyed = await insist(lambda: commands.all_obeyed(redis, run_id), f"run {run_id}: orders", REDIS_SECONDS)
            is_ours = desk.watch.trainer.get("at", 0) > desk.watch.extra["started_at"]
            stops = {obeyed[order.id].lineage for order in given if isinstance(order, Stop) and order.id in obeyed}
            if is_ours and desk.watch.trainer.get("lineage") in stops:
                self.stopped = desk.watch.trainer["lineage"]
        if not desk.recipe.has_orders:
            return
        is_watched = self.guard is None or not self.guard.holds(version)
        if version.version < desk.pace.steps or self.evaluating is not None or not is_watched:
            return
        order = Finish(id=f"finish-{version}")
        await insist(lambda: commands.send(redis, run_id, order), f"run {run_id}: finish", REDIS_SECONDS)
        obeyed = await insist(lambda: commands.all_obeyed(redis, run_id), f"run {run_id}: orders", REDIS_SECONDS)
        self.ended = order.id in obeyed

    def _look_for_a_stall(self) -> None:
        """Raises RunFailed when the trainer has all it may get and publishes nothing for too long."""
        watch, limit = self.desk.watch, self.desk.recipe.trainer.batch_deadline_seconds
        now = time.monotonic()
        busy = self.evaluating is not None or any(not chunk.waiting for chunk in self.running.values())
        quiet = now - max(watch.version_at, self.desk.tally.pushed_at, watch.paused_at)
        if busy:
            return
        newest = f"weights newer than {watch.version}" if watch.version else "its first weights"
        depth = f"{watch.depth.queued} groups queued, {watch.depth.pending} being trained"
        if quiet > limit:
            raise RunFailed(f"the trainer did not publish {newest} within {limit:g} s ({depth})")
        if min(quiet, now - self.reminded) > REMIND_SECONDS:
            self.reminded = now
            log.info("waiting for the trainer to publish %s: %.0f s so far, %s", newest, quiet, depth)

    async def _drain(self) -> int:
        """Let what is at the servers finish for a while; what is dropped will be made again."""
        number = self.stops[0]
        self.desk.tally.state = "stopping"
        log.info("%s: %d requests may finish within %.0f s", number.name, len(self.running), DRAIN_SECONDS)
        ends = time.monotonic() + DRAIN_SECONDS
        while True:
            busy = [task for task, chunk in self.running.items() if not chunk.waiting and not task.done()]
            left = ends - time.monotonic()
            if not busy or left <= 0 or len(self.stops) > 1:
                return 128 + number
            await asyncio.wait(busy, timeout=min(left, 0.2), return_when=asyncio.ALL_COMPLETED)

    async def _last_status(self) -> None:
        watch = self.desk.watch
        try:
            async with asyncio.timeout(2):
                await watch.tell(at_once=True)
        except (TimeoutError, DeadlineExceeded):
            log.warning("the last status could not be written to redis")


async def _nothing(_: object) -> None:
    """A call that only has its server prepared."""
