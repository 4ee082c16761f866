"""`topk_confidence`: DeepConf's confidence, minus the mean log-probability of the scorer's k likeliest tokens.

C_t = -(1/k) sum_{j<=k} log p_(j), over the k likeliest tokens: log k where they share everything equally, and the
larger the surer the model is of one of them (arXiv 2508.15260). `aggregate` makes one number of it:

- `mean`: over the completion.
- `lowest_group`: the lowest mean of any `window` consecutive tokens.
- `bottom_10`: the mean of the lowest tenth of those window means (rounded down, at least one).
- `tail`: the mean over the last `window` tokens.

Windows slide by one token. A completion that is shorter than the window is one window: all aggregates are then its
mean, so that no completion is skipped for being short. With `last` or `span` all this is done to those tokens.
Outcomes: `ok`, `skipped` (no tokens, or none in the span), `error` (the scorer cannot take the completion).
"""

from typing import Literal

import numpy as np
from pydantic import Field

from reward_server.reward import Context, Reward
from reward_server.rewards.tokens import TokenParams, score_tokens
from reward_server.scorer.metrics import MOST_TOP_K, TOP_K
from reward_server.scorer.reductions import AGGREGATES
from reward_server.token_scores import Scoring
from services.api import RewardGroup
from services.contract import Score


class TopkConfidenceParams(TokenParams):
    k: int = Field(TOP_K, ge=1, le=MOST_TOP_K, description="how many of the likeliest tokens")
    aggregate: Literal["mean", "lowest_group", "bottom_10", "tail"] = "mean"
    window: int = Field(2048, ge=1, le=1_000_000, description="tokens of a window; not used by `mean`")


def scoring(params: TopkConfidenceParams) -> Scoring:
    return Scoring(("topk_confidence",), params.temperature, top_k=params.k)


async def score(_group: RewardGroup, params: TopkConfidenceParams, context: Context) -> list[Score]:
    def value(confidences: np.ndarray) -> float:
        return AGGREGATES[params.aggregate](confidences, params.window)

    return await score_tokens(scoring(params), params, context, value)


REWARD = Reward(
    name="topk_confidence",
    description="DeepConf's confidence: minus the mean log-probability of the scorer's k likeliest tokens, aggregated.",
    needs=("scorer",),
    range=(0.0, None),
    params=TopkConfidenceParams,
    score=score,
    scoring=scoring,
)
