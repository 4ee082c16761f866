"""`POST /v1/score`: metrics of the scorer model for completions, without any reward around them."""

import asyncio
import math
from typing import Any

import orjson

from reward_server.encoding import Encoder
from reward_server.scorer.items import ItemScores, TokenItem
from reward_server.scorer.metrics import METRICS
from services.api import ScoreItem, ScoreRequest, ScoreResponse, ScoreResult
from services.problem import Problem


def token_items(body: ScoreRequest, encoder: Encoder, check: Any) -> list[Any]:
    """The scorer's items of a request; `check` is the scorer's own. Raises Problem (422) naming the field."""
    for place, name in enumerate(body.metrics):
        if name not in METRICS:
            detail = f"there is no metric {name!r}; known: {', '.join(METRICS)}"
            raise Problem(422, "Unknown metric", detail, f"metrics[{place}]")
    items = []
    for place, item in enumerate(body.items):
        prompt = encoder.prompt(f"items[{place}]", item.messages, item.prompt, item.prompt_token_ids)
        try:
            completion = encoder.completion(item.completion, item.completion_token_ids)
            made = TokenItem(prompt, completion, tuple(body.metrics), body.temperature, body.preset, body.top_k)
            check(made)
        except ValueError as error:
            field, _, message = str(error).partition(": ")
            raise Problem(422, "The item cannot be scored", message, f"items[{place}].{field}") from error
        items.append(made)
    return items


FEW_ITEMS = 8


def _is_tokens(item: ScoreItem) -> bool:
    return item.prompt_token_ids is not None and item.completion_token_ids is not None


async def score(body: ScoreRequest, service: Any, encoder: Encoder, model: str, seconds: float) -> ScoreResponse:
    """`service` is a ScorerService. Raises Problem: 422 bad item, 504 deadline passed, 500 the model failed."""
    from reward_server.scorer.service import ScoringFailed

    if len(body.items) <= FEW_ITEMS and all(_is_tokens(item) for item in body.items):
        items = token_items(body, encoder, service.scorer.check)  # less work than a thread's wake-up
    else:
        items = await asyncio.to_thread(token_items, body, encoder, service.scorer.check)
    try:
        scored = await service.score(items, body.min_weight_version, seconds)
    except TimeoutError as error:
        raise Problem(504, "The scorer did not answer in time", str(error)) from error
    except ScoringFailed as error:
        raise Problem(500, "The model could not score the items", str(error)) from error
    results = await asyncio.to_thread(_results, body, encoder, items, scored.results)
    return ScoreResponse(
        results=results, model=model, weight_version=scored.version, vocab_size=service.scorer.vocab_size
    )


def as_json(answer: ScoreResponse) -> bytes:
    """Result by result: in one piece a big answer would hold up every other request."""
    results = [orjson.Fragment(result.model_dump_json(exclude_none=True)) for result in answer.results]
    return orjson.dumps({"results": results, **answer.model_dump(mode="json", exclude={"results"})})


def _results(body: ScoreRequest, encoder: Encoder, items: list[Any], scored: list[ItemScores]) -> list[ScoreResult]:
    results = []
    for place, (item, found) in enumerate(zip(items, scored, strict=True)):
        if not all(math.isfinite(value) for value in found.scores.values()):
            raise Problem(
                500, "The scores are not finite", f"the model's own logits are not: {found.scores}", f"items[{place}]"
            )
        counted = {name: values[body.tokens] for name, values in found.per_token.items()}
        scores = {name: METRICS[name].total(values) for name, values in counted.items() if len(values)}
        result = ScoreResult(n_tokens=found.n_tokens, scores=scores)
        if body.per_token:
            result.per_token = {name: values.tolist() for name, values in found.per_token.items()}
            result.tokens = encoder.pieces(item.completion_ids[: found.n_tokens])
        results.append(result)
    return results
