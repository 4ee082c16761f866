"""Programs on a SandboxFusion server (github.com/bytedance/SandboxFusion): `POST /run_code`, one call a case.

It compiles C++ anew for every case, and counts wall time alone: `limits.wall_seconds` is its `run_timeout`. Its
`processes` and `disk_mb` are the server's own affair.
"""

import time
from functools import partial
from typing import Any

import httpx

from reward_server.sandbox.health import Health
from reward_server.sandbox.provider import Case, CaseResult, Limits, Places, Program, Reader, Sandbox, one_by_one
from reward_server.sandbox.wire import Fault, client, clipped, exchange

ACCEPTED = ("Success", "Failed")
FINISHED, LATE = "Finished", "TimeLimitExceeded"
STDERR_TAIL = 4096
CHECK_SECONDS = 10.0


class SandboxFusion(Sandbox):
    languages = frozenset({"python", "cpp"})

    def __init__(self, url: str, concurrency: int = 64, queue: int = 4096):
        self.url = url.rstrip("/")
        self.places = Places(concurrency, queue)
        self._http: httpx.AsyncClient | None = None
        self.health = Health(self._check)

    async def start(self) -> None:
        self._http = client()

    async def stop(self) -> None:
        self.health.stop()
        if self._http:
            await self._http.aclose()

    def state(self) -> str:
        return self.health.state

    async def run(
        self, program: Program, cases: list[Case], limits: Limits, deadline: float, read: Reader | None = None
    ) -> list[CaseResult]:
        one = partial(self._case, program, limits, deadline)
        return await one_by_one(self.places, cases, limits, deadline, one, read)

    async def _case(self, program: Program, limits: Limits, deadline: float, case: Case) -> CaseResult:
        assert self._http is not None
        body = {
            "code": program.source,
            "language": program.language,
            "stdin": case.stdin,
            "compile_timeout": limits.compile_seconds,
            "run_timeout": limits.wall_seconds,
            "memory_limit_MB": limits.memory_mb,
            "files": {},
            "fetch_files": [],
        }
        started = time.monotonic()
        try:
            answer = await exchange(self._http, "POST", f"{self.url}/run_code", body, deadline)
        except Fault as fault:
            self.health.broke(str(fault))
            return CaseResult(status="error", detail=str(fault), seconds=time.monotonic() - started)
        self.health.worked()
        try:
            return _read(answer, limits, case.most_stdout(limits))
        except Fault as fault:
            return CaseResult(status="error", detail=str(fault), seconds=time.monotonic() - started)

    async def _check(self) -> None:
        assert self._http is not None
        await exchange(self._http, "GET", f"{self.url}/v1/ping", None, time.monotonic() + CHECK_SECONDS)


def _read(answer: Any, limits: Limits, most_stdout: int) -> CaseResult:
    """Raises Fault: the server failed, or this is no answer of SandboxFusion's."""
    if not isinstance(answer, dict) or answer.get("status") not in ACCEPTED:
        said = answer.get("message", answer) if isinstance(answer, dict) else answer
        raise Fault(f"SandboxFusion failed: {str(said)[:300]}")
    compiled, ran = answer.get("compile_result"), answer.get("run_result")
    if compiled and (compiled.get("status") != FINISHED or compiled.get("return_code")):
        return CaseResult(status="compile", stderr=clipped(compiled.get("stderr"), STDERR_TAIL), detail="compile error")
    if not isinstance(ran, dict):
        raise Fault("SandboxFusion failed: the answer has no run_result")
    stdout = ran.get("stdout") or ""
    common = {"stderr": clipped(ran.get("stderr"), STDERR_TAIL), "seconds": ran.get("execution_time") or 0.0}
    if ran.get("status") == LATE:
        return CaseResult(status="timeout", detail=f"no end within {limits.wall_seconds:g} s", **common)
    if ran.get("status") != FINISHED or not isinstance(ran.get("return_code"), int):
        raise Fault(f"SandboxFusion failed: run_result.status is {ran.get('status')!r}")
    if len(stdout.encode(errors="replace")) > most_stdout:
        return CaseResult(status="output", detail=f"more than {most_stdout} bytes to stdout", **common)
    code = ran["return_code"]
    return CaseResult(status="ok" if code == 0 else "crash", stdout=stdout, exit_code=code, **common)
