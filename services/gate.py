"""The gate in front of every route: request ids, tokens, bounds on bodies and calls, deadlines, access log, metrics."""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable
from urllib.parse import quote

from fastapi import Request
from prometheus_client import Counter, Gauge, Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services import traces
from services.access import HttpSettings, authorise, check_host
from services.problem import Problem, problem_response
from services.request import request_id

log = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/healthz", "/readyz", "/metrics", "/docs", "/openapi.json"})
OPEN_FOLDER = "/static-offline-docs/"
"""Served without a token and outside the concurrency limit: probes and scrapers must get through a busy server."""
ABANDONED = frozenset({"/v1/execute", "/v1/rewards", "/v1/score"})
"""Calls that only compute for their caller: they end when it closes the connection."""
REQUEST_ID = re.compile(r"^[A-Za-z0-9._:-]{1,128}$")

REQUESTS = Counter("rlif_http_requests_total", "HTTP requests by route and status", ["service", "route", "status"])
SECONDS = Histogram(
    "rlif_http_request_seconds",
    "Time from the first byte of a request to the last of its answer",
    ["service", "route"],
    buckets=(0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 600),
)
IN_FLIGHT = Gauge("rlif_http_requests_in_flight", "Requests being served", ["service"])


class Gate:
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
        if is_open(scope["path"]):
            return await self._handle(scope, headers, receive, send)
        parent = headers.get(traces.HEADER, "") if self._is_known(scope, headers) else ""
        with traces.span(scope["method"], "server", parent=parent):
            await self._handle(scope, headers, receive, send)

    def _is_known(self, scope: Scope, headers: Headers) -> bool:
        """Whose word counts on which trace this belongs to, and whether it is kept."""
        try:
            authorise(self.settings, scope, headers)
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

        counted = not is_open(scope["path"])
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
        if is_open(scope["path"]):
            return None
        check_host(self.settings, headers)
        try:
            authorise(self.settings, scope, headers)
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


def is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDER)


def _shown_path(scope: Scope) -> str:
    """The path as it was sent: decoded it may hold line breaks, and with them log lines of the client's making."""
    return quote(scope["path"][:200], safe="/:@!$&'()*+,;=")


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
