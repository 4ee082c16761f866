"""Checks of untrusted text in processes that can be killed (`reward_server.worker_process`), with two lanes.

Every check starts in the *fast* lane, where it may run for a quantum. One that needs longer is run anew in the *slow*
lane, under the full limit and at low priority; checks that look expensive go there at once (`heavy`). So expensive or
hostile text delays only its like. Callers take turns: the next check of a request with few checks comes before the
hundredth of a big one. A caller of whose checks too many ran over loses the fast lane for as long as that is so.

Limits: inside the process alarms on CPU time and on wall time (soft); outside the parent kills and replaces the process
(hard). A process that ran over its time, or died, is always replaced, by one that is already up.
"""

import asyncio
import logging
import os
import re
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import msgpack
from prometheus_client import Counter, Gauge

from reward_server import child
from reward_server.worker_process import HEADER

log = logging.getLogger(__name__)

QUEUE_DEPTH = Gauge("rlif_verifier_waiting_checks", "Checks that wait for a verifier process", ["lane"])
KILLS = Counter("rlif_verifier_kills_total", "Verifier processes replaced, by why", ["reason"])
STOPPED = "stopped"
VERDICTS_PER_OVERRUN = 4
WINDOW = 4
"""Checks of one caller that wait for the fast lane, per process there: it must not run dry."""
PROCESSES = Gauge("rlif_verifier_processes", "Verifier processes that are up")


@dataclass(frozen=True)
class Limits:
    """The quantum holds in the fast lane, the full limit in the slow one: CPU seconds of work (so that a busy machine
    makes no verdict), and wall seconds in which to get them; `grace_seconds` later the parent kills.

    `slow_wait_seconds` bounds the waiting in the slow lane; `queue` the waiting checks of both lanes; `memory_bytes` is
    the address space of one process.
    """

    quantum_seconds: float = 0.5
    quantum_wall_seconds: float = 2.0
    full_seconds: float = 4.0
    full_wall_seconds: float = 10.0
    grace_seconds: float = 1.0
    slow_wait_seconds: float = 15.0
    start_seconds: float = 60.0
    memory_bytes: int = 2 * 2**30
    queue: int = 16384


@dataclass(frozen=True)
class Verdict:
    """`result` is what the check returned, present exactly when `status` is "ok"; `seconds` include the waiting."""

    status: Literal["ok", "timeout", "error"]
    seconds: float
    result: dict[str, Any] = field(default_factory=dict)
    detail: str = ""


@dataclass
class Turn:
    """One caller's place in the order of turns; share one among the checks of a request.

    `slots` bounds how many checks of the caller wait at once, so that none fills the queue for everybody; `window`
    (made by the pool) how many of them wait for a process, so that what one learns of a caller comes in time for the
    others.
    """

    served: dict[str, float] = field(default_factory=dict)
    """By lane."""
    slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1024))
    window: asyncio.Semaphore | None = None
    verdicts: int = 0
    overruns: int = 0
    """Checks that ran over their time, or took their process along: each costs a process."""

    @property
    def is_costly(self) -> bool:
        return VERDICTS_PER_OVERRUN * self.overruns > self.verdicts


class Died(Exception):
    """The process ended while it ran a check."""


SECRET = re.compile(r"(^|_)(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_|$)|^(AWS|RLIF_REDIS)_", re.IGNORECASE)
LOGIN = re.compile(r"://[^/]*@")


def _plain(environment: Mapping[str, str]) -> dict[str, str]:
    """Without what looks like a secret: a process that reads untrusted text has no use for one."""
    return {name: text for name, text in environment.items() if not (SECRET.search(name) or LOGIN.search(text))}


