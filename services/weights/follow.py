"""A server's side: learn of a new version, check all of its files, load it, report it."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import Counter, Gauge
from pydantic import ValidationError
from redis.asyncio import Redis
from redis.exceptions import RedisError

from services import traces
from services.contract import Version, WeightVersion
from services.keys import Keys
from services.redis import PASSING, DeadlineExceeded, cancel, connect
from services.startup import StartupError
from services.weights import meeting, pointer
from services.weights.seconds import SECONDS
from services.weights.store import is_url

if TYPE_CHECKING:
    from services.weights.mirror import Mirror

log = logging.getLogger(__name__)

Load = Callable[[Version, Path], Awaitable[None]]

BEAT_SECONDS = 2.0
PHASES = {"disk": "verify", "delta": "patch", "adapter": "merge"}
"""The transports, and what the time is called that a version of each takes before it can be loaded."""
REDIS_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0

VERSION = Gauge("rlif_weight_version", "Optimizer step of the served weights", ["service"])
LINEAGE = Gauge("rlif_weight_lineage", "Lineage of the served weights", ["service"])
REFUSED = Counter("rlif_weight_versions_refused_total", "Weight versions that were not taken", ["service"])


class Follower:
    """Keeps a server at the newest weights of a run, from a background task between `start` and `stop`.

    A version is first checked byte by byte against its manifest (in a thread), then `load(version, directory)` is
    awaited; `load` has to leave the old weights serving when it raises. A version that is damaged or does not load is
    refused: the old one stays, and it is tried again with growing pauses, since a shared disk may lag behind redis.
    Deltas are applied to a copy of the weights in `mirror_dir` (none: the system's folder for temporary files), what
    lies in a bucket is fetched to there, and adapters are merged there into a copy of the model whose folder `base`
    returns. `receive` takes part in broadcasts; without it, or where nobody broadcasts, the whole version before is
    loaded.
    """

    def __init__(
        self,
        redis_url: str,
        run_id: str,
        replica: str,
        service: str,
        url: str,
        load: Load,
        poll_seconds: float = 0.2,
        mirror_dir: Path | None = None,
        base: Callable[[], Path] | None = None,
        receive: meeting.Receive | None = None,
    ):
        self.run_id, self.replica, self.service, self.url = run_id, replica, service, url
        self.load, self.poll_seconds, self.mirror_dir, self.base = load, poll_seconds, mirror_dir, base
        self.receive = receive
        self._mirror: Mirror | None = None
        self.version: Version | None = None
        """What is served; none while that is still the model the server started with."""
        self.redis_state = "not connected yet"
        """`ok`, or why redis cannot be reached: for the server's readiness."""
        self.refusal = ""
        """Why the newest version was refused; empty when it was not."""
        self._redis: Redis = connect(redis_url)
        self._refused: Version | None = None
        self._attempts, self._again_at = 0, 0.0
        self._changed = asyncio.Condition()
        self._tasks: list[asyncio.Task] = []
        self._loading: asyncio.Future | None = None
        self._stopping = False

    async def start(self) -> None:
        """Returns at once; redis may be away, and come later."""
        self._tasks = [asyncio.create_task(self._follow()), asyncio.create_task(self._report())]

    async def stop(self) -> None:
        """Ends the task, after a load in progress, and takes the replica off the list of followers."""
        self._stopping = True
        await cancel(*self._tasks)
        if self._loading is not None:  # half a load is worse than none
            await asyncio.wait([self._loading])
        try:
            await pointer.leave(self._redis, self.run_id, self.replica)
        except RedisError as error:
            log.warning("%s could not take its leave: %s", self.replica, error)
        if self._mirror is not None:
            await asyncio.to_thread(self._mirror.close)
        await self._redis.aclose()

    async def at_least(self, version: Version, deadline_seconds: float) -> Version:
        """Wait until the served version is `version` or newer; returns it. Raises DeadlineExceeded."""

        def there() -> bool:
            return self.version is not None and self.version >= version

        try:
            async with asyncio.timeout(deadline_seconds), self._changed:
                await self._changed.wait_for(there)
        except TimeoutError:
            why = self.refusal or ("" if self.redis_state == "ok" else f"redis: {self.redis_state}")
            raise DeadlineExceeded(
                f"waited {deadline_seconds:g} s for weights {version} of run {self.run_id}'s trainer; {self.service} "
                f"serves {self.version or 'the base model'}" + (f" ({why})" if why else "")
            ) from None
        assert self.version is not None
        return self.version

    # ---- how -----------------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        while True:
            try:
                async with self._redis.pubsub() as news:
                    await news.subscribe(Keys(self.run_id).weights_news)
                    while True:
                        await self._look()
                        self._set_redis_state("ok")
                        # An announcement ends the pause early; one that got lost costs `poll_seconds`.
                        await news.get_message(ignore_subscribe_messages=True, timeout=self.poll_seconds)
            except PASSING as error:
                self._set_redis_state(str(error))
            except Exception as error:  # whatever it is, following must not end without a word
                self._set_redis_state(f"{type(error).__name__}: {error}")
            await asyncio.sleep(REDIS_PAUSE_SECONDS)

    def _set_redis_state(self, state: str) -> None:
        if state != self.redis_state:
            log.log(logging.INFO if state == "ok" else logging.WARNING, "%s: redis: %s", self.replica, state)
        self.redis_state = state

    async def _look(self) -> None:
        """Take the newest version unless it is served or was refused a moment ago."""
        newest = await pointer.newest_version(self._redis, self.run_id)
        if newest is None or (self.version is not None and newest <= self.version):
            return
        if newest == self._refused and time.monotonic() < self._again_at:
            return
        try:
            weights = await pointer.newest(self._redis, self.run_id)
        except ValidationError as error:
            return self._refuse(newest, f"redis holds no valid weight version: {error}")
        if weights is not None:
            await self._take(weights)

    async def _take(self, weights: WeightVersion) -> None:
        if weights.transport in meeting.TRANSPORTS:
            return await self._join(weights)
        if weights.transport not in PHASES:
            known = ", ".join(PHASES)
            return self._refuse(weights.id, f"transport {weights.transport!r} is not known here, only {known}")
        from services.weights.disk import DamagedWeights

        started = time.monotonic()
        try:
            self._loading = asyncio.ensure_future(asyncio.to_thread(self._whole, weights))
            directory = await asyncio.shield(self._loading)
        except (DamagedWeights, OSError, StartupError) as error:
            if await pointer.newest_version(self._redis, self.run_id) == weights.id:  # else it is gone for good reason
                self._refuse(weights.id, str(error))
            return
        verified = time.monotonic()
        self._loading = asyncio.ensure_future(self.load(weights.id, directory))
        try:
            with traces.span("load weights", weight_version=str(weights.id)):
                await asyncio.shield(self._loading)
        except Exception as error:
            log.exception("%s: loading weights %s failed", self.replica, weights.id)
            return self._refuse(weights.id, f"loading failed: {error!r}")
        SECONDS.labels(self.service, PHASES[weights.transport]).observe(verified - started)
        SECONDS.labels(self.service, "load").observe(time.monotonic() - verified)
        await self._now_serves(weights.id, started)

    async def _join(self, weights: WeightVersion) -> None:
        """Take part in the broadcast of these weights, or of newer ones; without one, load the whole version before."""
        started = time.monotonic()
        try:
            if self.receive is None:
                raise meeting.NotCalled("this server takes part in no broadcasts: start it with the run's recipe")
            await meeting.offered(self._redis, self.run_id)
            meet = partial(meeting.sit, self._redis, self.run_id, self.replica, lambda: self._stopping)
            self._loading = asyncio.ensure_future(self.receive(weights, meet))
            with traces.span("receive weights", weight_version=str(weights.id)):
                taken = await asyncio.shield(self._loading)
        except meeting.NotCalled as error:
            if await pointer.newest_version(self._redis, self.run_id) == weights.id:
                self._refuse(weights.id, str(error))
                await self._take_snapshot(weights)
            return
        except PASSING:
            raise
        except Exception as error:
            log.exception("%s: receiving weights %s failed", self.replica, weights.id)
            return self._refuse(weights.id, f"receiving failed: {error!r}")
        SECONDS.labels(self.service, "load").observe(time.monotonic() - started)
        await self._now_serves(taken.id, started)

    async def _take_snapshot(self, weights: WeightVersion) -> None:
        from services.weights.disk import DamagedWeights
        from services.weights.mirror import snapshot

        try:
            whole = await asyncio.to_thread(snapshot, weights)
        except (DamagedWeights, OSError) as error:
            log.error("%s: the whole version before %s: %s", self.replica, weights.id, error)
            return
        if self.version is None or whole.id > self.version:
            await self._take(whole)

    async def _now_serves(self, version: Version, started: float) -> None:
        self.version, self._refused, self._attempts, self.refusal = version, None, 0, ""
        VERSION.labels(self.service).set(version.version)
        LINEAGE.labels(self.service).set(version.lineage)
        log.info("%s: serving weights %s after %.2f s", self.replica, version, time.monotonic() - started)
        async with self._changed:
            self._changed.notify_all()
        await self._beat()

    def _whole(self, weights: WeightVersion) -> Path:
        """A model folder of these weights, every byte of it checked. Raises DamagedWeights, OSError, StartupError."""
        from services.weights import disk
        from services.weights.mirror import Mirror

        if weights.transport == "disk" and not is_url(weights.location):
            disk.verify(Path(weights.location), weights.manifest)
            return Path(weights.location)
        if self._mirror is None:
            self._mirror = Mirror(self.mirror_dir, f"{self.run_id}-{self.replica}", self.base)
        return self._mirror.reach(weights)

    def _refuse(self, version: Version, reason: str) -> None:
        self._attempts = self._attempts + 1 if version == self._refused else 1
        pause = min(LONGEST_PAUSE_SECONDS, 2.0 ** (self._attempts - 1))
        self._refused, self._again_at = version, time.monotonic() + pause
        self.refusal = f"weights {version} refused: {reason}"
        REFUSED.labels(self.service).inc()
        log.error("%s: %s; still serving %s", self.replica, self.refusal, self.version or "the base model")

    async def _beat(self) -> None:
        beat = pointer.Heartbeat(
            replica=self.replica, service=self.service, url=self.url, version=self.version, at=time.time()
        )
        await pointer.beat(self._redis, self.run_id, beat)

    async def _report(self) -> None:
        while True:
            try:
                await self._beat()
            except Exception as error:
                log.debug("%s: no heartbeat: %s", self.replica, error)
            await asyncio.sleep(BEAT_SECONDS)
