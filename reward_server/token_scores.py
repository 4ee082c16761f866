"""The scoring pass that all rewards of one group share: every metric any of them reads, in one call to the scorer."""

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from reward_server.scorer.items import ItemScores, TokenItem
from reward_server.scorer.metrics import TOP_K, Preset
from services import traces
from services.api import RewardGroup
from services.contract import Outcome, Score
from services.problem import Problem

if TYPE_CHECKING:
    from reward_server.reward import Context


@dataclass(frozen=True)
class Scoring:
    """What a reward reads off the pass: metrics of `POST /v1/score` by name, at a temperature, by a definition.

    `top_k` is for `topk_confidence`.
    """

    metrics: tuple[str, ...]
    temperature: float = 1.0
    preset: Preset = "paper"
    top_k: int = TOP_K

    @property
    def way(self) -> tuple[float, Preset, int]:
        """Rewards that agree on it are answered from one item; the scorer makes one pass for equal ones that differ."""
        return self.temperature, self.preset, self.top_k


@dataclass
class TokenScores:
    """One group's pass, made when the first reward asks; `scorings` are all that any reward will ask."""

    group: RewardGroup
    scorings: list[Scoring]
    context: "Context"
    _pass: asyncio.Task[dict[tuple[int, Any], ItemScores | Score]] | None = field(default=None, init=False)

    async def read(self, scoring: Scoring) -> list[ItemScores | Score]:
        """Per completion its scores by metric, or the failed Score that says why there are none.

        Raises Problem (504): the scorer did not answer in time, which says nothing of the completions.
        """
        if self._pass is None:
            self._pass = asyncio.create_task(self._score())
        found = await asyncio.shield(self._pass)
        return [found[place, scoring.way] for place in range(len(self.group.completions))]

    def close(self) -> None:
        """The scores are not wanted any more."""
        if self._pass is not None:
            self._pass.cancel()

    async def _score(self) -> dict[tuple[int, Any], ItemScores | Score]:
        from reward_server.scorer.service import ScoringFailed

        context, started = self.context, time.monotonic()
        asked = await asyncio.to_thread(self._items)
        found: dict[tuple[int, Any], Any] = {}
        for key, item in asked.items():
            if isinstance(item, str):
                found[key] = Score.failed(Outcome.error, item)
        sound = {key: item for key, item in asked.items() if key not in found}
        if not sound:
            return found
        remaining = max(0.0, context.deadline - time.monotonic())
        try:
            with traces.span("score tokens", group_id=self.group.group_id, items=len(sound)):
                scored = await context.scorer.score(list(sound.values()), self.group.min_weight_version, remaining)
        except TimeoutError as error:
            raise Problem(504, "The scorer did not answer in time", str(error)) from error
        except ScoringFailed as error:
            failed = Score.failed(Outcome.error, str(error), time.monotonic() - started)
            return {**found, **dict.fromkeys(sound, failed)}
        context.scored_by(scored.version)
        seconds = time.monotonic() - started
        for key, result in zip(sound, scored.results, strict=True):
            empty = Score.failed(Outcome.skipped, "the completion has no tokens", seconds)
            found[key] = result if result.n_tokens else empty
        return found

    def _items(self) -> dict[tuple[int, Any], Any]:
        """What to score, by completion and way; or why it cannot be (a string)."""
        task, encoder = self.group.task, self.context.encoder
        prompt = encoder.prompt(f"{self.context.field}.task", task.messages, task.prompt, self.group.prompt_token_ids)
        ways: dict[Any, list[str]] = {}
        for scoring in self.scorings:
            names = ways.setdefault(scoring.way, [])
            names += [name for name in scoring.metrics if name not in names]
        items: dict[tuple[int, Any], Any] = {}
        for place, completion in enumerate(self.group.completions):
            for way, metrics in ways.items():
                temperature, preset, top_k = way
                try:
                    token_ids = encoder.completion(completion.text, completion.token_ids)
                    item = TokenItem(prompt, token_ids, tuple(metrics), temperature, preset, top_k)
                    self.context.scorer.scorer.check(item)
                    items[place, way] = item
                except ValueError as error:
                    items[place, way] = str(error)
        return items