class _Process:
    def __init__(self, process: child.Child):
        assert process.stdin is not None and process.stdout is not None
        self.process, self.stdin, self.stdout = process, process.stdin, process.stdout

    @classmethod
    async def start(cls, memory_bytes: int) -> "_Process":
        # Not `-m`: the module would then exist twice in the child, and its exceptions with it.
        argv = [sys.executable, "-c", f"from reward_server.worker_process import main; main({memory_bytes})"]
        return cls(await child.start(argv, env={**_plain(os.environ), "OMP_NUM_THREADS": "1"}))

    async def exchange(self, request: dict[str, Any], hard_seconds: float) -> dict[str, Any]:
        """Raises TimeoutError at the hard limit and Died."""
        body = msgpack.packb(request, use_bin_type=True)
        try:
            async with asyncio.timeout(hard_seconds):
                self.stdin.write(len(body).to_bytes(HEADER, "big") + body)
                await self.stdin.drain()
                length = int.from_bytes(await self.stdout.readexactly(HEADER), "big")
                return msgpack.unpackb(await self.stdout.readexactly(length), raw=False)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise Died from error

    async def end(self) -> int:
        """Kill the process, unless it is just ending by itself, and return its exit code."""
        if self.stdout.at_eof():
            with suppress(TimeoutError):
                await asyncio.wait_for(self.process.wait(), 1.0)
        self.process.kill()
        code = await self.process.wait()
        self.process.close()
        return code


@dataclass
class _Job:
    request: dict[str, Any]
    deadline: float
    done: asyncio.Future[Verdict]
    asked_at: float
    turn: Turn
    expiry: asyncio.TimerHandle | None = None
    """Set while it waits in the slow lane."""
    window: asyncio.Semaphore | None = None
    """Set while it takes up a place there."""

    def leave_window(self) -> None:
        if self.window is not None:
            self.window.release()
            self.window = None

    def settle(self, status: Literal["ok", "timeout", "error"], detail: str = "", result: dict | None = None) -> None:
        if not self.done.done():
            self.done.set_result(Verdict(status, time.monotonic() - self.asked_at, result or {}, detail))


class _Lane:
    """Waiting checks in the order of turns (start-time fair queueing)."""

    def __init__(self, name: str):
        self.name = name
        self.queue: asyncio.PriorityQueue[tuple[float, int, _Job]] = asyncio.PriorityQueue()
        self.virtual_time = 0.0
        self.count = 0
        self.depth = QUEUE_DEPTH.labels(name)

    def put(self, job: _Job) -> None:
        start = max(self.virtual_time, job.turn.served.get(self.name, 0.0))
        job.turn.served[self.name] = start + 1
        self.count += 1
        self.queue.put_nowait((start, self.count, job))
        self.depth.set(self.queue.qsize())

    async def next(self) -> _Job:
        while True:
            start, _, job = await self.queue.get()
            self.virtual_time = max(self.virtual_time, start)
            self.depth.set(self.queue.qsize())
            if not job.done.done():
                return job


