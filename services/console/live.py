"""Server-sent events: the run's state every second, and the numbers of each step as it is told."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import orjson
from fastapi import Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from services.console.overview import Overview, look
from services.console.source import Desk
from services.pages import frame
from services.problem import Problem

EVERY_SECONDS = 1.0
LONGEST_SECONDS = 3600.0
"""Then the browser asks anew: a page that was forgotten in a tab does not hold a place for ever."""
MOST_STREAMS = 16


async def stream(desk: Desk, since: int, undone: int, panel: Callable[[Overview], str]) -> Response:
    """`state` events carry the state's panel as HTML, `rows` the steps after `since`, and `again` says that steps which
    the page has are lost: it must ask for all curves anew. Raises Problem (429)."""
    if desk.streams >= MOST_STREAMS:
        raise Problem(429, "Too many pages are kept up to date", f"at most {MOST_STREAMS}", retry_after=10)
    desk.streams += 1
    headers = {**frame.HEADERS, "X-Accel-Buffering": "no"}
    return Stream(desk, _events(desk, since, undone, panel), headers=headers, media_type="text/event-stream")


class Stream(StreamingResponse):
    """Gives its place back however it ends, even before anything was sent."""

    def __init__(self, desk: Desk, content: AsyncIterator[bytes], **options: Any):
        super().__init__(content, **options)
        self.desk = desk

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.desk.streams -= 1


async def _events(desk: Desk, since: int, undone: int, panel: Callable[[Overview], str]) -> AsyncIterator[bytes]:
    ends, shown = time.monotonic() + LONGEST_SECONDS, ""
    while time.monotonic() < ends:
        overview = await look(desk)
        text = await asyncio.to_thread(panel, overview)
        # Something is sent each time, so that a page that is gone is noticed.
        yield _event("state", {"html": text, "state": overview.state}) if text != shown else b": still here\n\n"
        shown = text
        if not overview.trouble:
            history = desk.histories[desk.run_id]
            if history.undone != undone:
                undone, since = history.undone, max(history.rows, default=0)
                yield _event("again", {"step": since})
            new = [row for step, row in sorted(history.rows.items()) if step > since]
            if new:
                since = new[-1]["step"]
                yield _event("rows", {"rows": new})
        await asyncio.sleep(EVERY_SECONDS)


def _event(name: str, data: object) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + orjson.dumps(data) + b"\n\n"
