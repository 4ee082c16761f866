"""The scorer behind an asyncio front: concurrent requests share batches, weights change between batches.

One thread owns the model. It works in rounds: a round takes whole waiting calls, oldest first, up to the token
budget, and runs under one weight version; so a call's results all come from the version it names. New weights are read
from disk beside the running rounds and swapped in between two of them.
"""

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client import Gauge, Histogram

from reward_server.scorer.base import FAILURES, TOKENS, Follow, Scored, ScoringFailed, Service
from reward_server.scorer.items import Abandoned, TokenItem
from reward_server.scorer.transformers import TransformersScorer
from services import traces
from services.contract import Version

log = logging.getLogger(__name__)

PAUSE_SECONDS, LINGER_SECONDS = 0.003, 0.1
"""Between two looks whether more calls came; in all, before a round."""

ROUND_CALLS = Histogram("rlif_scorer_round_calls", "Calls that shared one round", buckets=(1, 2, 4, 8, 16, 32, 64, 128))
ROUND_SECONDS = Histogram(
    "rlif_scorer_round_seconds", "Time of one round", buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
)
WAITING = Gauge("rlif_scorer_waiting_calls", "Calls that wait for a round")


@dataclass(eq=False)
class _Call:
    items: Sequence[TokenItem]
    tokens: int
    answer: asyncio.Future[Scored]
    trace: str


