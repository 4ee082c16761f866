"""The FastAPI app that every service starts from: auth, limits, deadlines, problem+json errors, health, metrics.

Wire rules that hold on every route: errors are RFC 9457 `application/problem+json`; bodies are JSON, or msgpack
(`Content-Type` / `Accept: application/msgpack`); NaN and infinity are refused; `X-Request-Id` is echoed and logged;
`X-Deadline-Seconds` bounds the whole call (504 when it passes).
"""

import asyncio
import base64
import hmac
import ipaddress
import json
import logging
import os
import re
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

import orjson
import uvicorn
from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services import codec, connections, traces
from services.address import listen
from services.body import SMALL, NotPlain, TooMuch, read_json, read_msgpack
from services.problem import Problem, field_name, problem_response, validation_problem
from services.request import request_id
from services.startup import StartupError
from services.supervisor import EXIT_FAILED

log = logging.getLogger(__name__)

MSGPACK = "application/msgpack"
OPEN_PATHS = frozenset({"/healthz", "/readyz", "/metrics", "/docs", "/openapi.json"})
OPEN_FOLDER = "/static-offline-docs/"
"""Served without a token and outside the concurrency limit: probes and scrapers must get through a busy server."""
ABANDONED = frozenset({"/v1/execute", "/v1/rewards", "/v1/score"})
"""Calls that only compute for their caller: they end when it closes the connection."""
DEATH_SECONDS = 10.0
"""For readiness probes to see why a process is about to end."""
REQUEST_ID = re.compile(r"^[A-Za-z0-9._:-]{1,128}$")

REQUESTS = Counter("rlif_http_requests_total", "HTTP requests by route and status", ["service", "route", "status"])
SECONDS = Histogram(
    "rlif_http_request_seconds",
    "Time from the first byte of a request to the last of its answer",
    ["service", "route"],
    buckets=(0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 600),
)
IN_FLIGHT = Gauge("rlif_http_requests_in_flight", "Requests being served", ["service"])


@dataclass(frozen=True)
class HttpSettings:
    host: str = "127.0.0.1"
    api_token: str | None = None
    admin_token: str | None = None
    max_body_bytes: int = 64 * 2**20
    max_concurrent: int = 1024
    """Trainers that post one sample a call have a whole batch of calls open."""
    body_seconds: float = 60.0
    """How long a client may be silent in the middle of a body, before it loses its place to others."""


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def settings_from_environment(host: str) -> HttpSettings:
    """Tokens come from RLIF_API_TOKEN and RLIF_ADMIN_TOKEN alone. Raises StartupError: no token beyond loopback, or
    one for both."""
    api_token = os.environ.get("RLIF_API_TOKEN") or None
    admin_token = os.environ.get("RLIF_ADMIN_TOKEN") or None
    if api_token is None and not is_loopback(host):
        raise StartupError(f"--host {host}: set RLIF_API_TOKEN to serve beyond this machine, or bind to 127.0.0.1")
    if api_token is not None and api_token == admin_token:
        raise StartupError("RLIF_ADMIN_TOKEN: is the same as RLIF_API_TOKEN, so that every caller could change state")
    return HttpSettings(host=host, api_token=api_token, admin_token=admin_token)


# ---- msgpack beside JSON ---------------------------------------------------------------------------------------


class _BodyRequest(Request):
    """Reads msgpack where the client sent it, else strict JSON (the standard library would accept NaN)."""

    async def json(self) -> Any:
        body = await self.body()
        try:
            return await _in_thread(len(body), read_msgpack if self.scope.get("rlif.msgpack") else read_json, body)
        except TooMuch as error:
            raise _Refused(Problem(413, "The body is too large", str(error))) from error
        except NotPlain as error:
            field = field_name(error.path)
            raise _Refused(Problem(422, "The request is not valid", str(error), field)) from error
        except json.JSONDecodeError:
            raise
        except ValueError as error:
            raise json.JSONDecodeError(f"not a msgpack message: {error}", "", 0) from error


class _Refused(HTTPException):
    """FastAPI lets HTTPException through while it reads a body, and hides any other error."""

    def __init__(self, problem: Problem):
        super().__init__(problem.status, problem.detail)
        self.problem = problem


async def _in_thread(size: int, work: Callable[..., Any], *arguments: Any) -> Any:
    """Work on so many bytes; not in a thread where that is less than a thread's wake-up."""
    return await asyncio.to_thread(work, *arguments) if size > SMALL else work(*arguments)


