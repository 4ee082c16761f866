"""Clients of the rollout and reward servers: msgpack both ways, open connections, deadlines, retries, clear errors.

A client may be made anywhere and used from any number of tasks, threads and event loops; each loop has connections of
its own, and so has a forked process.

Every call here may be repeated safely (generation and scoring are idempotent by `group_id`), so each is retried with
jittered backoff when the server cannot be reached or says 429, 502 or 503, within `retry_seconds` and the deadline. Any
other answer is final: a `Refused` (4xx) carries what the server said of the request.
"""

import asyncio
import base64
import functools
import itertools
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Coroutine
from email.utils import parsedate_to_datetime
from typing import Any, Self, TypeVar
from urllib.parse import quote, unquote, urlencode
from weakref import WeakKeyDictionary

import httpx
import orjson
from pydantic import BaseModel, TypeAdapter, ValidationError

from services import codec, traces
from services.api import (
    PreviewGroup,
    PreviewRequest,
    PreviewResponse,
    RewardEntry,
    RewardGroup,
    RewardsList,
    RewardsRequest,
    RewardsResponse,
    RolloutRequest,
    RolloutsRequest,
    RolloutsResponse,
    ScoreItem,
    ScoreRequest,
    ScoreResponse,
    SpecEntry,
    SpecsList,
    SpecVersions,
)
from services.request import request_id
from services.spec import RewardSpec

log = logging.getLogger(__name__)

MSGPACK = "application/msgpack"
TRANSIENT = frozenset({429, 502, 503})
"""Answers that say nothing of the request: a busy or restarting server, or a proxy that found none behind it."""
CONNECT_SECONDS = 10.0
LONGEST_DEADLINE = 86400.0
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 30.0

Answer = TypeVar("Answer")


class CallError(Exception):
    """A call that failed; `cause` is a short label for metrics."""

    def __init__(self, url: str, message: str, cause: str):
        super().__init__(f"{url}: {message}")
        self.url, self.cause = url, cause


class Unavailable(CallError):
    """The server could not be reached or is busy. `retry_after` (seconds) when it said when to come back."""

    def __init__(self, url: str, message: str, cause: str, retry_after: float | None = None):
        super().__init__(url, message, cause)
        self.retry_after = retry_after


class DeadlinePassed(CallError, TimeoutError):
    """No answer within the deadline."""


class Refused(CallError):
    """The server refused the request (4xx). `errors` are the faults it named: [{"field", "message"}]."""

    def __init__(self, url: str, status: int, title: str, detail: str, errors: list[dict[str, str]]):
        super().__init__(url, f"{status} {title}" + (f": {detail}" if detail else ""), str(status))
        self.status, self.title, self.detail, self.errors = status, title, detail, errors

    @property
    def fields(self) -> set[str]:
        return {str(error.get("field")) for error in self.errors}


class ServerFault(CallError):
    """The server failed (5xx) or answered something that is not its answer to this request."""


def _insist(url: str, what: str, asked: list[tuple[str, int]], given: list[tuple[str, int]]) -> None:
    """Groups by id and size, in their order. Raises ServerFault when the answer is for others than were asked for."""
    if given != asked:
        raise ServerFault(url, f"asked for {what} {asked}, got {given}"[:600], "answer")


def pause_before(attempt: int, retry_after: float | None = None) -> float:
    """Seconds to wait before attempt number `attempt` (1: the first retry): doubling, jittered by +-50 %, capped.

    A server's own `Retry-After` is never undercut.
    """
    pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(attempt - 1, 16)) * random.uniform(0.5, 1.5)
    return max(pause, retry_after or 0.0)


