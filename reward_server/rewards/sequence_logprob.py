"""`sequence_logprob`: the log-probability of the completion by the scorer, sum_t log p_t(y_t).

EM-RL-sequence's reward (arXiv 2505.15134), and what "sharpening" maximises. It favours short completions: without a
control they tend to collapse. With `last` or `span` the sum is over those tokens. Outcomes: `ok`, `skipped` (no tokens,
or none in the span), `error` (the scorer cannot take the completion).
"""

from reward_server.reward import Context, Reward
from reward_server.rewards.tokens import TokenParams, score_tokens
from reward_server.token_scores import Scoring
from services.api import RewardGroup
from services.contract import Score


def scoring(params: TokenParams) -> Scoring:
    return Scoring(("sequence_logprob",), params.temperature)


async def score(_group: RewardGroup, params: TokenParams, context: Context) -> list[Score]:
    return await score_tokens(scoring(params), params, context, lambda logprobs: float(logprobs.sum()))


REWARD = Reward(
    name="sequence_logprob",
    description="Log-probability of the completion by the scorer: the sum over its tokens.",
    needs=("scorer",),
    range=(None, 0.0),
    params=TokenParams,
    score=score,
    scoring=scoring,
)
