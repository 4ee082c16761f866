"""`overlong`: a soft penalty for nearing the length limit (DAPO, arXiv 2503.14476, equation 13).

With n the completion's tokens: 0 up to max_length - cache, then falling evenly to -1 at max_length, and -1 beyond.

Outcomes: `ok`, `error` (the completion has no token_ids; characters are no stand-in for a limit in tokens). Caveat:
max_length belongs to the sampling's `max_tokens`; with a larger one hardly a completion ever pays.
"""

from pydantic import Field, model_validator

from reward_server.reward import Context, Params, Reward
from services.api import RewardGroup
from services.contract import Outcome, Score


class OverlongParams(Params):
    max_length: int = Field(16384, ge=1, description="tokens that cost the full penalty")
    cache: int = Field(4096, ge=1, description="tokens before max_length over which the penalty grows")

    @model_validator(mode="after")
    def cache_fits(self) -> "OverlongParams":
        if self.cache > self.max_length:
            raise ValueError(f"cache ({self.cache}) is greater than max_length ({self.max_length})")
        return self


def penalty(n_tokens: int, params: OverlongParams) -> float:
    return 0.0 - min(1.0, max(0, n_tokens - (params.max_length - params.cache)) / params.cache)


async def score(group: RewardGroup, params: OverlongParams, _context: Context) -> list[Score]:
    return [
        Score.failed(Outcome.error, "the length in tokens is not known: the completion has no token_ids")
        if completion.token_ids is None
        else Score.of(penalty(len(completion.token_ids), params))
        for completion in group.completions
    ]


REWARD = Reward(
    name="overlong",
    description="0, falling to -1 over the last `cache` tokens before `max_length` (DAPO's soft overlong punishment).",
    needs=(),
    range=(-1.0, 0.0),
    params=OverlongParams,
    score=score,
)
