"""Calls to other projects' sandbox servers: JSON over HTTP, tried again while a server is busy, with a deadline."""

import asyncio
import itertools
import time
from typing import Any

import httpx
import orjson

from services.clients import CONNECT_SECONDS, TRANSIENT, pause_before

RETRY_SECONDS = 30.0


class Fault(Exception):
    """The server cannot be reached, or answers something that is no result."""


def client() -> httpx.AsyncClient:
    """Without a timeout of its own on answers: every call has a deadline."""
    return httpx.AsyncClient(timeout=httpx.Timeout(None, connect=CONNECT_SECONDS))


async def exchange(http: httpx.AsyncClient, method: str, url: str, body: Any, deadline: float) -> Any:
    """The JSON that the server answers. Raises Fault, and TimeoutError at `deadline` (time.monotonic() seconds)."""
    started = time.monotonic()
    for attempt in itertools.count(1):
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                response = await http.request(method, url, json=body)
            if response.status_code not in TRANSIENT:
                break
            fault = f"{url}: {response.status_code} {response.reason_phrase}"
        except httpx.TransportError as error:
            fault = f"{url}: {error or type(error).__name__}"
        pause = pause_before(attempt)
        if time.monotonic() + pause > min(deadline, started + RETRY_SECONDS):
            raise Fault(fault)
        await asyncio.sleep(pause)
    if not response.is_success:
        raise Fault(f"{url}: {response.status_code} {response.text[:200]}")
    try:
        return orjson.loads(response.content)
    except orjson.JSONDecodeError as error:
        raise Fault(f"{url}: the answer is not JSON: {error}") from error


def clipped(text: Any, most: int) -> str:
    return (text if isinstance(text, str) else "")[-most:]