def retry_after(response: httpx.Response) -> float | None:
    """Seconds; the header carries a number of seconds or an HTTP date."""
    text = response.headers.get("retry-after")
    if text is None:
        return None
    try:
        return max(0.0, float(text) if text.isdigit() else parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None


def _problem(response: httpx.Response) -> tuple[str, str, list[dict[str, str]]]:
    """(title, detail, errors) of a problem+json answer, or of whatever a proxy sent instead."""
    try:
        body = orjson.loads(response.content)
    except orjson.JSONDecodeError:
        body = None
    if not isinstance(body, dict):
        return response.reason_phrase, response.text[:300], []
    errors = body.get("errors")
    errors = [error for error in errors if isinstance(error, dict)] if isinstance(errors, list) else []
    request = f" (request id {body['request_id']})" if "request_id" in body else ""
    return str(body.get("title", response.reason_phrase)), f"{body.get('detail', '')}{request}".strip(), errors


def credentials(url: str) -> tuple[str, str | None]:
    """A URL without its credentials, and what it asks to be sent as `Authorization`: `Bearer TOKEN` for
    http://:TOKEN@host, `Basic ...` where there is a user's name as well. Raises ValueError, which does not quote them.
    """
    found = re.match(r"([^/]*//)([^/?#]*)@", url)
    if found is None:
        return url, None
    bare = found[1] + url[found.end() :]
    user, _, token = (unquote(part) for part in found[2].partition(":"))
    if user:
        return bare, "Basic " + base64.b64encode(f"{user}:{token}".encode()).decode()
    if not (token.isascii() and token.isprintable()):
        raise ValueError(f"the token in the URL of {bare} is not of printable ASCII characters")
    return bare, f"Bearer {token}" if token else None


def _ids() -> dict[str, str]:
    """By what the server's logs and traces can be joined with the caller's."""
    rid, place = request_id.get(), traces.here()
    return ({} if rid == "-" else {"X-Request-Id": rid}) | ({traces.HEADER: place} if place else {})


class ServiceClient:
    """One server. `retry_seconds` is how long transient failures are retried; 0 raises the first.

    `token` is sent as bearer token; `admin_token` instead of it on calls that change the server's state. Credentials in
    the URL replace `token`, and stand in no message.
    Raises ValueError: `url` is not an http(s) URL.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        admin_token: str | None = None,
        retry_seconds: float = 60.0,
        deadline_seconds: float = 600.0,
    ):
        url, self._in_url = credentials(url)
        try:
            valid = httpx.URL(url).scheme in ("http", "https") and bool(httpx.URL(url).host)
        except httpx.InvalidURL:
            valid = False
        if not valid or "[" in url and "]" not in url:
            raise ValueError(f"{url.rpartition('@')[2]!r} is not a server's URL: write it as http://host:port")
        self.url = url.rstrip("/")
        self.token, self.admin_token = token, admin_token
        self.retry_seconds, self.deadline_seconds = retry_seconds, deadline_seconds
        # A connection belongs to the event loop that opened it.
        self._of_loop: WeakKeyDictionary[asyncio.AbstractEventLoop, httpx.AsyncClient] = WeakKeyDictionary()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the running loop's connections; a later call opens new ones."""
        if http := self._of_loop.pop(asyncio.get_running_loop(), None):
            await http.aclose()

    def authorization(self, admin: bool = False) -> dict[str, str]:
        """The header, if any."""
        if admin and self.admin_token:
            return {"Authorization": f"Bearer {self.admin_token}"}
        said = self._in_url or (f"Bearer {self.token}" if self.token else None)
        return {"Authorization": said} if said else {}

    def _http(self) -> httpx.AsyncClient:
        loop = asyncio.get_running_loop()
        if loop not in self._of_loop:
            # The whole call is bounded by its deadline, so httpx only bounds what may hang long before that.
            self._of_loop[loop] = httpx.AsyncClient(
                timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=30.0),
            )
        return self._of_loop[loop]

    async def call(
        self,
        method: str,
        path: str,
        answer: type[Answer],
        body: BaseModel | None = None,
        deadline_seconds: float | None = None,
        admin: bool = False,
    ) -> Answer:
        """Raises Refused, Unavailable, DeadlinePassed or ServerFault."""
        seconds = min(deadline_seconds or self.deadline_seconds, LONGEST_DEADLINE)
        content = None if body is None else codec.pack(body)
        started = time.monotonic()
        for attempt in itertools.count(1):
            try:
                remaining = started + seconds - time.monotonic()
                return await self._once(method, path, answer, content, remaining, seconds, admin)
            except Unavailable as error:
                pause = pause_before(attempt, error.retry_after)
                if time.monotonic() + pause > started + min(seconds, self.retry_seconds):
                    raise
                log.warning("%s; trying again in %.1f s", error, pause)
                await asyncio.sleep(pause)
        raise AssertionError("unreachable")

    async def _once(
        self,
        method: str,
        path: str,
        answer: type[Answer],
        content: bytes | None,
        remaining: float,
        seconds: float,
        admin: bool,
    ) -> Answer:
        url = self.url + path
        headers = {"Accept": MSGPACK, "X-Deadline-Seconds": f"{max(remaining, 0.001):.3f}"}
        headers |= _ids()
        headers |= self.authorization(admin)
        if content is not None:
            headers["Content-Type"] = MSGPACK
        try:
            async with asyncio.timeout(max(remaining, 0)):
                response = await self._http().request(method, url, content=content, headers=headers)
        except TimeoutError as error:
            raise DeadlinePassed(url, f"no answer within {seconds:g} s", "deadline") from error
        except httpx.TransportError as error:
            raise Unavailable(url, str(error) or type(error).__name__, "connection") from error
        return self._read(response, url, answer, seconds)

    def _read(self, response: httpx.Response, url: str, answer: type[Answer], seconds: float) -> Answer:
        status = response.status_code
        if response.is_success:
            try:
                is_msgpack = response.headers.get("content-type", "").startswith(MSGPACK)
                plain = codec.unpack(response.content) if is_msgpack else orjson.loads(response.content or b"null")
                return TypeAdapter(answer).validate_python(plain)
            except ValidationError as error:
                fault = error.errors(include_url=False)[0]
                where = ".".join(str(part) for part in fault["loc"])
                raise ServerFault(
                    url, f"the answer is not what was asked for: {where}: {fault['msg']}", "answer"
                ) from error
            except ValueError as error:
                raise ServerFault(url, f"the answer cannot be read: {error}", "answer") from error
        title, detail, errors = _problem(response)
        said = f"{status} {title}" + (f": {detail}" if detail else "")
        if status in TRANSIENT:
            raise Unavailable(url, said, str(status), retry_after(response))
        if status == 504:
            raise DeadlinePassed(url, f"{said} (deadline {seconds:g} s)", "deadline")
        if 400 <= status < 500:
            raise Refused(url, status, title, detail, errors)
        raise ServerFault(url, said, str(status))

    async def ready(self, deadline_seconds: float = 10.0) -> dict[str, Any]:
        """What `/readyz` says. Raises Unavailable while the server is not ready."""
        return await self.call("GET", "/readyz", dict[str, Any], deadline_seconds=deadline_seconds)

    async def model(self, deadline_seconds: float | None = None) -> dict[str, Any]:
        """What the server runs: its model, weight version, vocabulary size and backend."""
        return await self.call("GET", "/v1/model", dict[str, Any], deadline_seconds=deadline_seconds)