class WorkerPool:
    """`workers` fast processes, half as many slow ones (at least one), one spare. Use inside one event loop.

    `warm_up` are (check, payload) pairs that a new process runs before it is used, so that imports cost no check time.
    """

    def __init__(
        self, workers: int, limits: Limits | None = None, warm_up: list[tuple[str, dict[str, Any]]] | None = None
    ):
        self.limits = limits or Limits()
        self.warm_up = warm_up or []
        self.fast, self.slow = _Lane("fast"), _Lane("slow")
        self.fast_workers, self.slow_workers = workers, max(1, workers // 2)
        self.state = "ok"
        self._ready: asyncio.Queue[_Process] = asyncio.Queue()
        self._alive: set[_Process] = set()
        self._tasks: set[asyncio.Task] = set()

    def start(self) -> None:
        """Returns at once; checks wait for the first process to be up. The first check starts the pool, too."""
        if self._tasks:
            return
        self.state = "verifier processes are starting"
        for lane, count in ((self.fast, self.fast_workers), (self.slow, self.slow_workers)):
            for _ in range(count):
                self._spawn(self._add_process())
                self._spawn(self._serve(lane))
        self._spawn(self._add_process())

    async def stop(self) -> None:
        self.state = STOPPED
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for process in list(self._alive):
            await self._end(process)

    @property
    def waiting(self) -> int:
        return self.fast.queue.qsize() + self.slow.queue.qsize()

    @property
    def is_full(self) -> bool:
        return self.waiting >= self.limits.queue

    async def check(
        self, check: str, payload: dict[str, Any], deadline: float, turn: Turn, heavy: bool = False
    ) -> Verdict:
        """Run `check` ("module:function", a function from payload to result, both msgpack-able) in a process.

        Never raises for what the check does: a verdict is back by `deadline` (time.monotonic()), `timeout` if need be.
        """
        asked_at = time.monotonic()
        if self.state == STOPPED:
            return Verdict("error", 0.0, detail="the server is shutting down")
        self.start()
        try:
            async with asyncio.timeout(max(0.0, deadline - asked_at)), turn.slots:
                if self.is_full:
                    return Verdict("error", 0.0, detail=f"the verifier queue is full ({self.limits.queue} checks wait)")
                done: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
                job = _Job({"check": check, "payload": payload}, deadline, done, asked_at, turn)
                if heavy:
                    self._put_slow(job)
                    return await done
                turn.window = turn.window or asyncio.Semaphore(WINDOW * self.fast_workers)
                await turn.window.acquire()
                job.window = turn.window
                try:
                    self.fast.put(job)
                    return await done
                finally:
                    job.leave_window()
        except TimeoutError:
            return Verdict("timeout", time.monotonic() - asked_at, detail="the request's deadline passed")

    def _put_slow(self, job: _Job) -> None:
        wait = self.limits.slow_wait_seconds
        late = f"no slow verifier process was free for {wait:g} s"
        job.expiry = asyncio.get_running_loop().call_later(wait, job.settle, "timeout", late)
        self.slow.put(job)

    # ---- processes ---------------------------------------------------------------------------------------------

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _add_process(self) -> None:
        pause = 1.0
        while True:
            process = await _Process.start(self.limits.memory_bytes)
            self._alive.add(process)
            try:
                for check, payload in self.warm_up:
                    limit = self.limits.start_seconds
                    request = {"check": check, "payload": payload, "cpu_seconds": limit, "wall_seconds": limit}
                    reply = await process.exchange(request, limit + self.limits.grace_seconds)
                    if reply["status"] != "ok":
                        log.warning("verifier warm-up %s: %s %s", check, reply["status"], reply.get("detail", ""))
                break
            except (TimeoutError, Died):
                code = await self._end(process)
                self.state = f"verifier processes do not start (exit code {code})"
                log.error("%s; next try in %.0f s", self.state, pause)
                await asyncio.sleep(pause)
                pause = min(60.0, 2 * pause)
        self.state = "ok"
        PROCESSES.set(len(self._alive))
        self._ready.put_nowait(process)

    async def _end(self, process: _Process) -> int:
        code = await process.end()
        self._alive.discard(process)
        PROCESSES.set(len(self._alive))
        return code

    async def _replace(self, process: _Process, turn: Turn, reason: str) -> int:
        turn.overruns += 1
        KILLS.labels(reason).inc()
        code = await self._end(process)
        self._spawn(self._add_process())
        return code

    async def _serve(self, lane: _Lane) -> None:
        while True:
            process = await self._ready.get()
            if lane is self.slow:
                with suppress(ProcessLookupError):
                    os.setpriority(os.PRIO_PROCESS, process.process.pid, 10)
            while await self._run_next(lane, process):
                pass

    async def _run_next(self, lane: _Lane, process: _Process) -> bool:
        """Run one check. False when the process is used up (and has been replaced)."""
        job = await lane.next()
        if lane is self.fast and job.turn.is_costly:
            self._put_slow(job)
            return True
        if job.expiry is not None:
            job.expiry.cancel()
        limits = self.limits
        cpu, wall = limits.full_seconds, limits.full_wall_seconds
        if lane is self.fast:
            cpu, wall = limits.quantum_seconds, limits.quantum_wall_seconds
        wall = min(wall, max(0.001, job.deadline - time.monotonic()))
        request = {**job.request, "cpu_seconds": cpu, "wall_seconds": wall}
        try:
            reply = await process.exchange(request, wall + limits.grace_seconds)
        except TimeoutError:
            await self._replace(process, job.turn, "hard_limit")
            reply = {"status": "timeout"}
        except Died:
            code = await self._replace(process, job.turn, "died")
            job.settle("error", f"the verifier process ended (exit code {code})")
            return False
        else:
            if reply["status"] == "timeout":
                await self._replace(process, job.turn, "soft_limit")
        if reply["status"] != "timeout":
            job.turn.verdicts += 1
            job.settle(reply["status"], reply.get("detail", ""), reply.get("result"))
            return True
        if lane is self.fast:
            job.leave_window()
            self._put_slow(job)
        else:
            job.settle("timeout", f"no verdict within {cpu:g} s of work or {wall:.3g} s in all")
        return False
