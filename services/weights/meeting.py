"""How the trainer and the servers meet for a broadcast, over Redis: nobody is pushed, and nobody waits for the dead.

The trainer *offers* the newest version for as long as it lives. A server that wants it deals with what it has in
flight, takes a *seat*, and waits. When those who are expected sit, or the first has sat long enough, the trainer
*calls* those that sit: by then they do nothing else. A seat counts for one call, and for whatever version that names.
"""

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, ValidationError
from redis import Redis
from redis.asyncio import Redis as AsyncRedis

from services.contract import Count, Items, Version, WeightVersion, Wire
from services.keys import Keys
from services.weights import pointer

TRANSPORTS = ("nccl", "ipc")
"""Of weights that are broadcast; the others are files."""
LineKind = Literal["nccl", "ipc", "gloo"]

OFFER_SECONDS = 10.0
"""How long an offer outlives a trainer that no longer renews it."""
SEAT_SECONDS = 10.0
"""A seat that was not renewed for so long is empty; by the clock of redis."""
GATHER_SECONDS = 10.0
"""How long the first to sit waits for the others."""
RENEW_SECONDS = 1.0
LOOK_SECONDS = 0.02


class NotCalled(Exception):
    """The trainer broadcasts nothing to this server now; the message says why. Nothing has changed."""


class Offer(Wire):
    """A trainer lives that broadcasts the newest weights. `seconds`: how long one broadcast may take. `left_out`: the
    sessions of engines that it calls no more until the next whole version."""

    seconds: float = Field(gt=0)
    left_out: list[str] = Field(default_factory=list)


class Seat(Wire):
    """`session` is the engine's: a restarted one has another. `workers`: its ranks in a broadcast. `at`: by redis."""

    id: str
    replica: str
    session: str
    workers: int = Field(ge=1)
    at: float


class Call(Wire):
    """A broadcast of `version` along the line `line_id`, which is opened at `rendezvous` where it is new.

    `first_ranks`: seat -> the first of its workers' ranks among `size`; the trainer has rank 0. `sums`: of each bucket
    of at most `bucket_bytes`. `seconds`: how long it may take.
    """

    version: Version
    line: LineKind
    line_id: str
    rendezvous: str
    size: int = Field(ge=2)
    first_ranks: dict[str, Count]
    bucket_bytes: int = Field(ge=1)
    sums: Items[int]
    seconds: float = Field(gt=0)


@dataclass(frozen=True)
class Ticket:
    """What a server was called to: the weights as redis names them, and its place in the broadcast."""

    weights: WeightVersion
    call: Call
    first_rank: int


Meet = Callable[[str, int], Awaitable[Ticket]]
"""(session, workers) -> the call of this engine. Raises NotCalled. Nothing may be in flight while it waits."""
Receive = Callable[[WeightVersion, Meet], Awaitable[WeightVersion]]
"""An engine's part: takes these weights, or newer ones that it is called to; returns which."""


# ---- the trainer -----------------------------------------------------------------------------------------------


def offer(redis: Redis, run_id: str, made: Offer, for_seconds: float = OFFER_SECONDS) -> None:
    """Valid until then; to be renewed before."""
    redis.set(Keys(run_id).weights_offer, made.model_dump_json(), px=int(1000 * for_seconds))


def withdraw(redis: Redis, run_id: str) -> None:
    redis.delete(Keys(run_id).weights_offer)


def seats(redis: Redis, run_id: str) -> list[Seat]:
    """Those that are taken now, by replica."""
    found: Any = redis.hgetall(Keys(run_id).weights_seats)
    if not found:
        return []
    seconds, micros = redis.time()
    taken = []
    for _, body in sorted(found.items()):
        try:
            seat = Seat.model_validate_json(body)
        except ValidationError:
            continue
        if seconds + micros / 1e6 - seat.at < SEAT_SECONDS:
            taken.append(seat)
    return taken


def call(redis: Redis, run_id: str, made: Call) -> None:
    redis.set(Keys(run_id).weights_call, made.model_dump_json(), px=int(1000 * made.seconds))


# ---- a server --------------------------------------------------------------------------------------------------


async def offered(redis: AsyncRedis, run_id: str) -> Offer:
    """What the trainer offers now. Raises NotCalled."""
    answer: Any = await redis.get(Keys(run_id).weights_offer)
    if answer is None:
        raise NotCalled("no trainer offers to broadcast weights")
    return Offer.model_validate_json(answer)


async def sit(
    redis: AsyncRedis, run_id: str, replica: str, gone: Callable[[], bool], session: str, workers: int
) -> Ticket:
    """Take a seat and wait for the trainer's call, for as long as it offers anything and unless `gone()`. Raises
    NotCalled."""
    keys, seat_id = Keys(run_id), uuid.uuid4().hex
    ends = time.monotonic() + GATHER_SECONDS + 2 * (await offered(redis, run_id)).seconds
    renewed = -RENEW_SECONDS
    try:
        while not gone():
            if time.monotonic() - renewed >= RENEW_SECONDS:
                seconds, micros = await redis.time()
                at = seconds + micros / 1e6
                seat = Seat(id=seat_id, replica=replica, session=session, workers=workers, at=at)
                await redis.hset(keys.weights_seats, replica, seat.model_dump_json())
                renewed = time.monotonic()
            answer: Any = await redis.get(keys.weights_call)
            made = None if answer is None else Call.model_validate_json(answer)
            if made is not None and seat_id in made.first_ranks:
                weights = await pointer.newest(redis, run_id)
                if weights is None or weights.id != made.version:
                    raise NotCalled(f"called to weights {made.version}, which are not the newest")
                return Ticket(weights, made, made.first_ranks[seat_id])
            if session in (await offered(redis, run_id)).left_out:
                raise NotCalled("a broadcast to this engine alone failed; it is left out until the next whole version")
            if time.monotonic() > ends:
                raise NotCalled("the trainer offers weights, but did not call in time")
            await asyncio.sleep(LOOK_SECONDS)
    finally:
        await redis.hdel(keys.weights_seats, replica)
    raise NotCalled("this server stops")
