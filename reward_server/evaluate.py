"""Groups in, scored groups out: every term of a spec runs on every group it is routed to, all at the same time."""

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Any

from prometheus_client import Counter, Histogram

from reward_server.combine import combine_scores
from reward_server.reward import Context, Params
from reward_server.rewards import REWARDS
from reward_server.specs import SpecError, check_spec, is_routed
from reward_server.workers import Turn, WorkerPool
from services.api import RewardGroup
from services.contract import GroupScores, Outcome, Score
from services.http import Problem
from services.spec import RewardSpec, RewardTerm

log = logging.getLogger(__name__)

SCORES = Counter("rlif_reward_scores_total", "Scores by reward and outcome", ["reward", "outcome"])
SECONDS = Histogram(
    "rlif_reward_seconds",
    "Time to score one group with one reward",
    ["reward"],
    buckets=(0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
)
MAX_TEXT = 1_000_000
"""Characters of one completion."""


@dataclass(frozen=True)
class Means:
    """What the rewards work with: verifier processes, and where there is a model, its scorer service and encoder."""

    workers: WorkerPool
    scorer: Any = None
    encoder: Any = None


def check_groups(spec: RewardSpec, groups: list[RewardGroup]) -> None:
    """Raises Problem (422) that names the field: a text too long, or a reference that a routed reward needs."""
    for place, group in enumerate(groups):
        for number, completion in enumerate(group.completions):
            if len(completion.text) > MAX_TEXT:
                detail = f"at most {MAX_TEXT} characters (got {len(completion.text)})"
                raise Problem(422, "A completion is too long", detail, f"groups[{place}].completions[{number}].text")
        answer = group.task.reference.answer if group.task.reference else None
        if answer is not None and answer.strip():
            continue
        for term in spec.rewards:
            if "reference.answer" in REWARDS[term.name].needs and is_routed(term, group.task):
                detail = f"the reward {term.key!r} needs it (task {group.task.task_id!r}, source {group.task.source!r})"
                raise Problem(422, "A reference is missing", detail, f"groups[{place}].task.reference.answer")


async def _term_scores(term: RewardTerm, params: Params, group: RewardGroup, context: Context) -> list[Score]:
    """One term on one group. A reward that breaks yields `error` scores: the other rewards' work is kept."""
    started = time.monotonic()
    if is_routed(term, group.task):
        try:
            scores = await REWARDS[term.name].score(group, params, context)
        except Problem:
            raise
        except Exception as error:
            log.exception("reward %s failed on group %s", term.key, group.group_id)
            scores = [Score.failed(Outcome.error, f"{type(error).__name__}: {error}")] * len(group.completions)
        SECONDS.labels(term.name).observe(time.monotonic() - started)
    else:
        skipped = Score.failed(Outcome.skipped, f"not routed to source {group.task.source!r}")
        scores = [skipped] * len(group.completions)
    for score in scores:
        SCORES.labels(term.name, score.outcome.value).inc()
    return scores


async def score_groups(spec: RewardSpec, groups: list[RewardGroup], means: Means, deadline: float) -> list[GroupScores]:
    """Scores of each group, in order; verdicts still out at `deadline` (time.monotonic()) are `timeout`.

    Raises Problem when the request cannot be scored as a whole (see `check_groups`).
    """
    try:
        params = check_spec(spec, means.scorer is not None)
    except SpecError as error:
        raise Problem(422, "The spec cannot be computed here", str(error), "spec") from error
    check_groups(spec, groups)
    turn = Turn()

    async def one(place: int, group: RewardGroup) -> GroupScores:
        context = Context(means.workers, deadline, turn, f"groups[{place}]", means.scorer, means.encoder)
        columns = await asyncio.gather(*(_term_scores(term, params[term.key], group, context) for term in spec.rewards))
        components = {term.key: scores for term, scores in zip(spec.rewards, columns, strict=True)}
        return GroupScores(
            group_id=group.group_id,
            scores=combine_scores(spec, components, len(group.completions)),
            spec_id=spec.spec_id,
            scorer_weight_version=context.weight_version,
        )

    return list(await asyncio.gather(*(one(place, group) for place, group in enumerate(groups))))
