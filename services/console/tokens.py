"""The completions of a group as they are looked at side by side, their tokens shaded where a scorer was asked."""

from dataclasses import dataclass

from services.api import ScoreItem, ScoreResult
from services.clients import CallError
from services.console.source import Desk
from services.contract import LOWEST_TEMPERATURE, Completion, CompletionScore, ScoredGroup
from services.pages.shading import SHADINGS, Scale, Token, scale, tokens

MOST_TOKENS = 16_384
"""Of the completions that are scored for one page: the scorer is the run's own."""
MOST_TOKENS_SHOWN = 4096
MOST_CHARACTERS = 20_000
"""Of one text on a page."""
SCORE_SECONDS = 30.0


@dataclass(frozen=True)
class Shown:
    """One completion. `tokens` are empty where they are not shaded. `mean_logprob` is the behaviour policy's, at the
    sampling temperature."""

    completion: Completion
    score: CompletionScore
    mean_logprob: float | None
    tokens: list[Token]


@dataclass(frozen=True)
class GroupView:
    """`scales` are empty where no tokens are shaded, and `reason` may say why; `shaded_by` are the weights that did."""

    group: ScoredGroup
    shown: list[Shown]
    scales: list[Scale]
    shaded_by: str = ""
    reason: str = ""


async def view(desk: Desk, group: ScoredGroup, shaded: bool) -> GroupView:
    """With `shaded` the run's reward server is asked for values per token."""
    if not shaded:
        return plain(group)
    if not desk.rewards:
        return plain(group, "No reward server is known here: give its address with --reward.")
    items, room = [], MOST_TOKENS
    for made in group.completions:
        room -= len(group.prompt_token_ids) + len(made.token_ids)
        if room < 0:
            break
        items.append(ScoreItem(prompt_token_ids=group.prompt_token_ids, completion_token_ids=made.token_ids))
    if not items:
        return plain(group, f"The first completion alone has more than {MOST_TOKENS} tokens.")
    temperature = max(group.sampling.temperature, LOWEST_TEMPERATURE)
    try:
        answer = await desk.rewards[0].score(
            items, list(SHADINGS), SCORE_SECONDS, per_token=True, temperature=temperature
        )
    except CallError as error:
        return plain(group, f"The reward server did not score the tokens: {error}")
    scales = [scale(shading, answer.results) for shading in SHADINGS.values()]
    shown, left = [], MOST_TOKENS_SHOWN
    results = [*answer.results, *[None] * (len(group.completions) - len(items))]
    for made, score, result in zip(group.completions, group.scores, results, strict=True):
        found = _tokens(result, scales)[:left] if result is not None else []
        left -= len(found)
        shown.append(_shown(made, score, found))
    return GroupView(group, shown, scales, str(answer.weight_version))


def plain(group: ScoredGroup, reason: str = "") -> GroupView:
    """Without shades."""
    shown = [_shown(made, score, []) for made, score in zip(group.completions, group.scores, strict=True)]
    return GroupView(group, shown, [], reason=reason)


def _tokens(result: ScoreResult, scales: list[Scale]) -> list[Token]:
    pieces = result.tokens or []
    return tokens(result, pieces, frozenset(), scales)


def _shown(made: Completion, score: CompletionScore, found: list[Token]) -> Shown:
    mean = sum(made.logprobs) / len(made.logprobs) if made.logprobs else None
    return Shown(made, score, mean, found)
