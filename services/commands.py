"""Orders to the trainer: a list in Redis, in the order in which they were given. It obeys between two steps.

Giving one is idempotent by its id, so whoever gives orders may be killed and do so again. The trainer counts those it
obeyed, and the count is part of its checkpoints; what came of each, and at which step, it notes beside the list: a
restored trainer obeys at the same step as the first time.
"""

import time
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter
from redis.asyncio import Redis

from services.contract import Count, Version, Wire
from services.keys import Keys

SEND = """
if redis.call('SADD', KEYS[2], ARGV[1]) == 0 then return 0 end
redis.call('RPUSH', KEYS[1], ARGV[2])
return 1
"""


class Order(Wire):
    id: str = Field(min_length=1, max_length=128)


class EvaluationResult(Wire):
    """`version` was to be evaluated; `oldest` and `newest` made the answers (none: no task could be answered)."""

    version: Version
    oldest: Version | None
    newest: Version | None
    tasks: int
    failed: int
    metrics: dict[str, float]
    best: bool
    seconds: float
    at: float = Field(default_factory=time.time)


class Evaluated(Order):
    """Write the result down and track its metrics; with `best` its version's checkpoint is the best so far."""

    kind: Literal["evaluated"] = "evaluated"
    result: EvaluationResult


class RaiseBeta(Order):
    """Multiply the weight of the KL term by `factor`, up to `cap`."""

    kind: Literal["raise_beta"] = "raise_beta"
    factor: float = Field(gt=1)
    cap: float = Field(gt=0)
    reason: str


class RollBack(Order):
    """Go back to a checkpoint of a step before `before`, and train on at `rate_factor` of the learning rate."""

    kind: Literal["roll_back"] = "roll_back"
    before: Count
    rate_factor: float = Field(gt=0, le=1)
    reason: str


class Stop(Order):
    """End the run, with a checkpoint."""

    kind: Literal["stop"] = "stop"
    reason: str


class Finish(Order):
    """The last step's weights were looked at: nothing keeps the trainer any more."""

    kind: Literal["finish"] = "finish"


AnyOrder = Annotated[Evaluated | RaiseBeta | RollBack | Stop | Finish, Field(discriminator="kind")]
_ORDER: TypeAdapter[AnyOrder] = TypeAdapter(AnyOrder)


class Obeyed(Wire):
    """What came of an order. `step` and `lineage`: where the trainer stood when it obeyed; `effect` in plain words."""

    step: Count
    lineage: Count
    effect: str
    at: float = Field(default_factory=time.time)


def parse(body: bytes | str) -> AnyOrder:
    """Raises ValidationError."""
    return _ORDER.validate_json(body)


async def send(redis: Redis, run_id: str, order: AnyOrder) -> bool:
    """False when an order of this id was given before."""
    keys = Keys(run_id)
    script: Any = redis.register_script(SEND)
    return bool(await script([keys.commands, keys.command_ids], [order.id, order.model_dump_json()]))


async def after(redis: Redis, run_id: str, count: int) -> list[AnyOrder]:
    """The orders that follow the first `count`. A redis that knows fewer lost its data: then those count that were not
    obeyed since."""
    store: Any = redis
    given = [parse(body) for body in await store.lrange(Keys(run_id).commands, 0, -1)]
    if len(given) >= count:
        return given[count:]
    obeyed = await all_obeyed(redis, run_id)
    return [order for order in given if order.id not in obeyed]


async def unnoted(redis: Redis, run_id: str, count: int) -> list[AnyOrder]:
    """Those of the first `count` orders of which nobody noted what came; none where redis lost its data."""
    store: Any = redis
    given = [parse(body) for body in await store.lrange(Keys(run_id).commands, 0, -1)]
    obeyed = await all_obeyed(redis, run_id)
    return [order for order in given[:count] if order.id not in obeyed] if len(given) >= count else []


async def note_obeyed(redis: Redis, run_id: str, order_id: str, obeyed: Obeyed) -> None:
    store: Any = redis
    await store.hset(Keys(run_id).commands_obeyed, order_id, obeyed.model_dump_json())


async def all_obeyed(redis: Redis, run_id: str) -> dict[str, Obeyed]:
    """By the order's id."""
    store: Any = redis
    found = await store.hgetall(Keys(run_id).commands_obeyed)
    return {order_id.decode(): Obeyed.model_validate_json(body) for order_id, body in found.items()}
