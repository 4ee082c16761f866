"""The HTTP protocol of every server: connections that say nothing are closed, and there are never too many.

uvicorn waits without end for a request's first line and headers, and holds as many connections as come: a thousand
silent ones would take the process's open files, and with them its log, its checkpoints, its redis.
"""

import asyncio
import resource
from contextlib import suppress
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

HEADER_SECONDS = 20.0
"""From a connection's begin, or from a request's first byte, to the end of its headers."""
MOST_CONNECTIONS = 8192

_Base: Any = AutoHTTPProtocol


def raise_open_files() -> int:
    """Shells often allow 1024 open files of the many more that the system would: too few for a batch of callers.
    Returns how many connections a server may hold, so that half of the files are left for other things."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # where the system says `unlimited` and means less
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_CONNECTIONS if soft == resource.RLIM_INFINITY else min(MOST_CONNECTIONS, soft // 2)


def protocol(most: int) -> Any:
    """For uvicorn's `Config(http=...)`: at most so many connections. One more takes the place of the one that has been
    silent for longest, so that whoever does speak gets through."""
    silent: dict[Any, asyncio.TimerHandle] = {}

    class Bounded(_Base):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._await_headers()
            if len(self.connections) > most:
                next(iter(silent)).transport.abort()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._is_heard()
            elif self not in silent:
                self._await_headers()

        def connection_lost(self, error: Exception | None) -> None:
            self._is_heard()
            super().connection_lost(error)

        def _await_headers(self) -> None:
            silent[self] = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

        def _is_heard(self) -> None:
            timer = silent.pop(self, None)
            if timer:
                timer.cancel()

    return Bounded
