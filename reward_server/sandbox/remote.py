"""Programs on a sandbox service of rlif's own (`rlif serve sandbox`), and the bodies of its one route."""

import time

from pydantic import Field

from reward_server.sandbox.health import Health
from reward_server.sandbox.provider import Case, CaseResult, Limits, Program, Reader, Sandbox
from services.clients import CallError, DeadlinePassed, Refused, ServiceClient
from services.contract import Wire
from services.startup import StartupError

RETRY_SECONDS = 30.0
CHECK_SECONDS = 30.0


class ExecuteRequest(Wire):
    program: Program
    cases: list[Case] = Field(min_length=1, max_length=1024)
    limits: Limits = Limits()


class ExecuteResponse(Wire):
    """`results` in the order of the cases."""

    results: list[CaseResult]


class Languages(Wire):
    languages: list[str]


class RemoteSandbox(Sandbox):
    def __init__(self, url: str, token: str | None = None):
        try:
            self.client = ServiceClient(url, token, retry_seconds=RETRY_SECONDS)
        except ValueError as error:
            raise StartupError(f"--sandbox {error}") from error
        self.languages = frozenset()
        self.health = Health(self._check)

    async def start(self) -> None:
        """Raises StartupError: the service cannot be reached."""
        try:
            found = await self._check()
        except CallError as error:
            raise StartupError(f"--sandbox: {error}") from error
        self.languages = frozenset(found.languages)

    async def _check(self) -> Languages:
        return await self.client.call("GET", "/v1/languages", Languages, deadline_seconds=CHECK_SECONDS)

    async def stop(self) -> None:
        self.health.stop()
        await self.client.close()

    def state(self) -> str:
        return self.health.state

    async def run(
        self, program: Program, cases: list[Case], limits: Limits, deadline: float, read: Reader | None = None
    ) -> list[CaseResult]:
        body = ExecuteRequest(program=program, cases=cases, limits=limits)
        seconds = deadline - time.monotonic()
        try:
            answer = await self.client.call("POST", "/v1/execute", ExecuteResponse, body, max(seconds, 0.001))
        except DeadlinePassed:
            return [CaseResult(status="deadline", detail="the request's deadline passed")] * len(cases)
        except CallError as error:
            if not isinstance(error, Refused):
                self.health.broke(str(error))
            return [CaseResult(status="error", detail=str(error))] * len(cases)
        if len(answer.results) != len(cases):
            detail = f"{self.client.url}: {len(cases)} cases, but {len(answer.results)} results"
            return [CaseResult(status="error", detail=detail)] * len(cases)
        self.health.worked()
        if read is None:
            return answer.results
        return [await read(place, result) for place, result in enumerate(answer.results)]
