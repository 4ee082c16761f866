"""`reference_probability`: how probable is the reference answer to the scorer, after the completion's own reasoning?

The completion is cut where its answer begins; what stands before it is the reasoning z, and the reference answer y* is
put in the answer's place. `mode: verifree` is pi(y* | x, z) = exp(sum_t log p_t), the probability of the whole answer
(VeriFree, arXiv 2505.21493); `mode: rlpr` is the mean over its tokens of p_t, which long answers survive (RLPR, arXiv
2506.18254). With `debias` what that is without any reasoning (prompt, then the opening of an answer, then y*) is taken
off and the difference cut to 0..1, as RLPR does. Only y*'s own tokens count, not what closes it.

Prompt, reasoning (with the opening of its answer) and y* are tokenized each by itself, so that a reward does not depend
on which characters a tokenizer would merge at the seams; y* is stripped of blanks.

Outcomes: `ok`, `no_answer` (there is nothing to cut at; value 0), `unparsable` (the reference has no tokens), `error`
(too long for the model, or the scorer failed), `timeout` (a `regex` that takes too long).
"""

import asyncio
import math
import re
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from reward_server.reward import Context, Params, Reward
from reward_server.rewards import patterns
from services.api import RewardGroup
from services.contract import LOWEST_TEMPERATURE, Outcome, Score
from services.problem import Problem

if TYPE_CHECKING:
    from reward_server.scorer.items import ItemScores

OPENINGS = {"boxed": "\\boxed{", "answer_tag": "<answer>"}


class ReferenceProbabilityParams(Params):
    """`cut`: the answer begins after the last `\\boxed{`, after the last `<answer>`, or with the group of the last
    match of `regex`."""

    mode: Literal["verifree", "rlpr"] = "verifree"
    cut: Literal["boxed", "answer_tag", "regex"] = "boxed"
    regex: patterns.Pattern | None = Field(None, description="with `cut: regex`: has one group, the answer")
    debias: bool = Field(False, description="take off the probability without the reasoning")
    temperature: float = Field(1.0, ge=LOWEST_TEMPERATURE, le=100, description="divides the scorer's logits first")

    @model_validator(mode="after")
    def pattern_where_it_is_used(self) -> Self:
        if (self.cut == "regex") != (self.regex is not None):
            raise ValueError("`cut: regex` and `regex` belong together: give both or neither")
        if self.regex is not None and re.compile(self.regex).groups != 1:
            raise ValueError(f"regex: needs exactly one group, the answer (got {re.compile(self.regex).groups})")
        return self


Cut = tuple[str, str]
"""What stands before the answer, and the end of it that opens the answer (`\\boxed{`)."""


async def _cut(text: str, params: ReferenceProbabilityParams, context: Context) -> Cut | Score:
    if params.regex is None:
        opening = OPENINGS[params.cut]
        start = text.rfind(opening)
        if start < 0:
            return Score.of(0.0, Outcome.no_answer)
        return text[: start + len(opening)], opening
    verdict = await patterns.match(params.regex, text, "last", context)
    if verdict.status != "ok":
        return Score.failed(Outcome(verdict.status), verdict.detail, verdict.seconds)
    if verdict.result["group"] is None:
        return Score.of(0.0, Outcome.no_answer, seconds=verdict.seconds)
    begins, answer = verdict.result["span"]
    return text[:answer], text[begins:answer]


def probability(found: "ItemScores", mode: str) -> float:
    """Of the answer's tokens (see the module); `found` holds each one's log-probability."""
    import numpy as np

    logprobs = found.per_token["sequence_logprob"]
    return float(np.exp(logprobs.sum()) if mode == "verifree" else np.exp(logprobs).mean())


def _items(group: RewardGroup, cuts: list[Cut], params: ReferenceProbabilityParams, context: Context) -> list[Any]:
    """A TokenItem a cut, or why the model cannot score it (a string). Tokenizes: run it in a thread."""
    from reward_server.scorer.items import TokenItem

    task, encoder = group.task, context.encoder
    prompt = encoder.prompt(f"{context.field}.task", task.messages, task.prompt, group.prompt_token_ids)
    gold = (task.reference.answer or "").strip() if task.reference else ""
    items: list[Any] = []
    for before, _ in cuts:
        try:
            answer = encoder.completion(gold, None)
            leading = [*prompt, *encoder.completion(before, None)]
            item = TokenItem(leading, answer, ("sequence_logprob",), params.temperature)
            context.scorer.scorer.check(item)
            items.append(item)
        except ValueError as error:
            items.append(str(error))
    return items


async def _probabilities(
    group: RewardGroup, cuts: list[Cut], params: ReferenceProbabilityParams, context: Context
) -> list[float | Score]:
    """Of the reference answer after each cut, by one call to the scorer."""
    from reward_server.scorer.service import ScoringFailed

    items = await asyncio.to_thread(_items, group, cuts, params, context)
    sound = [item for item in items if not isinstance(item, str)]
    results: Iterator[ItemScores] = iter(())
    if sound:
        try:
            remaining = max(0.0, context.deadline - time.monotonic())
            scored = await context.scorer.score(sound, group.min_weight_version, remaining)
        except TimeoutError as error:
            raise Problem(504, "The scorer did not answer in time", str(error)) from error
        except ScoringFailed as error:
            return [Score.failed(Outcome.error, str(error))] * len(cuts)
        context.scored_by(scored.version)
        results = iter(scored.results)
    found: list[float | Score] = []
    for item in items:
        if isinstance(item, str):
            found.append(Score.failed(Outcome.error, item))
            continue
        result = next(results)
        empty = Score.failed(Outcome.unparsable, "the reference answer has no tokens")
        found.append(probability(result, params.mode) if result.n_tokens else empty)
    return found


async def score(group: RewardGroup, params: ReferenceProbabilityParams, context: Context) -> list[Score]:
    started = time.monotonic()
    cut = await asyncio.gather(*(_cut(item.text, params, context) for item in group.completions))
    whole = [item for item in cut if not isinstance(item, Score)]
    # Openings differ between completions only where a `regex` lets them.
    openings = list(dict.fromkeys(opening for _, opening in whole)) if params.debias else []
    asked = list(dict.fromkeys([*whole, *((opening, opening) for opening in openings)]))
    found = dict(zip(asked, await _probabilities(group, asked, params, context), strict=True)) if asked else {}
    seconds = time.monotonic() - started

    def one(item: Cut | Score) -> Score:
        if isinstance(item, Score):
            return item
        value = found[item]
        if isinstance(value, Score) or not params.debias:
            return value if isinstance(value, Score) else Score.of(value, seconds=seconds)
        base = found[item[1], item[1]]
        if isinstance(base, Score):
            return base
        detail = f"{value:.4g}, without the reasoning {base:.4g}"
        gain = value - base
        return Score.of(gain if math.isnan(gain) else min(1.0, max(0.0, gain)), detail=detail, seconds=seconds)

    return [one(item) for item in cut]


REWARD = Reward(
    name="reference_probability",
    description="The probability of the reference answer to the scorer, after the completion's reasoning.",
    needs=("scorer", "reference.answer"),
    range=(0.0, 1.0),
    params=ReferenceProbabilityParams,
    score=score,
)
