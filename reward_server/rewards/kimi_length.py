"""`kimi_length`: among the completions of one prompt, right and short is best.

The length reward of Kimi k1.5 (arXiv 2501.12599): lam = 0.5 - (len - min) / (max - min), min and max being over the
group. A right completion gets lam, a wrong one min(0, lam): being short never pays without being right. When all are
equally long, all get 0.

What is right says another term of the spec (`correct`; give it weight 0 if it is to count only through this reward).
Where that term failed, the completion gets its failure and is left out; its length still counts for min and max.

Outcomes: `ok`, the other term's failures, `error` (tokens are to be counted and there are no token_ids). Caveat: the
values depend on the group, so they do not compare between prompts. Kimi k1.5 warms it up (a ramp schedule does that).
"""

from reward_server.reward import Context, Reward
from reward_server.rewards.lengths import CorrectnessParams, count, scored_by_length
from services.api import RewardGroup
from services.contract import Score


def bonus(length: int, shortest: int, longest: int, is_right: bool) -> float:
    if longest == shortest:
        return 0.0
    lam = 0.5 - (length - shortest) / (longest - shortest)
    return lam if is_right else min(0.0, lam)


async def score(group: RewardGroup, params: CorrectnessParams, context: Context) -> list[Score]:
    lengths = [count(completion, params.unit) for completion in group.completions]
    known = [length for length in lengths if not isinstance(length, Score)]
    shortest, longest = min(known, default=0), max(known, default=0)
    return await scored_by_length(lengths, params, context, lambda n, right: bonus(n, shortest, longest, right))


REWARD = Reward(
    name="kimi_length",
    description="0.5 for the shortest of the group to -0.5 for the longest; wrong ones get at most 0 (Kimi k1.5).",
    needs=(),
    range=(-0.5, 0.5),
    params=CorrectnessParams,
    score=score,
    depends=lambda params: (params.correct,),
)