class _NegotiatedRoute(APIRoute):
    def _packed(self, body: bytes) -> bytes:
        """The JSON of an answer as msgpack; its model knows what in it are arrays."""
        answer = orjson.loads(body)
        if isinstance(self.response_model, type) and issubclass(self.response_model, BaseModel):
            answer = self.response_model.model_validate(answer)
        return codec.pack(answer, exclude_none=self.response_model_exclude_none)

    def get_route_handler(self) -> Callable:
        handle = super().get_route_handler()

        async def negotiated(request: Request) -> Response:
            if request.headers.get("content-type", "").split(";")[0].strip() == MSGPACK:
                request.scope["rlif.msgpack"] = True
                MutableHeaders(scope=request.scope)["content-type"] = "application/json"
            response = await handle(_BodyRequest(request.scope, request.receive))
            wanted = MSGPACK in request.headers.get("accept", "")
            if wanted and response.media_type == "application/json" and response.body:
                packed = await _in_thread(len(response.body), self._packed, bytes(response.body))
                return Response(packed, response.status_code, media_type=MSGPACK)
            return response

        return negotiated


# ---- the gate in front of every route --------------------------------------------------------------------------


class _Gate:
    """ASGI middleware: request id, token, body size, concurrency, deadline, access log, metrics."""

    def __init__(self, app: ASGIApp, service: str, settings: HttpSettings, pages: frozenset[str]):
        self.app, self.service, self.settings, self.pages = app, service, settings, pages
        self.in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id.set(given if REQUEST_ID.match(given) else uuid.uuid4().hex)
        if _is_open(scope["path"]):
            return await self._handle(scope, headers, receive, send)
        parent = headers.get(traces.HEADER, "") if self._is_known(scope, headers) else ""
        with traces.span(scope["method"], "server", parent=parent):
            await self._handle(scope, headers, receive, send)

    def _is_known(self, scope: Scope, headers: Headers) -> bool:
        """Whose word counts on which trace this belongs to, and whether it is kept."""
        try:
            self._authorise(scope, headers)
        except Problem:
            return False
        return True

    async def _handle(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        started, status, finished = time.perf_counter(), 0, False

        async def answer(message: Message) -> None:
            nonlocal status, finished
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id.get()
            finished = message["type"] == "http.response.body" and not message.get("more_body")
            await send(message)

        counted = not _is_open(scope["path"])
        watching: asyncio.Task | None = None
        self.in_flight += counted
        IN_FLIGHT.labels(self.service).set(self.in_flight)
        try:
            deadline = self._admit(scope, headers)
            async with asyncio.timeout(deadline) as limit:
                bounded = self._bounded(receive)

                async def noticing() -> Message:
                    nonlocal watching
                    message = await bounded()
                    if watching is None and scope["path"] in ABANDONED and not message.get("more_body"):
                        watching = asyncio.create_task(_end_with_client(receive, limit, lambda: finished))
                    return message

                await self.app(scope, noticing, answer)
        except Problem as problem:
            await problem_response(problem)(scope, receive, answer)
        except TimeoutError:
            if status or not limit.expired():
                raise
            if watching and watching.done():
                return  # nobody is there to be answered
            late = Problem(504, "The deadline passed", f"X-Deadline-Seconds: {deadline:g} s were not enough")
            await problem_response(late)(scope, receive, answer)
        except Exception as error:
            log.error("%s %s failed", scope["method"], _shown_path(scope), exc_info=error)
            if status:
                raise
            crash = Problem(500, "Internal error", f"logged under request id {request_id.get()}")
            await problem_response(crash)(scope, receive, answer)
        finally:
            if watching:
                watching.cancel()
            self.in_flight -= counted
            IN_FLIGHT.labels(self.service).set(self.in_flight)
            seconds = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", None) or ("unmatched" if status == 404 else "other")
            REQUESTS.labels(self.service, route, str(status if finished else 499)).inc()
            SECONDS.labels(self.service, route).observe(seconds)
            if counted:
                traces.describe(
                    f"{scope['method']} {route}",
                    {
                        "http.request.method": scope["method"],
                        "http.route": route,
                        "http.response.status_code": status,
                        "rlif.request_id": request_id.get(),
                    },
                )
            level = logging.INFO if counted else logging.DEBUG
            log.log(level, "%s %s -> %s in %.3f s", scope["method"], _shown_path(scope), status or "gone", seconds)

    def _admit(self, scope: Scope, headers: Headers) -> float | None:
        """The deadline in seconds, or none. Raises Problem."""
        if _is_open(scope["path"]):
            return None
        self._check_host(headers)
        try:
            self._authorise(scope, headers)
        except Problem as refusal:
            if scope["path"] not in self.pages:
                raise
            scope["rlif.refusal"] = refusal
        if self.in_flight > self.settings.max_concurrent:
            limit = self.settings.max_concurrent
            raise Problem(429, "Too many requests", f"{limit} requests are being served already", retry_after=1)
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self.settings.max_body_bytes:
            raise Problem(413, "The body is too large", f"at most {self.settings.max_body_bytes} bytes (got {length})")
        text = headers.get("x-deadline-seconds")
        return None if text is None else _positive_seconds(text)

    def _check_host(self, headers: Headers) -> None:
        """Where no token is asked, a page could make its own name mean this machine, and so call as if from here."""
        given = headers.get("host")
        if self.settings.api_token or given is None:  # browsers always name the host
            return
        name = _host_name(given)
        if not is_loopback(name) and name != self.settings.host.lower():
            valid = f"localhost, 127.0.0.1, [::1] or {self.settings.host}"
            detail = f"{valid} (got {given:.100}); with RLIF_API_TOKEN set the server may have any name"
            raise Problem(421, "The server has no such name", detail, "Host")

    def _authorise(self, scope: Scope, headers: Headers) -> None:
        api, admin = self.settings.api_token, self.settings.admin_token
        scheme, _, given = headers.get("authorization", "").partition(" ")
        is_bearer = scheme.lower() == "bearer"
        token = given.strip() if is_bearer else _password(given) if scheme.lower() == "basic" else ""
        # A browser sends Basic credentials by itself, also where another site's page asks it to.
        is_api, is_admin = _same(token, api), is_bearer and _same(token, admin)
        if (api or admin) and token and not (is_api or is_admin):
            raise Problem(401, "Wrong token", "Authorization: the token is not the one this server knows")
        if api and not (is_api or is_admin):
            raise Problem(401, "Token needed", "Authorization: send `Bearer <token>`")
        # Without an admin token, whoever may call a loopback server may also change it.
        scope["rlif.admin"] = is_admin if admin else is_loopback(self.settings.host)

    def _bounded(self, receive: Receive) -> Receive:
        seen, is_whole = 0, False

        async def bounded() -> Message:
            nonlocal seen, is_whole
            if is_whole:  # what still comes is the end of the connection
                return await receive()
            try:
                async with asyncio.timeout(self.settings.body_seconds) as limit:
                    message = await receive()
            except TimeoutError:
                if not limit.expired():
                    raise
                raise HTTPException(408, f"no more of the body came within {self.settings.body_seconds:g} s") from None
            is_whole = not message.get("more_body", False)
            seen += len(message.get("body", b""))
            if seen > self.settings.max_body_bytes:
                raise HTTPException(413, f"at most {self.settings.max_body_bytes} bytes")
            return message

        return bounded


async def _end_with_client(receive: Receive, limit: asyncio.Timeout, is_answered: Callable[[], bool]) -> None:
    """Call once the body is whole: what comes then is the end of the connection, or of the answer."""
    while (await receive())["type"] != "http.disconnect":
        pass
    if not is_answered():
        limit.reschedule(asyncio.get_running_loop().time())


def _host_name(host: str) -> str:
    """Of a Host header, without the port and the brackets of IPv6; empty when it is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDER)


def _shown_path(scope: Scope) -> str:
    """The path as it was sent: decoded it may hold line breaks, and with them log lines of the client's making."""
    return quote(scope["path"][:200], safe="/:@!$&'()*+,;=")


def _password(credentials: str) -> str:
    """Of Basic authorization: what a client sends for http://:TOKEN@host, and all that some trainers' clients can."""
    try:
        return base64.b64decode(credentials, validate=True).decode().partition(":")[2]
    except ValueError:
        return ""


def _same(given: str, known: str | None) -> bool:
    return known is not None and hmac.compare_digest(given.encode(), known.encode())


def _positive_seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds <= 86400:
        raise Problem(400, "Bad header", f"a number of seconds in (0, 86400] (got {text!r:.50})", "X-Deadline-Seconds")
    return seconds


def remaining_seconds(request: Request, default: float) -> float:
    """What the caller's `X-Deadline-Seconds` allows, or `default`."""
    text = request.headers.get("x-deadline-seconds")
    return default if text is None else min(default, _positive_seconds(text))


def _check_admin(request: Request) -> None:
    if not request.scope.get("rlif.admin"):
        raise Problem(403, "Admin token needed", "this route changes state: send the admin token as bearer token")


require_admin = Depends(_check_admin)


# ---- the app ---------------------------------------------------------------------------------------------------


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
    app.router.route_class = _NegotiatedRoute
    app.state.death = death
    app.add_middleware(_Gate, service=service, settings=settings, pages=pages)

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
        refusal = error.problem if isinstance(error, _Refused) else Problem(error.status_code, str(error.detail))
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


def serve(app: FastAPI, host: str, port: int, drain_seconds: int = 30) -> None:
    """Serve until SIGTERM or SIGINT, then finish running requests for at most `drain_seconds`.

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
