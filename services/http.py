"""The FastAPI app that every service starts from: problem+json errors, health, metrics; and how it is served.

Wire rules that hold on every route: errors are RFC 9457 `application/problem+json`; bodies are JSON, or msgpack
(`Content-Type` / `Accept: application/msgpack`); NaN and infinity are refused; `X-Request-Id` is echoed and logged;
`X-Deadline-Seconds` bounds the whole call (504 when it passes).
"""

import logging
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import orjson
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from services import connections
from services.access import HttpSettings
from services.address import listen
from services.gate import Gate
from services.negotiation import MSGPACK, NegotiatedRoute, Refused
from services.problem import Problem, problem_response, validation_problem
from services.startup import StartupError
from services.supervisor import EXIT_FAILED

log = logging.getLogger(__name__)

DEATH_SECONDS = 10.0
"""For readiness probes to see why a process is about to end."""


def create_app(
    service: str,
    version: str,
    settings: HttpSettings,
    ready: Callable[[], dict[str, str]],
    lifespan: Callable | None = None,
    description: str = "",
    pages: frozenset[str] = frozenset(),
    death: Callable[[], str] = str,
) -> FastAPI:
    """An app with health, readiness, metrics and docs; add routes to it.

    `ready()` returns each dependency's state: "ok", or why it is not. It is called on every probe and must be quick.
    `death()` says why the service can never work again, and is empty as long as it can: `serve` then ends the process.
    `pages`: paths for browsers, which send no bearer token of themselves. Their routes are called without one too, and
    answer for themselves what a caller may see; `scope["rlif.refusal"]` then holds the Problem.
    """
    noted = None if lifespan is None else _noting_refusal(lifespan)
    app = FastAPIOffline(
        title=f"rlif {service}", version=version, lifespan=noted, description=description, redoc_url=None
    )
    app.router.route_class = NegotiatedRoute
    app.state.death = death
    app.add_middleware(Gate, service=service, settings=settings, pages=pages)

    @app.exception_handler(Problem)
    async def on_problem(_: Request, problem: Problem) -> Response:
        return problem_response(problem)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> Response:
        kind = request.headers.get("content-type", "").split(";")[0].strip()
        is_unread = any(fault["loc"] == ("body",) and isinstance(fault.get("input"), bytes) for fault in error.errors())
        if is_unread:  # FastAPI hands on what is not called JSON as it came
            detail = f"Content-Type: send application/json or {MSGPACK} (got {kind[:100] or 'none'})"
            return problem_response(Problem(415, "The body is of no type that is read here", detail))
        return validation_problem(error)

    @app.exception_handler(HTTPException)
    async def on_http(_: Request, error: HTTPException) -> Response:
        refusal = error.problem if isinstance(error, Refused) else Problem(error.status_code, str(error.detail))
        return problem_response(refusal)

    @app.get("/healthz", tags=["operations"])
    async def healthz() -> dict[str, str]:
        """The process is alive."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["operations"])
    async def readyz() -> Response:
        """200 when the service can do its work, else 503 with the state of each dependency."""
        states = ready()
        is_ready = all(state == "ok" for state in states.values())
        body = {"status": "ready" if is_ready else "not ready", "dependencies": states}
        return Response(orjson.dumps(body), 200 if is_ready else 503, media_type="application/json")

    @app.get("/metrics", tags=["operations"])
    async def metrics() -> Response:
        """Prometheus text format."""
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    return app


def _noting_refusal(lifespan: Callable) -> Callable:
    """The lifespan, which leaves a StartupError in `app.state.refusal`: uvicorn would only log its traceback."""

    @asynccontextmanager
    async def noted(app: FastAPI) -> AsyncIterator[None]:
        try:
            async with lifespan(app):
                yield
        except StartupError as error:
            app.state.refusal = error
            raise

    return noted


def serve(
    app: FastAPI, host: str, port: int, drain_seconds: int = 30, listening: Callable[[int], None] | None = None
) -> None:
    """Serve until SIGTERM or SIGINT, then finish running requests for at most `drain_seconds`. `listening` is called
    once with the port (`port`, or the one that was free).

    Raises StartupError when the port is busy or the app's start-up failed, and SystemExit (1) DEATH_SECONDS after what
    the service stands on has died: only another process can serve again.
    """
    died_at: float | None = None

    async def look() -> None:
        nonlocal died_at
        if reason := app.state.death():
            died_at = died_at or time.monotonic()
            if time.monotonic() - died_at >= DEATH_SECONDS and not server.should_exit:
                log.critical("the process ends: %s", reason)
                server.should_exit = True

    bound = listen(host, port)
    config = uvicorn.Config(
        app,
        http=connections.protocol(connections.raise_open_files()),
        ws="none",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=drain_seconds,
        timeout_keep_alive=75,
        callback_notify=look,
        timeout_notify=1,
    )
    server = uvicorn.Server(config)
    log.info("listening on http://%s:%d", host, bound.getsockname()[1])
    if listening is not None:
        listening(bound.getsockname()[1])
    logging.getLogger("uvicorn.error").addFilter(lambda _: not hasattr(app.state, "refusal"))
    with bound:
        try:
            server.run(sockets=[bound])
        except SystemExit:  # uvicorn's own code for a start-up that failed
            if server.started:
                raise
    if hasattr(app.state, "refusal"):
        raise app.state.refusal
    if died_at is not None:
        sys.exit(EXIT_FAILED)
    if not server.started:
        raise StartupError("the service failed to start; the log above says why")
