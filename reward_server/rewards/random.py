"""`random`: a reward that knows nothing. The control arm that every real reward must beat.

Uniform in [0, 1), or with `coin` 0 or 1 (open-r1-intuitor's noise reward): a function of seed, group id and place
alone, so that a retry scores alike. Outcomes: `ok`.

Random rewards have lifted some model families on their home benchmarks (Spurious Rewards, arXiv 2506.10947:
Qwen2.5-Math by 21 points, Llama and OLMo not), so a gain is only a gain against this arm, on more than one family.
"""

import hashlib

from pydantic import Field

from reward_server.reward import Context, Params, Reward
from services.api import RewardGroup
from services.contract import Score


class RandomParams(Params):
    seed: int = Field(0, ge=0)
    coin: bool = Field(False, description="a fair coin, 0 or 1, instead of a number in [0, 1)")


def draw(seed: int, group_id: str, index: int) -> float:
    """Uniform in [0, 1): a function of seed, group and the completion's place alone, so that retries score alike."""
    digest = hashlib.sha256(f"{seed}\x1f{group_id}\x1f{index}".encode()).digest()
    return (int.from_bytes(digest[:8], "little") >> 11) / 2**53


async def score(group: RewardGroup, params: RandomParams, _context: Context) -> list[Score]:
    drawn = [draw(params.seed, group.group_id, index) for index in range(len(group.completions))]
    return [Score.of(float(value >= 0.5) if params.coin else value) for value in drawn]


REWARD = Reward(
    name="random",
    description="A number in [0, 1), or a coin, drawn from seed, group id and place: a control.",
    needs=(),
    range=(0.0, 1.0),
    params=RandomParams,
    score=score,
)
