"""`random`: a reward that knows nothing. The control arm that every real reward must beat."""

import hashlib

from pydantic import Field

from reward_server.reward import Context, Params, Reward
from services.api import RewardGroup
from services.contract import Score


class RandomParams(Params):
    seed: int = Field(0, ge=0)


def draw(seed: int, group_id: str, index: int) -> float:
    """Uniform in [0, 1): a function of seed, group and the completion's place alone, so that retries score alike."""
    digest = hashlib.sha256(f"{seed}\x1f{group_id}\x1f{index}".encode()).digest()
    return (int.from_bytes(digest[:8], "little") >> 11) / 2**53


async def score(group: RewardGroup, params: RandomParams, _context: Context) -> list[Score]:
    return [Score.of(draw(params.seed, group.group_id, index)) for index in range(len(group.completions))]


REWARD = Reward(
    name="random",
    description="A number in [0, 1) drawn from seed, group id and place: a control.",
    needs=(),
    range=(0.0, 1.0),
    params=RandomParams,
    score=score,
)
