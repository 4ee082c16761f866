"""Whether a sandbox works, as readiness shows it."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

log = logging.getLogger(__name__)

RECOVERY_SECONDS = 5.0


class Health:
    """`state` is "ok", or why the sandbox does not work. Once it broke, `check` is tried until it raises nothing:
    nobody sends work to a server that is not ready, so it has to find out by itself when it is again."""

    def __init__(self, check: Callable[[], Awaitable[object]]):
        self.check = check
        self.state = "ok"
        self._recovery: asyncio.Task | None = None

    def broke(self, why: str) -> None:
        if self.state == "ok":
            log.error("the sandbox does not work: %s", why)
        self.state = why
        if self._recovery is None or self._recovery.done():
            self._recovery = asyncio.create_task(self._recover())

    def worked(self) -> None:
        self.state = "ok"

    def stop(self) -> None:
        if self._recovery:
            self._recovery.cancel()
        self.state = "the sandbox was stopped"

    async def _recover(self) -> None:
        while self.state != "ok":
            await asyncio.sleep(RECOVERY_SECONDS)
            try:
                await self.check()
                self.state = "ok"
            except Exception as error:
                self.state = str(error) or type(error).__name__
