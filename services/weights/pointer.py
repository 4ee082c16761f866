"""What redis knows of a run's weights: the newest version, and which replica serves which."""

import json
import re
import time
from typing import Any

from pydantic import ValidationError
from redis import Redis
from redis.asyncio import Redis as AsyncRedis

from services.contract import Version, WeightVersion, Wire
from services.keys import Keys

# KEYS: weights, weights_id; ARGV: lineage, version, JSON, channel. An equal version is this very call, repeated.
ADVANCE = """
local lineage, version = string.match(redis.call('GET', KEYS[2]) or '', '(%d+)%.(%d+)')
if lineage then
  local apart = tonumber(ARGV[1]) - tonumber(lineage)
  if apart == 0 then apart = tonumber(ARGV[2]) - tonumber(version) end
  if apart < 0 then return 0 end
end
redis.call('SET', KEYS[1], ARGV[3])
redis.call('SET', KEYS[2], ARGV[1] .. '.' .. ARGV[2])
redis.call('PUBLISH', ARGV[4], ARGV[1] .. '.' .. ARGV[2])
return 1
"""


class Heartbeat(Wire):
    """What one replica serves. `version` is none while it serves the base model; `at`: Unix seconds of its clock."""

    replica: str
    service: str
    url: str
    version: Version | None
    at: float


def _version(text: bytes | None) -> Version | None:
    if text is None:
        return None
    found = re.fullmatch(rb"(\d{1,15})\.(\d{1,15})", text)
    if found is None:
        raise ValueError(f"redis holds {text!r:.60} where the newest weight version belongs")
    return Version(lineage=int(found[1]), version=int(found[2]))


def advance(redis: Redis, weights: WeightVersion) -> bool:
    """Make `weights` the newest version and announce it; False when redis already names a newer one."""
    keys = Keys(weights.run_id)
    arguments: list[Any] = [weights.lineage, weights.version, weights.model_dump_json(), keys.weights_news]
    return bool(redis.register_script(ADVANCE)([keys.weights, keys.weights_id], arguments))


def newest_version_sync(redis: Redis, run_id: str) -> Version | None:
    """`newest_version` for the blocking client."""
    answer: Any = redis.get(Keys(run_id).weights_id)
    return _version(answer)


async def newest_version(redis: AsyncRedis, run_id: str) -> Version | None:
    """The newest published version, without its manifest: cheap enough to poll. None before the first."""
    answer: Any = await redis.get(Keys(run_id).weights_id)
    return _version(answer)


async def newest(redis: AsyncRedis, run_id: str) -> WeightVersion | None:
    """The newest published version. Raises ValueError when redis holds something else."""
    answer: Any = await redis.get(Keys(run_id).weights)
    return None if answer is None else WeightVersion.model_validate_json(answer)


async def beat(redis: AsyncRedis, run_id: str, heartbeat: Heartbeat) -> None:
    body = heartbeat.model_dump_json(exclude={"replica"})
    await redis.hset(Keys(run_id).followers, heartbeat.replica, body)


async def leave(redis: AsyncRedis, run_id: str, replica: str) -> None:
    await redis.hdel(Keys(run_id).followers, replica)


async def heartbeats(redis: AsyncRedis, run_id: str, within_seconds: float = 30.0) -> list[Heartbeat]:
    """The replicas that reported within the last seconds (by this machine's clock), by name."""
    return _recent(await redis.hgetall(Keys(run_id).followers), within_seconds)


def heartbeats_sync(redis: Redis, run_id: str, within_seconds: float = 30.0) -> list[Heartbeat]:
    """`heartbeats` for the blocking client."""
    return _recent(redis.hgetall(Keys(run_id).followers), within_seconds)


def _recent(found: Any, within_seconds: float) -> list[Heartbeat]:
    beats = []
    for replica, body in sorted(found.items()):
        try:
            heartbeat = Heartbeat(replica=replica.decode(), **json.loads(body))
        except (ValidationError, ValueError, TypeError):
            continue
        if time.time() - heartbeat.at <= within_seconds:
            beats.append(heartbeat)
    return beats
