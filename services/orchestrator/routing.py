"""Several servers of one kind behind one call: least loaded first, a failing one is set aside and tried again."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from prometheus_client import Counter

from services.clients import CallError, DeadlinePassed, ServiceClient, Unavailable, pause_before

log = logging.getLogger(__name__)

RETRIES = Counter("rlif_orchestrator_retries_total", "Calls tried again, by service and cause", ["service", "cause"])
REMIND_SECONDS = 15.0

Client = TypeVar("Client", bound=ServiceClient)
Answer = TypeVar("Answer")


@dataclass
class Route(Generic[Client]):
    """One server. `prepared` goes back to false whenever it was out of reach: another one may have taken its place."""

    client: Client
    in_flight: int = 0
    served: int = 0
    failures: int = 0
    rests_until: float = 0.0
    last_error: CallError | None = None
    prepared: bool = False
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Routes(Generic[Client]):
    """`prepare(client)` runs before a server's first call, and again after it could not be reached. `patience`
    (seconds) is how long a call goes on failing over before it raises what the servers said.
    """

    def __init__(
        self,
        service: str,
        clients: list[Client],
        prepare: Callable[[Client], Awaitable[None]],
        patience: float,
    ):
        if not clients:
            raise ValueError(f"no URL of a {service} server was given")
        self.service, self.patience = service, patience
        self.routes = [Route(client) for client in clients]
        self._prepare = prepare
        self._reminded = 0.0

    async def close(self) -> None:
        for route in self.routes:
            await route.client.close()

    async def call(self, action: Callable[[Client], Awaitable[Answer]]) -> Answer:
        """What `action` returns on the first server that can do it. Raises CallError, or what `prepare` raises."""
        give_up = time.monotonic() + self.patience
        failed = False
        while True:
            route = await self._acquire(give_up)
            try:
                async with route.lock:
                    if route.rests_until > time.monotonic():
                        continue  # it failed while this call waited for its turn to prepare it
                    if not route.prepared:
                        await self._prepare(route.client)
                        route.prepared = True
                answer = await action(route.client)
                route.failures, route.last_error = 0, None
                return answer
            except (Unavailable, DeadlinePassed) as error:
                self._set_aside(route, error)
                if not failed:
                    # A call may have run well for long before its server died: patience counts from the failure on.
                    failed, give_up = True, time.monotonic() + self.patience
                elif time.monotonic() > give_up:
                    raise self._exhausted(error) from error
            finally:
                route.in_flight -= 1

    async def _acquire(self, give_up: float) -> Route[Client]:
        """The least loaded server that is not set aside, counted as in use."""
        while True:
            now = time.monotonic()
            awake = [route for route in self.routes if route.rests_until <= now]
            if awake:
                route = min(awake, key=lambda route: (route.in_flight, route.served))
                route.in_flight += 1
                route.served += 1
                return route
            if now > give_up:
                raise self._exhausted(error=None)
            if now - self._reminded > REMIND_SECONDS:
                self._reminded = now
                log.warning(
                    "waiting for a %s server (all %d failed): %s", self.service, len(self.routes), self._reasons()
                )
            wake = min(route.rests_until for route in self.routes)
            await asyncio.sleep(min(wake, give_up + 0.01) - now)

    def _exhausted(self, error: CallError | None) -> Unavailable:
        urls = ", ".join(route.client.url for route in self.routes)
        cause = error.cause if error else "connection"
        return Unavailable(
            urls, f"no {self.service} server could be used for {self.patience:g} s: {self._reasons()}", cause
        )

    def _reasons(self) -> str:
        return "; ".join(str(route.last_error) for route in self.routes if route.last_error)

    def _set_aside(self, route: Route[Client], error: Unavailable | DeadlinePassed) -> None:
        RETRIES.labels(self.service, error.cause).inc()
        route.last_error = error
        if error.cause in ("connection", "deadline"):
            route.prepared = False
        if route.rests_until > time.monotonic():
            return  # one fault of the server fails many calls at once; it counts once
        route.failures += 1
        pause = pause_before(route.failures, getattr(error, "retry_after", None))
        route.rests_until = time.monotonic() + pause
        log.warning("%s server set aside for %.1f s: %s", self.service, pause, error)
