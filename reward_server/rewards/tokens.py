"""What the rewards from the scoring pass share: which tokens count, and one number out of theirs."""

from collections.abc import Callable

import numpy as np
from pydantic import Field

from reward_server.reward import Context, Params
from reward_server.scorer.reductions import mean_of_highest
from reward_server.token_scores import Scoring
from services.api import TokenSpan
from services.contract import LOWEST_TEMPERATURE, Outcome, Score


class TokenParams(Params, TokenSpan):
    temperature: float = Field(1.0, ge=LOWEST_TEMPERATURE, le=100, description="divides the scorer's logits first")


class TokenMeanParams(TokenParams):
    top_fraction: float = Field(
        1.0, gt=0, le=1, description="only this share of the tokens counts, those where the metric is highest"
    )

    def mean(self, values: np.ndarray) -> float:
        return mean_of_highest(values, self.top_fraction)


async def score_tokens(
    scoring: Scoring, params: TokenParams, context: Context, value: Callable[[np.ndarray], float]
) -> list[Score]:
    """`value` of what the one metric of `scoring` is at the tokens that count.

    A completion without any such token is skipped: it has no value, rather than 0.
    """
    assert context.token_scores is not None
    scores = []
    for item in await context.token_scores.read(scoring):
        if isinstance(item, Score):
            scores.append(item)
            continue
        values = item.per_token[scoring.metrics[0]][params.tokens]
        if len(values):
            scores.append(Score.of(value(values)))
        else:
            detail = f"none of the completion's {item.n_tokens} tokens lies in {params.describe()}"
            scores.append(Score.failed(Outcome.skipped, detail))
    return scores