class RolloutClient(ServiceClient):
    """Asks a rollout server for groups of completions."""

    async def rollouts(self, requests: list[RolloutRequest], deadline_seconds: float | None = None) -> RolloutsResponse:
        """One group for each request, in their order. Raises ServerFault when the answer is for other requests."""
        body = RolloutsRequest(requests=requests)
        response = await self.call("POST", "/v1/rollouts", RolloutsResponse, body, deadline_seconds)
        asked = [(request.group_id, request.n) for request in requests]
        given = [(group.group_id, len(group.completions)) for group in response.groups]
        _insist(self.url, "groups", asked, given)
        return response


class RewardClient(ServiceClient):
    """Asks a reward server for scores."""

    async def rewards(
        self, groups: list[RewardGroup], spec: str | None = None, deadline_seconds: float | None = None
    ) -> RewardsResponse:
        """The scored part of each group, in their order. Raises ServerFault when the answer is for other groups."""
        body = RewardsRequest(spec=spec, groups=groups)
        response = await self.call("POST", "/v1/rewards", RewardsResponse, body, deadline_seconds)
        asked = [(group.group_id, len(group.completions)) for group in groups]
        given = [(group.group_id, len(group.scores)) for group in response.groups]
        _insist(self.url, "scores of", asked, given)
        return response

    async def score(
        self,
        items: list[ScoreItem],
        metrics: list[str] | None = None,
        deadline_seconds: float | None = None,
        **options: Any,
    ) -> ScoreResponse:
        """Scorer metrics of completions; `options` are the further fields of `services.api.ScoreRequest`."""
        chosen = {"metrics": metrics} if metrics else {}
        body = ScoreRequest(items=items, **chosen, **options)
        return await self.call("POST", "/v1/score", ScoreResponse, body, deadline_seconds)

    async def list_rewards(self, deadline_seconds: float | None = None) -> list[RewardEntry]:
        """Every reward of the server: what it needs, its parameters' JSON schema, its range."""
        return (await self.call("GET", "/v1/rewards", RewardsList, deadline_seconds=deadline_seconds)).rewards

    async def list_specs(self, spec_id: str | None = None, deadline_seconds: float | None = None) -> list[SpecEntry]:
        """The newest version of every spec; with `spec_id`, where the spec that a scored group names is known."""
        query = "" if spec_id is None else "?" + urlencode({"spec_id": spec_id})
        return (await self.call("GET", "/v1/specs" + query, SpecsList, deadline_seconds=deadline_seconds)).specs

    async def get_spec(self, name: str, version: int | None = None, deadline_seconds: float | None = None) -> SpecEntry:
        """The newest version, or an earlier one."""
        query = "" if version is None else f"?version={version}"
        return await self.call("GET", _spec_path(name) + query, SpecEntry, deadline_seconds=deadline_seconds)

    async def spec_versions(self, name: str, deadline_seconds: float | None = None) -> list[SpecEntry]:
        """The versions of a name that the server keeps, oldest first."""
        path = _spec_path(name) + "/versions"
        return (await self.call("GET", path, SpecVersions, deadline_seconds=deadline_seconds)).versions

    async def put_spec(self, name: str, spec: RewardSpec, deadline_seconds: float | None = None) -> SpecEntry:
        """Install or replace a spec (admin token)."""
        return await self.call("PUT", _spec_path(name), SpecEntry, spec, deadline_seconds, admin=True)

    async def preview_spec(
        self, spec: RewardSpec, groups: list[PreviewGroup], deadline_seconds: float | None = None
    ) -> PreviewResponse:
        """What a spec makes of scores that were measured. Raises ServerFault when the answer is for other groups."""
        body = PreviewRequest(spec=spec, groups=groups)
        response = await self.call("POST", "/v1/specs/preview", PreviewResponse, body, deadline_seconds)
        asked = [(group.group_id, group.size) for group in groups]
        given = [(group.group_id, len(group.scores)) for group in response.groups]
        _insist(self.url, "scores of", asked, given)
        return response

    async def delete_spec(self, name: str, deadline_seconds: float | None = None) -> None:
        """Remove a spec that was put (admin token)."""
        await self.call("DELETE", _spec_path(name), object, deadline_seconds=deadline_seconds, admin=True)


