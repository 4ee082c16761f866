"""`cosine_length`: a reward for being right that shrinks with length along a cosine, and a penalty for being wrong.

With p = min(1, length / max_len) and c(p) = (1 + cos(pi p)) / 2, falling from 1 to 0: a right completion gets
min_value_correct + (max_value_correct - min_value_correct) c(p), a wrong one max_value_wrong + (min_value_wrong -
max_value_wrong) c(p). So the defaults fall from 1 (right and short) to 0.5 (right and long), and from 0 (wrong and
short) to -0.5 (wrong and long). The formula, the names and the defaults are open-r1's (after Yeo et al., arXiv
2502.03373, who let a wrong answer's penalty shrink with length: put min_value_wrong below max_value_wrong for that).

Other than open-r1 it stays at its end beyond max_len (there the cosine comes up again), and a completion whose
correctness is not known is left out (there it counts as right).

What is right says another term of the spec (`correct`; give it weight 0 if it is to count only through this reward).
Outcomes: `ok`, the other term's failures, `error` (tokens are to be counted and there are no token_ids).
"""

import math

from pydantic import Field

from reward_server.reward import Context, Reward
from reward_server.rewards.lengths import CorrectnessParams, count, scored_by_length
from services.api import RewardGroup
from services.contract import Score


class CosineLengthParams(CorrectnessParams):
    min_value_wrong: float = Field(0.0, ge=-1e6, le=1e6, description="a wrong completion of length 0")
    max_value_wrong: float = Field(-0.5, ge=-1e6, le=1e6, description="a wrong completion of length max_len")
    min_value_correct: float = Field(0.5, ge=-1e6, le=1e6, description="a right completion of length max_len")
    max_value_correct: float = Field(1.0, ge=-1e6, le=1e6, description="a right completion of length 0")
    max_len: int = Field(1000, ge=1, description="in `unit`; longer ones count as this long")


def value(length: int, is_right: bool, params: CosineLengthParams) -> float:
    share = (1.0 + math.cos(math.pi * min(1.0, length / params.max_len))) / 2
    if is_right:
        short, long = params.max_value_correct, params.min_value_correct
    else:
        short, long = params.min_value_wrong, params.max_value_wrong
    return share * short + (1.0 - share) * long


async def score(group: RewardGroup, params: CosineLengthParams, context: Context) -> list[Score]:
    lengths = [count(completion, params.unit) for completion in group.completions]
    return await scored_by_length(lengths, params, context, lambda n, right: value(n, right, params))


REWARD = Reward(
    name="cosine_length",
    description="A right answer pays less, a wrong one costs more, the longer it is, along a cosine (open-r1).",
    needs=(),
    range=(None, None),
    params=CosineLengthParams,
    score=score,
    depends=lambda params: (params.correct,),
)
