"""Programs on a Piston server (github.com/engineer-man/piston, API v2): `POST /api/v2/execute`, one call a case.

It compiles C++ anew for every case. Times go out in milliseconds and memory in bytes; a server refuses more than it is
configured for (3 s of `run_timeout` unless raised). Newer servers name a stage's end in `status`: TO (time), OL and EL
(output), RE and SG (the program's own), XX (the server's); older ones only say by which signal it ended.
"""

import time
from functools import partial
from typing import Any

import httpx

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
    one_by_one,
)
from reward_server.sandbox.wire import Fault, client, clipped, exchange
from services.startup import StartupError

NAMES: dict[Language, tuple[str, str]] = {"python": ("python", "main.py"), "cpp": ("c++", "main.cpp")}
CHECK_SECONDS = 20.0
STDERR_TAIL = 4096


class Piston(Sandbox):
    """`url` is the server's, without `/api/v2`. Its languages are those that it has installed."""

    def __init__(self, url: str, concurrency: int = 64, queue: int = 4096):
        self.url = f"{url.rstrip('/')}/api/v2"
        self.places = Places(concurrency, queue)
        self.languages = frozenset()
        self.versions: dict[str, str] = {}
        self._http: httpx.AsyncClient | None = None
        self.health = Health(self._check)

    async def start(self) -> None:
        """Raises StartupError: the server does not say which languages it has."""
        self._http = client()
        try:
            runtimes = await self._check()
            for name, (theirs, _) in NAMES.items():
                for runtime in runtimes:
                    if theirs == runtime["language"] or theirs in runtime["aliases"]:
                        self.versions[name] = runtime["version"]
        except (Fault, TimeoutError, TypeError, KeyError) as error:
            raise StartupError(f"--sandbox piston: {str(error) or type(error).__name__}") from error
        if not self.versions:
            raise StartupError(f"--sandbox piston: {self.url} has neither python nor c++ installed")
        self.languages = frozenset(self.versions)

    async def stop(self) -> None:
        self.health.stop()
        if self._http:
            await self._http.aclose()

    def state(self) -> str:
        return self.health.state

    async def run(
        self, program: Program, cases: list[Case], limits: Limits, deadline: float, read: Reader | None = None
    ) -> list[CaseResult]:
        if program.language not in self.languages:
            detail = f"the Piston server has no {program.language}"
            return [CaseResult(status="error", detail=detail)] * len(cases)

        one = partial(self._case, program, limits, deadline)
        return await one_by_one(self.places, cases, limits, deadline, one, read)

    async def _case(self, program: Program, limits: Limits, deadline: float, case: Case) -> CaseResult:
        assert self._http is not None
        language, file = NAMES[program.language]
        body = {
            "language": language,
            "version": self.versions[program.language],
            "files": [{"name": file, "content": program.source}],
            "stdin": case.stdin,
            "compile_timeout": int(1000 * limits.compile_seconds),
            "run_timeout": int(1000 * limits.wall_seconds),
            "run_memory_limit": limits.memory_mb * 2**20,
        }
        started = time.monotonic()
        try:
            answer = await exchange(self._http, "POST", f"{self.url}/execute", body, deadline)
        except Fault as fault:
            self.health.broke(str(fault))
            return CaseResult(status="error", detail=str(fault), seconds=time.monotonic() - started)
        self.health.worked()
        try:
            return _read(answer, limits, case.most_stdout(limits), time.monotonic() - started)
        except Fault as fault:
            return CaseResult(status="error", detail=str(fault), seconds=time.monotonic() - started)

    async def _check(self) -> Any:
        assert self._http is not None
        return await exchange(self._http, "GET", f"{self.url}/runtimes", None, time.monotonic() + CHECK_SECONDS)


def _read(answer: Any, limits: Limits, most_stdout: int, seconds: float) -> CaseResult:
    """Raises Fault: the server failed, or this is no answer of Piston's."""
    compiled, ran = (answer.get("compile"), answer.get("run")) if isinstance(answer, dict) else (None, None)
    if not isinstance(ran, dict):
        raise Fault(f"Piston failed: {str(answer)[:300]}")
    for stage in (compiled, ran):
        if stage and stage.get("status") == "XX":
            raise Fault(f"Piston failed: {stage.get('message')}")
    if compiled and (compiled.get("code") != 0 or compiled.get("status")):
        return CaseResult(status="compile", stderr=clipped(compiled.get("stderr"), STDERR_TAIL), detail="compile error")
    status, code, signal = ran.get("status"), ran.get("code"), ran.get("signal")
    stderr = clipped(ran.get("stderr"), STDERR_TAIL)
    # Older servers end a program by SIGKILL at the time limit, as the kernel does at the memory limit.
    if status == "TO" or (status is None and signal == "SIGKILL" and seconds >= limits.wall_seconds):
        detail = f"no end within {limits.wall_seconds:g} s"
        return CaseResult(status="timeout", stderr=stderr, seconds=seconds, detail=detail)
    stdout = ran.get("stdout") or ""
    if status in ("OL", "EL") or len(stdout.encode(errors="replace")) > most_stdout:
        return CaseResult(status="output", stderr=stderr, seconds=seconds, detail="more output than allowed")
    if status is None and signal is None and not isinstance(code, int):
        raise Fault(f"Piston failed: {str(ran)[:300]}")
    ended_well = code == 0 and signal is None and not status
    return CaseResult(
        status="ok" if ended_well else "crash",
        stdout=stdout,
        stderr=stderr,
        exit_code=code if isinstance(code, int) else None,
        seconds=seconds,
        detail="" if ended_well else f"ended by {signal}" if signal else "",
    )
