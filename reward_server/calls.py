"""Calls to servers that a spec names: judges, and rewards computed elsewhere.

Where a spec sends completions is the decision of whoever may put specs (the admin token), or of the recipe's author.
Here it is only kept from going further: http and https, no redirects, no credentials in addresses, answers of bounded
size. Keys stay in the server's environment; a spec gives the name of a variable, and only of one made for this.
"""

import asyncio
import json
import os
import re
import time
from typing import Annotated, Any

import httpx
from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from services.clients import CONNECT_SECONDS, TRANSIENT, RewardClient, pause_before, retry_after
from services.contract import Outcome

MOST_BYTES = 4 * 2**20
"""Of one answer."""
ATTEMPTS = 6
KEY_NAME = re.compile(r"RLIF_KEY_[A-Z0-9_]{1,64}")


def _is_plain(url: str) -> str:
    try:
        parts = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"not a URL: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.host:
        raise ValueError("not a URL that starts with http:// or https:// and a host")
    if parts.userinfo:
        raise PydanticCustomError("secret", "credentials do not belong into a URL: use `key_env`")
    return url.rstrip("/")


def _is_key_name(name: str) -> str:
    if not KEY_NAME.fullmatch(name):
        raise PydanticCustomError(
            "secret", "is the name of an environment variable of the server: RLIF_KEY_ and then A-Z, 0-9, _"
        )
    return name


Url = Annotated[str, Field(min_length=1, max_length=2048), AfterValidator(_is_plain)]
KeyName = Annotated[str, AfterValidator(_is_key_name)]


class CallFailed(Exception):
    """No usable answer: `outcome` is `error` or `timeout`."""

    def __init__(self, outcome: Outcome, detail: str):
        super().__init__(detail)
        self.outcome, self.detail = outcome, detail


def key_of(key_env: str | None) -> str | None:
    """The key that the variable holds. Raises CallFailed, which never says more than the variable's name."""
    if key_env is None:
        return None
    key = os.environ.get(key_env, "")
    if not key or not key.isascii() or not key.isprintable():
        why = "holds no key" if key else "is not set where the reward server runs"
        raise CallFailed(Outcome.error, f"key_env: the environment variable {key_env} {why}")
    return key


class Calls:
    """Connections to other servers, kept open between calls. Use inside one event loop, and close it."""

    def __init__(self) -> None:
        # Calls are bounded by their deadlines, so httpx only bounds what may hang long before that.
        self._http = httpx.AsyncClient(
            timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=30.0),
            headers={"Accept": "application/json", "Accept-Encoding": "identity"},
            follow_redirects=False,
        )
        self._slots: dict[tuple[str, int], asyncio.Semaphore] = {}
        self._clients: dict[tuple[str, str | None], RewardClient] = {}

    async def close(self) -> None:
        await self._http.aclose()
        for client in self._clients.values():
            await client.close()

    def reward_client(self, url: str, key_env: str | None) -> RewardClient:
        """A client of another rlif reward server. Raises CallFailed: there is no key."""
        client = self._clients.get((url, key_env))
        if client is None:
            client = self._clients[url, key_env] = RewardClient(url, retry_seconds=10.0)
        client.token = key_of(key_env)
        return client

    async def post(self, url: str, body: Any, key_env: str | None, deadline: float, concurrency: int) -> Any:
        """The JSON of the answer (NaN and infinity let through). Raises CallFailed by `deadline` (time.monotonic()).

        At most `concurrency` calls to a URL are under way at once. What says nothing of the request (busy or restarting
        servers, lost connections) is tried again, with backoff and never before `Retry-After`.
        """
        slots = self._slots.setdefault((url, concurrency), asyncio.Semaphore(concurrency))
        content, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        key = key_of(key_env)
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        for attempt in range(1, ATTEMPTS + 1):
            try:
                async with asyncio.timeout(max(0.0, deadline - time.monotonic())), slots:
                    status, came, wait = await self._once(url, content, headers)
            except TimeoutError:
                raise CallFailed(Outcome.timeout, f"{url}: no answer by the deadline") from None
            except httpx.HTTPError as error:
                status, came, wait = 0, str(error) or type(error).__name__, None
            if 200 <= status < 300:
                return _decoded(url, came, key)
            said = f"{url}: {_shown(status, came, key)}"
            pause = pause_before(attempt, wait)
            is_final = status not in (0, *TRANSIENT) or attempt == ATTEMPTS
            if is_final or time.monotonic() + pause >= deadline:
                raise CallFailed(Outcome.error, said)
            await asyncio.sleep(pause)
        raise AssertionError("unreachable")

    async def _once(self, url: str, content: bytes, headers: dict[str, str]) -> tuple[int, str, float | None]:
        """(status, body, seconds that the server asks to wait). Raises CallFailed for a body that is too large."""
        async with self._http.stream("POST", url, content=content, headers=headers) as response:
            if response.headers.get("content-encoding", "identity") != "identity":
                raise CallFailed(Outcome.error, f"{url}: the answer is compressed, which was not asked for")
            body = bytearray()
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > MOST_BYTES:
                    raise CallFailed(Outcome.error, f"{url}: the answer has more than {MOST_BYTES} bytes")
            return response.status_code, body.decode(errors="replace"), retry_after(response)


def _decoded(url: str, text: str, key: str | None) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CallFailed(Outcome.error, f"{url}: the answer is not JSON: {_beginning(text, key)}") from error


def _beginning(text: str, key: str | None) -> str:
    return (text.replace(key, "[key]") if key else text)[:200]


def _shown(status: int, text: str, key: str | None) -> str:
    """What a server said, without the key: some repeat it, or parts of it, when they refuse it."""
    if status == 0:
        return text
    if 300 <= status < 400:
        return f"answered {status}: redirects are not followed"
    if status in (401, 403):
        return f"answered {status}: the key is not accepted" if key else f"answered {status}: it wants a key (key_env)"
    return f"answered {status}: {_beginning(text, key)}"
