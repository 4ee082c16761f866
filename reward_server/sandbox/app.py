"""The sandbox as a service of its own: programs and inputs in, what became of each case out.

It holds no secrets and knows no other service, so it is the one place to give the rights that a sandbox needs, and the
one to put behind a stronger runtime. Programs see nothing of its environment, files or network.
"""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request

from reward_server.sandbox.bubblewrap import Bubblewrap
from reward_server.sandbox.remote import ExecuteRequest, ExecuteResponse, Languages
from services.access import HttpSettings
from services.gate import remaining_seconds
from services.http import create_app
from services.problem import Problem

CALL_SECONDS = 300.0
"""How long a call may take when its client names no deadline."""
LONGEST_CALL_SECONDS = 86400.0


def create(http: HttpSettings, sandbox: Bubblewrap) -> FastAPI:
    """The app. When it starts it raises StartupError unless the sandbox, tried out, holds."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await sandbox.start()
        try:
            yield
        finally:
            await sandbox.stop()

    app = create_app("sandbox", "0.1.0", http, lambda: {"sandbox": sandbox.state()}, lifespan, __doc__ or "")

    @app.get("/v1/languages", tags=["sandbox"])
    async def languages() -> Languages:
        """The languages that programs may be written in."""
        return Languages(languages=sorted(sandbox.languages))

    @app.post("/v1/execute", tags=["sandbox"])
    async def execute(body: ExecuteRequest, request: Request) -> ExecuteResponse:
        """Run one program on each case, every case in a fresh sandbox under the limits.

        Cases not done by the deadline have the status `deadline`; what fails on our side is `error`, and neither says
        anything about the program.
        """
        if body.program.language not in sandbox.languages:
            served = f"one of {', '.join(sorted(sandbox.languages))} (got {body.program.language!r})"
            raise Problem(422, "The language is not served here", served, "program.language")
        if sandbox.places.waiting >= sandbox.places.queue:
            raise Problem(429, "The sandbox is busy", f"{sandbox.places.waiting} programs wait", retry_after=2)
        seconds = CALL_SECONDS
        if "x-deadline-seconds" in request.headers:
            seconds = remaining_seconds(request, LONGEST_CALL_SECONDS)
            seconds -= min(1.0, 0.1 * seconds)  # a margin in which what is there can still be sent
        results = await sandbox.run(body.program, body.cases, body.limits, time.monotonic() + seconds)
        return ExecuteResponse(results=results)

    return app
