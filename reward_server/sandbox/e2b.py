"""Programs in E2B's cloud (e2b.dev), by its own SDK (`pip install 'rlif[e2b]'`), with the key in E2B_API_KEY.

One of their sandboxes, without internet, serves one program: its cases run there one after another, so that a program
may see what its earlier cases left behind. The SDK's settings (E2B_API_URL, E2B_DOMAIN, ...) are read by the SDK. C++
needs a template with g++.
"""

import asyncio
import os
import time
from typing import Any

from reward_server.sandbox.health import Health
from reward_server.sandbox.provider import (
    Case,
    CaseResult,
    Language,
    Limits,
    Places,
    Program,
    Reader,
    Sandbox,
    admitted,
    in_turn,
)
from services.startup import StartupError

SOURCE: dict[Language, str] = {"python": "main.py", "cpp": "main.cpp"}
RUN: dict[Language, str] = {"python": "python3 -I main.py", "cpp": "./main"}
COMPILE = "g++ -O2 -std=gnu++17 -o main main.cpp"
NOT_FOUND = 127
STDERR_TAIL = 4096
REQUEST_SECONDS = 30.0
GRACE_SECONDS = 5.0
"""The SDK does not always raise when a command's time is up; then we do, a little later."""
CHECK_SECONDS = 20.0


class E2B(Sandbox):
    languages = frozenset({"python", "cpp"})

    def __init__(self, concurrency: int = 16, queue: int = 4096):
        self.places = Places(concurrency, queue)
        self.health = Health(self._check)

    async def start(self) -> None:
        """Raises StartupError: no SDK, or no key."""
        try:
            import e2b  # noqa: F401
        except ImportError as error:
            raise StartupError("--sandbox e2b needs the package e2b (pip install 'rlif[e2b]')") from error
        if not os.environ.get("E2B_API_KEY"):
            raise StartupError("--sandbox e2b: set E2B_API_KEY")

    async def stop(self) -> None:
        self.health.stop()

    def state(self) -> str:
        return self.health.state

    async def run(
        self, program: Program, cases: list[Case], limits: Limits, deadline: float, read: Reader | None = None
    ) -> list[CaseResult]:
        return await admitted(
            self.places, cases, deadline, lambda: self._served(program, cases, limits, deadline, read)
        )

    async def _served(
        self, program: Program, cases: list[Case], limits: Limits, deadline: float, read: Reader | None
    ) -> list[CaseResult]:
        """Raises TimeoutError at the deadline."""
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())), self.places.free:
                return await self._run(program, cases, limits, deadline, read)
        except TimeoutError:
            raise
        except Exception as error:  # the SDK's, and those of the HTTP libraries below it
            fault = CaseResult(status="error", detail=f"E2B failed: {type(error).__name__}: {error}"[:300])
            self.health.broke(fault.detail)
            return [fault] * len(cases)

    async def _run(
        self, program: Program, cases: list[Case], limits: Limits, deadline: float, read: Reader | None
    ) -> list[CaseResult]:
        from e2b import AsyncSandbox

        seconds = limits.compile_seconds + (limits.wall_seconds + GRACE_SECONDS) * len(cases) + REQUEST_SECONDS
        box = await AsyncSandbox.create(
            timeout=int(min(seconds, deadline - time.monotonic())) + 1,
            allow_internet_access=False,
            request_timeout=REQUEST_SECONDS,
        )
        try:
            await box.files.write(SOURCE[program.language], program.source)
            if program.language == "cpp":
                built = await _command(box, COMPILE, limits.compile_seconds)
                if built.status != "ok":
                    status = "error" if built.exit_code == NOT_FOUND else "compile"
                    detail = "the E2B template has no g++" if status == "error" else built.detail or "compile error"
                    return [built.model_copy(update={"status": status, "detail": detail})] * len(cases)

            async def one(case: Case) -> CaseResult:
                await box.files.write("input", case.stdin)
                most = case.most_stdout(limits)
                result = await _command(box, _guarded(program.language, limits, most), limits.wall_seconds)
                if len(result.stdout.encode(errors="replace")) > most:
                    detail = f"more than {most} bytes to stdout"
                    return CaseResult(status="output", seconds=result.seconds, detail=detail)
                return result

            results = await in_turn(cases, limits, deadline, one, read)
            self.health.worked()
            return results
        finally:
            await box.kill(request_timeout=REQUEST_SECONDS)

    async def _check(self) -> None:
        from e2b import AsyncSandbox

        await AsyncSandbox.list(request_timeout=CHECK_SECONDS).next_items()


def _guarded(language: Language, limits: Limits, most_stdout: int) -> str:
    """The shell command of one case: limits of each process, and outputs cut off where they are too long."""
    bounds = f"ulimit -v {limits.memory_mb * 1024} -t {int(limits.seconds) + 1} -f {limits.disk_mb * 1024} -c 0"
    piped = f"{RUN[language]} < input 2> errors | head -c {most_stdout + 1}"
    return f"set -o pipefail; ({bounds}; {piped}); code=$?; tail -c {STDERR_TAIL} errors >&2; exit $code"


async def _command(box: Any, command: str, seconds: float) -> CaseResult:
    """Raises whatever the SDK raises for its own failures."""
    from e2b import CommandExitException, TimeoutException

    started = time.monotonic()
    late = CaseResult(status="timeout", detail=f"no end within {seconds:g} s", seconds=seconds)
    limit = asyncio.timeout(seconds + GRACE_SECONDS)
    try:
        async with limit:
            done: Any = await box.commands.run(command, timeout=seconds, request_timeout=REQUEST_SECONDS)
    except CommandExitException as ended:
        done = ended
    except TimeoutException as error:
        if type(error) is not TimeoutException:  # its subclasses say that the sandbox is gone
            raise
        return late
    except TimeoutError:
        if not limit.expired():
            raise
        return late
    return CaseResult(
        status="ok" if done.exit_code == 0 else "crash",
        stdout=done.stdout,
        stderr=done.stderr[-STDERR_TAIL:],
        exit_code=done.exit_code,
        seconds=time.monotonic() - started,
    )
