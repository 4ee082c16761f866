"""`self_certainty`: how far the model's next-token distributions are from uniform, on average over the completion.

SC = mean_t KL(U || p_t) = mean_t [ logsumexp(z_t) - mean_j z_tj - log V ], natural logarithm (arXiv 2505.19590).
"""

import asyncio
import time
from typing import Any, Literal

from pydantic import Field

from reward_server.reward import Context, Params, Reward
from services.api import RewardGroup
from services.contract import LOWEST_TEMPERATURE, Outcome, Score
from services.http import Problem


class SelfCertaintyParams(Params):
    temperature: float = Field(1.0, ge=LOWEST_TEMPERATURE, le=100, description="divides the logits first")
    preset: Literal["paper", "open_r1", "verl"] = Field("paper", description="the definition; see /v1/score")


def _items(group: RewardGroup, params: SelfCertaintyParams, context: Context) -> list[Any]:
    """What to score of each completion, or why it cannot be (a string)."""
    from reward_server.scorer.transformers import TokenItem

    task, encoder = group.task, context.encoder
    prompt = encoder.prompt(f"{context.field}.task", task.messages, task.prompt, group.prompt_token_ids)
    items: list[Any] = []
    for completion in group.completions:
        try:
            token_ids = encoder.completion(completion.text, completion.token_ids)
            item = TokenItem(prompt, token_ids, ("self_certainty",), params.temperature, params.preset)
            context.scorer.scorer.check(item)
            items.append(item)
        except ValueError as error:
            items.append(str(error))
    return items


async def score(group: RewardGroup, params: SelfCertaintyParams, context: Context) -> list[Score]:
    """All completions of the group in one call, hence under one weight version. Raises Problem (504): the scorer did
    not answer in time, which says nothing of the completions."""
    from reward_server.scorer.service import ScoringFailed

    started = time.monotonic()
    items = await asyncio.to_thread(_items, group, params, context)
    scores: dict[int, Score] = {}
    for place, item in enumerate(items):
        if isinstance(item, str):
            scores[place] = Score.failed(Outcome.error, item)
    sound = [place for place in range(len(items)) if place not in scores]
    if sound:
        remaining = max(0.0, context.deadline - time.monotonic())
        try:
            scored = await context.scorer.score([items[place] for place in sound], group.min_weight_version, remaining)
        except TimeoutError as error:
            raise Problem(504, "The scorer did not answer in time", str(error)) from error
        except ScoringFailed as error:
            failed = Score.failed(Outcome.error, str(error), time.monotonic() - started)
            return [scores.get(place, failed) for place in range(len(items))]
        context.scored_by(scored.version)
        seconds = time.monotonic() - started
        for place, result in zip(sound, scored.results, strict=True):
            if result.n_tokens:
                scores[place] = Score.of(result.scores["self_certainty"], seconds=seconds)
            else:
                scores[place] = Score.failed(Outcome.skipped, "the completion has no tokens", seconds)
    return [scores[place] for place in range(len(items))]


REWARD = Reward(
    name="self_certainty",
    description="Mean KL divergence from the uniform to the scorer's next-token distribution over the completion.",
    needs=("scorer",),
    range=(0.0, None),
    params=SelfCertaintyParams,
    score=score,
)