def _spec_path(name: str) -> str:
    return f"/v1/specs/{quote(name, safe='')}"


class BlockingRewardClient:
    """A `RewardClient` for code without an event loop: the same methods, each returning when it is done.

    It runs a loop in a daemon thread of its own, so it also works inside a notebook, where a loop runs already, and
    from many threads at once. A forked process, which has no such thread, starts another at its first call. Close it,
    or use it as a context manager, to close the connections too.
    """

    def __init__(self, url: str, token: str | None = None, admin_token: str | None = None, **options: Any):
        self._client = RewardClient(url, token, admin_token, **options)
        self._reset()

    def _reset(self) -> None:
        self._process, self._starting = os.getpid(), threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the thread; a later call starts another."""
        if self._process != os.getpid() or self._loop is None or self._thread is None:
            return
        self._run(self._client.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._reset()

    def _run(self, call: Callable[..., Coroutine[Any, Any, Answer]], *args: Any) -> Answer:
        if self._process != os.getpid():  # not even the parent's lock can be trusted: it may have been held at the fork
            self._reset()
        with self._starting:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._loop.run_forever, name="reward client", daemon=True)
                self._thread.start()
        running = asyncio.run_coroutine_threadsafe(call(*args), self._loop)
        try:
            return running.result()
        except BaseException:  # Ctrl-C above all: nobody waits for the answer any more
            running.cancel()
            raise

    def ready(self, deadline_seconds: float = 10.0) -> dict[str, Any]:
        return self._run(self._client.ready, deadline_seconds)

    def model(self, deadline_seconds: float | None = None) -> dict[str, Any]:
        return self._run(self._client.model, deadline_seconds)

    def rewards(
        self, groups: list[RewardGroup], spec: str | None = None, deadline_seconds: float | None = None
    ) -> RewardsResponse:
        return self._run(self._client.rewards, groups, spec, deadline_seconds)

    def score(
        self,
        items: list[ScoreItem],
        metrics: list[str] | None = None,
        deadline_seconds: float | None = None,
        **options: Any,
    ) -> ScoreResponse:
        return self._run(functools.partial(self._client.score, **options), items, metrics, deadline_seconds)

    def list_rewards(self, deadline_seconds: float | None = None) -> list[RewardEntry]:
        return self._run(self._client.list_rewards, deadline_seconds)

    def list_specs(self, spec_id: str | None = None, deadline_seconds: float | None = None) -> list[SpecEntry]:
        return self._run(self._client.list_specs, spec_id, deadline_seconds)

    def get_spec(self, name: str, version: int | None = None, deadline_seconds: float | None = None) -> SpecEntry:
        return self._run(self._client.get_spec, name, version, deadline_seconds)

    def spec_versions(self, name: str, deadline_seconds: float | None = None) -> list[SpecEntry]:
        return self._run(self._client.spec_versions, name, deadline_seconds)

    def put_spec(self, name: str, spec: RewardSpec, deadline_seconds: float | None = None) -> SpecEntry:
        return self._run(self._client.put_spec, name, spec, deadline_seconds)

    def preview_spec(
        self, spec: RewardSpec, groups: list[PreviewGroup], deadline_seconds: float | None = None
    ) -> PreviewResponse:
        return self._run(self._client.preview_spec, spec, groups, deadline_seconds)

    def delete_spec(self, name: str, deadline_seconds: float | None = None) -> None:
        self._run(self._client.delete_spec, name, deadline_seconds)