class ScorerService(Service):
    """The front of a TransformersScorer (built with `ema_decay` for `follow="ema"`).

    deterministic: every call is a round of its own, so that its batches, and thus the last bits of its scores, do not
    depend on what else arrived. stuck_seconds: a round that takes longer is given up, with its calls, and its thread
    is left behind.
    """

    backend = "transformers"

    def __init__(
        self,
        scorer: TransformersScorer,
        follow: Follow = "online",
        deterministic: bool = False,
        stuck_seconds: float = 600.0,
    ):
        if (follow == "ema") != (scorer.ema_decay is not None):
            raise ValueError(
                f"follow: {follow!r} and the scorer's ema_decay {scorer.ema_decay!r} do not belong together"
            )
        super().__init__(scorer, follow)
        self.scorer: TransformersScorer = scorer
        self.deterministic, self.stuck_seconds = deterministic, stuck_seconds
        self.version = scorer.version
        self._calls: deque[_Call] = deque()
        self._running: list[_Call] = []
        self._arrived = asyncio.Event()
        self._loading = asyncio.Lock()
        self._thread = _ModelThread()
        self._rounds: asyncio.Task | None = None

    async def start(self) -> None:
        self._rounds = asyncio.create_task(self._run_rounds(), name="scorer rounds")

    async def stop(self) -> None:
        """Ends the rounds; calls without an answer fail."""
        if self._rounds is not None:
            self._rounds.cancel()
            await asyncio.gather(self._rounds, return_exceptions=True)
        for call in [*self._running, *self._calls]:
            _fail(call, ScoringFailed("the scorer is shutting down"), "shutdown")
        self._calls.clear()
        self._thread.end()

    @property
    def has_reference(self) -> bool:
        return self.scorer.has_reference

    def state(self) -> str:
        """ "ok", or why no call is being served: for readiness probes."""
        if self._rounds is None:
            return "not started"
        if self._rounds.done():
            return "stopped" if self._rounds.cancelled() else f"stopped: {self._rounds.exception()}"
        return "ok"

    # ---- scoring -----------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        return len(self._calls)

    async def _answer(self, items: Sequence[TokenItem], tokens: int) -> Scored:
        call = _Call(items, tokens, asyncio.get_running_loop().create_future(), traces.here())
        self._calls.append(call)
        WAITING.set(len(self._calls))
        self._arrived.set()
        return await call.answer

    async def _run_rounds(self) -> None:
        while True:
            await self._arrived.wait()
            await self._linger()
            self._running = self._next_round()
            if self._running:
                await self._run_round(self._running)
            else:
                self._arrived.clear()

    async def _linger(self) -> None:
        """Let calls that are on their way join the round, while each pause brings some: a round starts on a processor
        that reading requests needs, too, and many small ones would starve it. A caller that is alone does not wait."""
        ends = time.monotonic() + LINGER_SECONDS
        while len(self._calls) + len(self._running) > 1 and not self.deterministic and time.monotonic() < ends:
            before = len(self._calls)
            await asyncio.sleep(PAUSE_SECONDS)
            if len(self._calls) == before:
                break

    def _next_round(self) -> list[_Call]:
        calls: list[_Call] = []
        tokens = 0
        while self._calls:
            call = self._calls[0]
            if calls and (self.deterministic or tokens + call.tokens > self.scorer.max_batch_tokens):
                break
            self._calls.popleft()
            if not call.answer.done():  # its caller may have given up
                calls.append(call)
                tokens += call.tokens
        WAITING.set(len(self._calls))
        return calls

    async def _run_round(self, calls: list[_Call]) -> None:
        started = time.perf_counter()
        items = [item for call in calls for item in call.items]

        def unwanted() -> bool:
            return all(call.answer.done() for call in calls)

        parent, *others = (call.trace for call in calls)
        try:
            with traces.span("scorer round", parent=parent, links=others, calls=len(calls), items=len(items)):
                score = lambda: (self.scorer.score(items, unwanted), self.scorer.version)  # noqa: E731
                results, version = await self._in_thread(score)
        except Abandoned:
            return
        except _Stuck as error:
            for call in calls:
                _fail(call, ScoringFailed(str(error)), "stuck")
            return
        except Exception as error:
            if len(calls) > 1:  # find the one that breaks, let the others live
                for call in calls:
                    await self._run_round([call])
                return
            log.exception("scoring %d items failed", len(items))
            failed = ScoringFailed(f"scoring {len(items)} items failed: {error}")
            failed.__cause__ = error
            _fail(calls[0], failed, "error")
            return
        ROUND_SECONDS.observe(time.perf_counter() - started)
        ROUND_CALLS.observe(len(calls))
        TOKENS.inc(sum(call.tokens for call in calls))
        first = 0
        for call in calls:
            if not call.answer.done():
                call.answer.set_result(Scored(results[first : first + len(call.items)], version))
            first += len(call.items)

    # ---- weights -----------------------------------------------------------------------------------------------

    async def load(self, version: Version, directory: Path) -> None:
        """Serve the weights of a Hugging Face folder from the next round on: the `load` of a weight follower.

        Raises ValueError (see `TransformersScorer.stage`); the old weights then keep serving.
        """
        if self.follow == "frozen":
            raise ValueError("follow: a frozen scorer takes no new weights")
        async with self._loading:
            staged = await asyncio.to_thread(self.scorer.stage, version, directory)
            await self._in_thread(lambda: self.scorer.swap(version, staged))
            self.version = version
        await self._announce()

    async def _in_thread(self, work: Callable[[], Any]) -> Any:
        """Run on the model's thread, in turn. Raises _Stuck when it takes too long, and goes on with a new thread."""
        thread = self._thread
        running = asyncio.wrap_future(thread.submit(work))
        try:
            async with asyncio.timeout(self.stuck_seconds) as limit:
                return await running
        except TimeoutError as error:
            if not limit.expired():
                raise
            if self._thread is thread:
                log.error("the model thread did not finish within %g s: it is left behind", self.stuck_seconds)
                thread.end()
                self._thread = _ModelThread()
            raise _Stuck(f"the model did not finish within {self.stuck_seconds:g} s") from error


class _Stuck(Exception):
    pass


class _ModelThread:
    """Runs work in order on one daemon thread. (An executor's thread would hold up the exit of a stuck process.)"""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[tuple[Future, Callable[[], Any]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="scorer model", daemon=True).start()

    def submit(self, work: Callable[[], Any]) -> Future:
        future: Future = Future()
        self._work.put((future, work))
        return future

    def end(self) -> None:
        """The thread ends after what it was given."""
        self._work.put(None)

    def _run(self) -> None:
        while (task := self._work.get()) is not None:
            future, work = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)


def _fail(call: _Call, error: Exception, reason: str) -> None:
    if not call.answer.done():
        FAILURES.labels(reason).inc()
        call.answer.set_exception(error)
