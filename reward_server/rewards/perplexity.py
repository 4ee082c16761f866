"""`perplexity`: minus the completion's perplexity by the scorer, so that a positive weight rewards likely completions.

-exp(-(1/T) sum_t log p_t(y_t)). `POST /v1/score` gives the perplexity itself; both stop at e^700. With `last` or `span`
it is that of those tokens. Outcomes: `ok`, `skipped` (no tokens, or none in the span), `error` (the scorer cannot take
the completion).
"""

from reward_server.reward import Context, Reward
from reward_server.rewards.tokens import TokenParams, score_tokens
from reward_server.scorer.metrics import METRICS
from reward_server.token_scores import Scoring
from services.api import RewardGroup
from services.contract import Score


def scoring(params: TokenParams) -> Scoring:
    return Scoring(("perplexity",), params.temperature)


async def score(_group: RewardGroup, params: TokenParams, context: Context) -> list[Score]:
    return await score_tokens(scoring(params), params, context, lambda logprobs: -METRICS["perplexity"].total(logprobs))


REWARD = Reward(
    name="perplexity",
    description="Minus the perplexity of the completion by the scorer: higher is likelier.",
    needs=("scorer",),
    range=(None, -1.0),
    params=TokenParams,
    score=score,
    scoring=scoring,
)
