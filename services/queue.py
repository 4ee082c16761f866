"""Scored groups over Redis Streams: from many pushers to one consumer, the trainer's rank 0.

Delivery is at least once; the effect is exactly once a lineage, because the consumer keeps the ids of the entries it
consumed in its checkpoint and hands them to `recover`. Nothing is trimmed before it is acknowledged. Whatever redis
answers late or twice is harmless: pushes are deduplicated by group id, and a consumer of an outlived lineage is fenced.
A redis that lost its data, or went back to older ones, learns from `recall` what was trained.
"""

import logging
import os
import secrets
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from prometheus_client import Counter, Gauge
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from services import codec, traces
from services import queue_scripts as scripts
from services.contract import ScoredGroup
from services.keys import Keys
from services.redis import BLOCK_SECONDS, DeadlineExceeded, insist

log = logging.getLogger(__name__)

Result = TypeVar("Result")

GROUP = "trainer"
"""The name of the one consumer group of a run."""
BATCH = 1000
"""Entry ids in one command."""
TELL_SECONDS = 30.0

ENTRIES = Gauge("rlif_queue_groups", "Scored groups by state: queued, pending (delivered), dead", ["run", "state"])
OLDEST = Gauge("rlif_queue_oldest_age_seconds", "Age of the oldest group that is not acknowledged", ["run"])
DEAD = Counter("rlif_queue_dead_lettered_total", "Groups this process moved to the dead-letter stream", ["run"])


class Fenced(Exception):
    """A newer trainer has taken over the run: this one must stop, nothing it does counts any more."""


class Undone(Exception):
    """The group was made before a roll-back: it has to be made again, by the policy that was gone back to."""


@dataclass(frozen=True)
class Entry:
    """A delivered group; `entry_id` is what checkpoints keep and `ack` takes. `trace` is the `traceparent` of the span
    that pushed it, empty when that was not traced."""

    entry_id: str
    group: ScoredGroup
    trace: str = ""


@dataclass(frozen=True)
class DeadGroup:
    """`payload` is the packed group as far as it was ever made, possibly empty or undecodable; `entry_id` its place in
    the dead-letter stream."""

    entry_id: str
    group_id: str
    index: int
    reason: str
    payload: bytes


@dataclass(frozen=True)
class Depth:
    """`queued`: pushed, not yet delivered; `pending`: delivered, not yet acknowledged; `dead`: dead-lettered.
    `oldest_age_seconds`: by the server's clock, of the oldest group queued or pending; 0 when there is none.
    `left_out`: groups of one opinion, which are not trained on."""

    queued: int
    pending: int
    dead: int
    oldest_age_seconds: float
    left_out: int = 0


