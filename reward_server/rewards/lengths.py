"""What the rewards about length share: counting, and asking another term whether a completion is right."""

from collections.abc import Callable
from typing import Literal

from pydantic import Field

from reward_server.reward import Context, Params
from services.api import CompletionText
from services.contract import Outcome, Score


class CorrectnessParams(Params):
    """A completion is right when the term `correct` has a value of at least `correct_from`."""

    correct: str = Field(
        "math_verify", min_length=1, max_length=64, description="key of the term that says what is right"
    )
    correct_from: float = Field(1.0, description="right when that term's value is at least this")
    unit: Literal["tokens", "characters"] = Field("characters", description="`tokens` needs the completions' token_ids")


def count(completion: CompletionText, unit: Literal["tokens", "characters"]) -> int | Score:
    """The length, or the failed Score that says why there is none."""
    if unit == "characters":
        return len(completion.text)
    if completion.token_ids is None:
        return Score.failed(Outcome.error, "unit `tokens` needs the completion's token_ids")
    return len(completion.token_ids)


async def scored_by_length(
    lengths: list[int | Score], params: CorrectnessParams, context: Context, value: Callable[[int, bool], float]
) -> list[Score]:
    """`value(length, is_right)` per completion; the failed Score where one of the two is not known."""
    scores = []
    for length, said in zip(lengths, await context.scores_of(params.correct), strict=True):
        if said.value is None:
            scores.append(Score.failed(said.outcome, f"{params.correct}: {said.detail}"))
        elif isinstance(length, Score):
            scores.append(length)
        else:
            scores.append(Score.of(value(length, said.value >= params.correct_from)))
    return scores
