"""What a sandbox is: it runs one untrusted program on several inputs and says, case by case, what became of it."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Literal, Protocol

from prometheus_client import Counter, Gauge
from pydantic import Field

from services.contract import Wire

Language = Literal["python", "cpp"]
Status = Literal["ok", "timeout", "memory", "output", "crash", "compile", "deadline", "error"]
FAULTS = frozenset({"deadline", "error"})
"""What became of the sandbox, not of the program: such a case says nothing about the program."""

CASES = Counter("rlif_sandbox_cases_total", "Cases run, by what became of them", ["status"])
WAITING = Gauge("rlif_sandbox_waiting_programs", "Programs that wait for their turn")

PROGRAMS_A_PLACE = 4
LATE = "the request's deadline passed"


class Program(Wire):
    language: Language
    source: str = Field(max_length=1_000_000)


class Case(Wire):
    """`stdout_bytes`: more than that to stdout cannot be right, and ends the case as `output` (none: what the limits
    allow, which hold in any case)."""

    stdin: str = ""
    stdout_bytes: int | None = Field(None, ge=1)

    def most_stdout(self, limits: "Limits") -> int:
        return min(limits.output_bytes, self.stdout_bytes or limits.output_bytes)


class Limits(Wire):
    """What one case may use: CPU seconds of its whole process tree (so that a busy machine makes no verdict), wall
    seconds (bubblewrap does not count waiting for a CPU), memory of the tree (and address space of each process),
    processes with threads, files written, bytes to stdout and to stderr each. Compiling has its own time, and four
    times the memory.

    After `timeouts` cases over their time the program's other cases are not run and count as over it, too.
    """

    seconds: float = Field(4.0, gt=0, le=120)
    wall_seconds: float = Field(10.0, gt=0, le=300)
    memory_mb: int = Field(512, ge=32, le=16384)
    processes: int = Field(32, ge=1, le=512)
    disk_mb: int = Field(16, ge=1, le=1024)
    output_bytes: int = Field(2**20, ge=1, le=2**26)
    compile_seconds: float = Field(30.0, gt=0, le=120)
    timeouts: int = Field(3, ge=1)


class CaseResult(Wire):
    """`ok`: the program ended by itself with exit code 0. `crash`: with another, or by a signal (128 + its number).

    `timeout`, `memory` and `output`: it was ended at that limit. `compile`: it does not compile. `deadline` and `error`
    are no fault of the program: the request's time was up, or the machine too busy to run it; the sandbox failed.
    `stdout` is text (UTF-8, bad bytes replaced), `stderr` its end, `seconds` wall time.
    """

    status: Status
    stdout: str = ""
    stderr: str = ""
    exit_code: int | None = None
    seconds: float = Field(0.0, ge=0)
    detail: str = ""


Reader = Callable[[int, CaseResult], Awaitable[CaseResult]]
"""From a case's place and its result to what of the result is kept."""


class Sandbox(Protocol):
    """`run` gives one result a case, in order, and raises nothing for what a program or a provider does. `read` is
    called with each result of a case that was run as it arrives, so that not all outputs are in memory at once.

    `deadline` is in time.monotonic() seconds: what is not done by then has the status `deadline`. `start` raises
    StartupError when the sandbox cannot be set up; `state()` is "ok", or why programs cannot be run at the moment.
    """

    languages: frozenset[str]

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def state(self) -> str: ...

    async def run(
        self, program: Program, cases: list[Case], limits: Limits, deadline: float, read: Reader | None = None
    ) -> list[CaseResult]: ...


class Busy(Exception):
    """As many programs wait as may."""


class Places:
    """At most `concurrency` cases run at once. Their programs, at most PROGRAMS_A_PLACE times as many, take turns, so
    that few of them hold binaries and outputs in memory; at most `queue` others wait, first come first served."""

    def __init__(self, concurrency: int, queue: int):
        self.free = asyncio.Semaphore(concurrency)
        self.programs = asyncio.Semaphore(PROGRAMS_A_PLACE * concurrency)
        self.queue = queue
        self.waiting = 0

    @asynccontextmanager
    async def program(self, deadline: float) -> AsyncIterator[None]:
        """Raises Busy, and TimeoutError where no turn came by `deadline` (time.monotonic() seconds)."""
        if self.waiting >= self.queue:
            raise Busy(f"the sandbox is busy: {self.waiting} programs wait")
        self.waiting += 1
        WAITING.set(self.waiting)
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                await self.programs.acquire()
        finally:
            self.waiting -= 1
            WAITING.set(self.waiting)
        try:
            yield
        finally:
            self.programs.release()


async def admitted(
    places: Places, cases: list[Case], deadline: float, run: Callable[[], Awaitable[list[CaseResult]]]
) -> list[CaseResult]:
    """What `run` gives once the program had its turn, or the same fault for every case."""
    try:
        async with places.program(deadline):
            return await run()
    except TimeoutError:
        fault = CaseResult(status="deadline", detail=LATE)
    except Busy as busy:
        fault = CaseResult(status="error", detail=str(busy))
    return [fault] * len(cases)


async def one_by_one(
    places: Places,
    cases: list[Case],
    limits: Limits,
    deadline: float,
    run_one: Callable[[Case], Awaitable[CaseResult]],
    read: Reader | None = None,
) -> list[CaseResult]:
    """A program whose cases are runs of their own: it is admitted, and each of them waits for a place."""

    async def placed(case: Case) -> CaseResult:
        async with places.free:
            return await run_one(case)

    return await admitted(places, cases, deadline, lambda: in_turn(cases, limits, deadline, placed, read))


async def in_turn(
    cases: list[Case],
    limits: Limits,
    deadline: float,
    run_one: Callable[[Case], Awaitable[CaseResult]],
    read: Reader | None = None,
) -> list[CaseResult]:
    """The program's cases one after another, so that many programs share the places fairly.

    A case that failed through no fault of the program ends the run: the cases after it share its result.
    """
    results: list[CaseResult] = []
    for place, case in enumerate(cases):
        if sum(result.status == "timeout" for result in results) >= limits.timeouts:
            detail = f"not run: {limits.timeouts} cases before it were over their time"
            results += [CaseResult(status="timeout", detail=detail)] * (len(cases) - place)
            break
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                result = await run_one(case)
        except TimeoutError:
            result = CaseResult(status="deadline", detail=LATE)
        if result.status in FAULTS:
            results += [result] * (len(cases) - place)
            break
        results.append(await read(place, result) if read else result)
    for result in results:
        CASES.labels(result.status).inc()
    return results