class GroupQueue:
    """One run's queue. `patience_seconds` is how long an operation outlasts a redis that is away before it raises
    DeadlineExceeded; `max_deliveries` how often an entry may be begun without being finished before it is buried.

    Pushers use `push`, `bury`, `leave_out`, `seen`. The consumer calls `claim_lineage`, where it goes further back than
    to the newest checkpoint (`lost` tells) `undo`, `recall`, `recover`, then, for every step, `pull`, `begin`,
    `finish`, and `ack` once a checkpoint holds the step. Its calls raise Fenced when another claimed later.
    """

    def __init__(self, redis: Redis, run_id: str, max_deliveries: int = 3, patience_seconds: float = 300.0):
        # redis-py's annotations are the union of what every protocol and decoding setting may answer.
        self.redis: Any = redis
        self.run_id = run_id
        self.max_deliveries, self.patience_seconds = max_deliveries, patience_seconds
        self.keys = Keys(run_id)
        self.consumer = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        self.lineage: int | None = None
        # Together these two are what redis holds as pending: delivered to the caller, and to be delivered next (in
        # stream order, with the fields where a read brought them).
        self._held: set[str] = set()
        self._trained: frozenset[str] = frozenset()
        self._next: dict[str, dict[bytes, bytes] | None] = {}

    # ---- pushers -------------------------------------------------------------------------------------------------

    async def push(self, group: ScoredGroup) -> bool:
        """Append a group unless its id was pushed or buried before; False then (also when a first attempt of this
        very call took effect but redis went away before it could answer). Raises Undone."""
        keys = [self.keys.groups, self.keys.pushed, self.keys.floor]
        lineage = min(completion.weight_version.lineage for completion in group.completions)
        arguments = [group.group_id, group.index, codec.pack(group), traces.here(), lineage]
        pushed = await self._run(scripts.PUSH, keys, arguments, f"push {group.group_id}")
        if pushed < 0:
            raise Undone(f"group {group.group_id} (index {group.index}) was made by lineage {lineage}, since undone")
        return bool(pushed)

    async def leave_out(self, group_id: str, index: int) -> bool:
        """Note that a group is not to be trained on, and never to be pushed. False if it was pushed before."""
        keys, arguments = [self.keys.left_out, self.keys.pushed], [group_id, index]
        return bool(await self._run(scripts.LEAVE_OUT, keys, arguments, f"leave out {group_id}"))

    async def left_out(self) -> list[int]:
        """The indices of the groups that were left out."""
        return [
            int(i) for i in await self._insist(lambda: self.redis.hvals(self.keys.left_out), "read groups left out")
        ]

    async def bury(self, group_id: str, index: int, reason: str, payload: bytes = b"") -> bool:
        """Give a group up: to the dead-letter stream, and never to be pushed again. False if it was pushed before."""
        ids = {"group_id": group_id, "index": index}
        log.warning("group %s (index %d) is given up: %s", group_id, index, reason, extra=ids)
        keys, arguments = [self.keys.dead, self.keys.pushed], [group_id, index, payload, reason]
        buried = bool(await self._run(scripts.BURY, keys, arguments, f"bury {group_id}"))
        DEAD.labels(self.run_id).inc(buried)
        return buried

    async def keep(self, group: ScoredGroup, most: int) -> None:
        """Keep the group for people to look at, when it is long trained and acknowledged: the last `most` are."""
        fields = {"group": codec.pack(group)}
        await self._insist(
            lambda: self.redis.xadd(self.keys.samples, fields, maxlen=most, approximate=False), f"keep {group.group_id}"
        )

    async def seen(self) -> set[str]:
        """The ids of all groups pushed or buried since the run began."""
        found = await self._insist(lambda: self.redis.hkeys(self.keys.pushed), "read the ids of pushed groups")
        return {field.decode() for field in found}

    # ---- the consumer --------------------------------------------------------------------------------------------

    async def claim_lineage(self, at_least: int) -> int:
        """A lineage no trainer of this run had before, and at least `at_least`; a fresh run's first claim of 0 gets 0.
        From now on every earlier consumer is fenced."""
        self.lineage = int(await self._run(scripts.CLAIM_LINEAGE, [self.keys.lineage], [at_least], "claim a lineage"))
        return self.lineage

    async def recall(self, trained: Iterable[str]) -> int:
        """Tell redis of groups (ids) whose effect the restored checkpoint holds: they are never pushed again, and
        entries of them that still come are dropped. Returns of how many redis knew nothing: 0 unless it lost data."""
        self._trained = frozenset(trained)
        keys, unknown = [self.keys.lineage, self.keys.pushed], 0
        for ids in _batches(sorted(self._trained)):
            unknown += int(await self._run(scripts.RECALL, keys, [self._fence, *ids], "recall trained groups"))
        if unknown:
            log.warning("run %s: redis had forgotten %d groups that were trained", self.run_id, unknown)
        return unknown

    async def lost(self, groups: Iterable[str]) -> list[str]:
        """Those of `groups` (ids), which were trained after the restored checkpoint, that will not come again: they are
        acknowledged, for a later checkpoint held them, which is gone or damaged. `undo` has them made again."""
        keys, found = [self.keys.lineage, self.keys.groups, self.keys.pushed], list[bytes]()
        for ids in _batches(sorted(groups)):
            found += await self._run(scripts.LOST, keys, [self._fence, *ids], "look for lost groups")
        return [group_id.decode() for group_id in found]

    async def recover(self, consumed: Iterable[str]) -> None:
        """Take over every pending entry, whichever consumer held it: those in `consumed` (entry ids out of the restored
        checkpoint) are acknowledged, the others will be pulled again, in stream order, before new ones."""
        consumed = set(consumed)
        await self._insist(self._take_over, "take over pending groups")
        done = [entry_id for entry_id in self._next if entry_id in consumed]
        await self._acknowledge(done, self.lineage)
        log.info("run %s: %d groups come again, %d were consumed", self.run_id, len(self._next), len(done))

    async def undo(self, groups: Iterable[str]) -> None:
        """Go back: `groups` (ids), which were trained, and all that lie in the queue are forgotten, so that they are
        made again; what an earlier lineage made is refused from now on. Call it between `claim_lineage` and `recall`.

        It may be cut off and called again.
        """
        await self._run(scripts.RAISE_FLOOR, [self.keys.lineage, self.keys.floor], [self._fence], "raise the floor")
        keys = [self.keys.lineage, self.keys.groups, self.keys.pushed, self.keys.attempts]
        await self._run(scripts.EMPTY, keys, [self._fence, GROUP], "empty the queue")
        self._held, self._next = set(), {}
        # Last: until they are forgotten, `lost` tells whoever is restored after a cut that this was not done.
        for ids in _batches(sorted(groups)):
            await self._run(scripts.FORGET, [self.keys.lineage, self.keys.pushed], [self._fence, *ids], "forget groups")

    async def pull(self, count: int, deadline_seconds: float) -> list[Entry]:
        """The next `count` groups. Entries that cannot be decoded, and those begun too often, are dead-lettered.

        Raises DeadlineExceeded when fewer came in time; those will be pulled again.
        """
        started = told = time.monotonic()
        ends, entries = started + deadline_seconds, list[Entry]()
        try:
            while len(entries) < count:
                now = time.monotonic()
                what = f"{len(entries)} of {count} scored groups of run {self.run_id} in {now - started:.0f} s"
                if now >= ends:
                    raise DeadlineExceeded(f"{what}: waited for the orchestrator to push more to {self.keys.groups}")
                if now >= told + TELL_SECONDS:
                    log.info("%s: waiting for the orchestrator", what)
                    told = now
                if not self._next:
                    refill = partial(self._refill, count - len(entries), min(BLOCK_SECONDS, ends - now))
                    await insist(refill, f"run {self.run_id}: pull groups", ends - now)
                    continue
                entry = await insist(self._open, f"run {self.run_id}: pull groups", ends - now)
                if entry is not None:
                    entries.append(entry)
        except BaseException:
            # The next pull finds them pending and not held, and takes them over again.
            self._held.difference_update(entry.entry_id for entry in entries)
            self._next = {}
            raise
        return entries

    async def begin(self, entries: Sequence[Entry]) -> None:
        """Note that these groups are about to be trained: what makes the trainer crash is found by counting."""
        keys, token = [self.keys.lineage, self.keys.attempts], secrets.token_hex(8)
        for ids in _batches([entry.entry_id for entry in entries]):
            await self._run(scripts.BEGIN, keys, [self._fence, token, *ids], "begin a step")

    async def finish(self, entries: Sequence[Entry]) -> None:
        """Note that the groups were trained without harm; they stay pending until `ack`."""
        for ids in _batches([entry.entry_id for entry in entries]):
            await self._run(
                scripts.FINISH, [self.keys.lineage, self.keys.attempts], [self._fence, *ids], "finish a step"
            )

    async def ack(self, entry_ids: Sequence[str], lineage: int) -> None:
        """Drop entries for good: call it once a durable checkpoint holds their effect. Raises Fenced."""
        await self._acknowledge(entry_ids, lineage)

    # ---- everyone ------------------------------------------------------------------------------------------------

    async def depth(self) -> Depth:
        """How much lies in the queue; also sets the `rlif_queue_*` gauges."""
        answer = await self._run(
            scripts.DEPTH, [self.keys.groups, self.keys.dead, self.keys.left_out], [GROUP], "read the queue's depth"
        )
        waiting, pending, dead, first, seconds, micros, left_out = answer
        age = int(seconds) + int(micros) / 1e6 - int(first.split(b"-")[0]) / 1e3 if first else 0.0
        depth = Depth(waiting - pending, pending, dead, max(0.0, age), left_out)
        for state in ("queued", "pending", "dead"):
            ENTRIES.labels(self.run_id, state).set(getattr(depth, state))
        OLDEST.labels(self.run_id).set(depth.oldest_age_seconds)
        return depth

    async def dead(self) -> list[DeadGroup]:
        """The dead-letter stream, oldest first."""
        found = await self._insist(lambda: self.redis.xrange(self.keys.dead), "read dead groups")
        return [
            DeadGroup(
                entry_id.decode(),
                fields[b"id"].decode(errors="replace"),
                int(fields[b"index"]),
                fields[b"reason"].decode(errors="replace"),
                fields[b"group"],
            )
            for entry_id, fields in found
        ]

    async def retry(self, entry_id: str) -> int:
        """Take a group out of the dead-letter stream and have the orchestrator make it again, by the newest weights.
        Returns its index, also when that was asked before. Raises KeyError (no such entry) and ValueError (the run
        takes no more groups, or nobody knows which group it was)."""
        keys = [self.keys.dead, self.keys.pushed, self.keys.retried, self.keys.retried_letters, self.keys.room]
        what = f"retry the dead group {entry_id}"
        index = int(await self._run(scripts.RETRY, keys, [entry_id], what))
        if index == -1:
            raise KeyError(entry_id)
        if index == -3:
            raise ValueError("the run takes no more groups: all that it trains are made, or on their way")
        if index < 0:
            raise ValueError(f"entry {entry_id} is too damaged to say which group it was")
        return index

    async def offer_room(self, room: int, retried: int) -> bool:
        """Say how many more dead groups may be asked for, besides the first `retried` ones. False, and nothing is
        changed, when more than those were asked for meanwhile."""
        keys = [self.keys.retried, self.keys.room]
        return bool(await self._run(scripts.OFFER_ROOM, keys, [retried, room], "say how many more groups are taken"))

    async def retried(self) -> list[int]:
        """The indices of the groups to be made again, as they were asked for."""
        found = await self._insist(lambda: self.redis.lrange(self.keys.retried, 0, -1), "read groups to be made again")
        return [int(index) for index in found]

    # ---- how -----------------------------------------------------------------------------------------------------

    @property
    def _fence(self) -> str:
        return "" if self.lineage is None else str(self.lineage)

    async def _insist(self, call: Callable[[], Awaitable[Result]], what: str) -> Result:
        return await insist(call, f"run {self.run_id}: {what}", self.patience_seconds)

    async def _script(self, script: str, keys: list[str], arguments: list[Any]) -> Any:
        try:
            return await self.redis.register_script(script)(keys, arguments)
        except ResponseError as error:
            code, _, rest = str(error).partition(" ")
            if code != "FENCED":
                raise
            mine = arguments[0]
            if rest.startswith("none"):
                raise Fenced(f"run {self.run_id}: redis lost the run's data; lineage {mine} must restart") from error
            raise Fenced(
                f"run {self.run_id}: lineage {mine} is outlived, {rest.split()[0]} is the current one"
            ) from error

    async def _run(self, script: str, keys: list[str], arguments: list[Any], what: str) -> Any:
        return await self._insist(lambda: self._script(script, keys, arguments), what)

    async def _acknowledge(self, entry_ids: Sequence[str], lineage: int | None) -> None:
        keys = [self.keys.lineage, self.keys.groups, self.keys.attempts]
        fence = "" if lineage is None else str(lineage)
        for ids in _batches(entry_ids):
            await self._run(scripts.ACK, keys, [fence, GROUP, *ids], "acknowledge groups")
            self._held.difference_update(ids)
            for entry_id in ids:
                self._next.pop(entry_id, None)

    async def _count_pending(self) -> int:
        """Entries delivered and not acknowledged, whoever holds them; makes the consumer group where there is none."""
        try:
            return await self._script(scripts.PENDING, [self.keys.lineage, self.keys.groups], [self._fence, GROUP])
        except ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
        try:
            await self.redis.xgroup_create(self.keys.groups, GROUP, id="0", mkstream=True)
        except ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):
                raise
        return 0

    async def _take_over(self) -> None:
        """Make `_next` every pending entry that the caller does not hold."""
        await self._count_pending()  # raises Fenced
        pending, start = list[str](), "0-0"
        while True:
            found = await self.redis.xautoclaim(
                self.keys.groups, GROUP, self.consumer, min_idle_time=0, start_id=start, count=BATCH, justid=True
            )
            if not found:
                break
            pending += [entry_id.decode() for entry_id in found]
            milliseconds, _, number = pending[-1].partition("-")
            start = f"{milliseconds}-{int(number) + 1}"
        self._held.intersection_update(pending)
        self._next = {entry_id: self._next.get(entry_id) for entry_id in pending if entry_id not in self._held}

    async def _refill(self, count: int, wait_seconds: float) -> None:
        """Fill `_next`: with entries whose delivery got lost (an earlier consumer's, or an answer redis could not
        bring), else with at most `count` new ones, for which it waits."""
        if await self._count_pending() != len(self._held):
            await self._take_over()
        if self._next:
            return
        block = max(1, int(wait_seconds * 1000))
        found = await self.redis.xreadgroup(GROUP, self.consumer, {self.keys.groups: ">"}, count=count, block=block)
        for _, entries in found or []:
            self._next |= {entry_id.decode(): fields for entry_id, fields in entries}

    async def _open(self) -> Entry | None:
        """Deliver the first of `_next`; none when it turned out to be no group to train."""
        entry_id, fields = next(iter(self._next.items()))
        begun = 0
        if fields is None:
            found = await self.redis.xrange(self.keys.groups, entry_id, entry_id)
            fields = found[0][1] if found else {}
            begun = int((await self.redis.hget(self.keys.attempts, entry_id) or b"0:").split(b":")[0])
        if begun >= self.max_deliveries:
            reason = f"training was begun {begun} times and never finished"
        else:
            try:
                group = codec.unpack_as(ScoredGroup, fields.get(b"group", b""))
            except ValueError as error:
                reason = f"not a scored group: {error}"
            else:
                if group.group_id in self._trained:
                    await self._acknowledge([entry_id], self.lineage)
                    return None
                del self._next[entry_id]
                self._held.add(entry_id)
                return Entry(entry_id, group, fields.get(b"trace", b"").decode(errors="replace"))
        group_id, index = fields.get(b"id", b"?").decode(errors="replace"), fields.get(b"index", b"")
        keys = [self.keys.lineage, self.keys.groups, self.keys.dead, self.keys.attempts, self.keys.pushed]
        payload, place = fields.get(b"group", b""), index if index.isdigit() else b"0"
        arguments = [self._fence, GROUP, entry_id, group_id, place, payload, reason]
        await self._script(scripts.DEAD_LETTER, keys, arguments)
        del self._next[entry_id]
        DEAD.labels(self.run_id).inc()
        what = f"run {self.run_id}: group {group_id} (entry {entry_id}) is dead-lettered: {reason}"
        log.error("%s", what, extra={"group_id": group_id})
        return None


def _batches(ids: Sequence[str]) -> list[Sequence[str]]:
    return [ids[start : start + BATCH] for start in range(0, len(ids), BATCH)]
