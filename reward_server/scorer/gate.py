"""Many pass a gate at a time, or one closes it: what calls and a change of weights are to each other."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Gate:
    """Of one event loop. Who closes it waits for those inside; who comes meanwhile waits for it to open again."""

    def __init__(self) -> None:
        self.inside = 0
        self._open, self._empty, self._closing = asyncio.Event(), asyncio.Event(), asyncio.Lock()
        self._open.set()
        self._empty.set()

    @asynccontextmanager
    async def passing(self) -> AsyncIterator[None]:
        while not self._open.is_set():  # it may be closed again before this task has its turn
            await self._open.wait()
        self.inside += 1
        self._empty.clear()
        try:
            yield
        finally:
            self.inside -= 1
            if not self.inside:
                self._empty.set()

    @asynccontextmanager
    async def closed(self) -> AsyncIterator[None]:
        async with self._closing:
            self._open.clear()
            try:
                await self._empty.wait()
                yield
            finally:
                self._open.set()
