"""Groups in, scored groups out: every term of a spec runs on every group it is routed to, all at the same time."""

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Any

from prometheus_client import Counter, Histogram, Summary

from reward_server.calls import Calls
from reward_server.combine import combine_scores, unanimous
from reward_server.reward import Context, Params
from reward_server.rewards import REWARDS
from reward_server.specs import SpecError, check_spec, is_routed
from reward_server.token_scores import TokenScores
from reward_server.workers import Turn, WorkerPool
from services import trail
from services.api import RewardGroup
from services.contract import GroupScores, Outcome, Score, Task
from services.problem import Problem
from services.spec import RewardSpec, RewardTerm

log = logging.getLogger(__name__)

SCORES = Counter("rlif_reward_scores_total", "Scores by reward and outcome", ["reward", "outcome"])
SECONDS = Histogram(
    "rlif_reward_seconds",
    "Time to score one group with one reward",
    ["reward"],
    buckets=(0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
)
VALUES = Summary("rlif_reward_value", "Raw (unweighted) values that a reward gave", ["reward"])
SKIPPED = Counter("rlif_reward_skipped_groups_total", "Groups that a spec left out of training as unanimous")
MAX_TEXT = 1_000_000
"""Characters of one completion."""


@dataclass(frozen=True)
class Means:
    """What the rewards work with: verifier processes and, where the server has them, a scorer service with its encoder,
    a sandbox, and a client for calls to other servers."""

    workers: WorkerPool
    scorer: Any = None
    encoder: Any = None
    sandbox: Any = None
    http: Calls | None = None

    @property
    def have(self) -> frozenset[str]:
        """The parts that rewards may need (`reward_server.reward.UNAVAILABLE`)."""
        parts = {
            "scorer": self.scorer is not None,
            "reference_model": self.scorer is not None and self.scorer.has_reference,
            "sandbox": self.sandbox is not None,
        }
        return frozenset(part for part, is_there in parts.items() if is_there)


def lacking(spec: RewardSpec, task: Task) -> tuple[RewardTerm, str] | None:
    """The first reward that needs a reference which the task does not have, and which one; none: it has all."""
    reference = task.reference
    absent = {
        "reference.answer": reference is None or not (reference.answer or "").strip(),
        "reference.tests": reference is None or not reference.tests,
    }
    for term in spec.rewards:
        for need in REWARDS[term.name].needs:
            if absent.get(need) and is_routed(term, task.source):
                return term, need
    return None


def check_groups(spec: RewardSpec, groups: list[RewardGroup]) -> None:
    """Raises Problem (422) that names the field: a text too long, a reference that a routed reward needs, or the
    version that a schedule goes by."""
    for place, group in enumerate(groups):
        for number, completion in enumerate(group.completions):
            if len(completion.text) > MAX_TEXT:
                detail = f"at most {MAX_TEXT} characters (got {len(completion.text)})"
                raise Problem(422, "A completion is too long", detail, f"groups[{place}].completions[{number}].text")
        if spec.is_scheduled and group.weight_version is None:
            detail = (
                "the spec's schedule goes by the version of the policy that made the completions: give the group "
                '`"weight_version": {"version": N}`, N its optimizer steps'
            )
            raise Problem(422, "A weight version is missing", detail, f"groups[{place}].weight_version")
        found = lacking(spec, group.task)
        if found is not None:
            term, need = found
            task = f"task {group.task.task_id!r}, source {group.task.source!r}"
            detail = f"the reward {term.key!r} needs it ({task})"
            raise Problem(422, "A reference is missing", detail, f"groups[{place}].task.{need}")


async def _term_scores(term: RewardTerm, params: Params, group: RewardGroup, context: Context) -> list[Score]:
    """One term on one group. A reward that breaks yields `error` scores: the other rewards' work is kept."""
    started = time.monotonic()
    if is_routed(term, group.task.source):
        try:
            scores = await REWARDS[term.name].score(group, params, context)
        except Problem:
            raise
        except Exception as error:
            ids = {"group_id": group.group_id}
            log.exception("reward %s failed on group %s", term.key, group.group_id, extra=ids)
            scores = [Score.failed(Outcome.error, f"{type(error).__name__}: {error}")] * len(group.completions)
        SECONDS.labels(term.name).observe(time.monotonic() - started)
    else:
        skipped = Score.failed(Outcome.skipped, f"not routed to source {group.task.source!r}")
        scores = [skipped] * len(group.completions)
    for score in scores:
        SCORES.labels(term.name, score.outcome.value).inc()
        if score.value is not None:
            VALUES.labels(term.name).observe(score.value)
    return scores


async def _components(
    spec: RewardSpec, params: dict[str, Params], group: RewardGroup, context: Context
) -> dict[str, list[Score]]:
    """The scores by term key. Terms run at the same time; those that read the scorer share its pass."""
    scorings = [
        scoring(params[term.key])
        for term in spec.rewards
        if (scoring := REWARDS[term.name].scoring) is not None and is_routed(term, group.task.source)
    ]
    tasks: dict[str, asyncio.Future[list[Score]]] = {}
    context.others = tasks
    context.token_scores = TokenScores(group, scorings, context)
    for term in spec.rewards:
        tasks[term.key] = asyncio.create_task(_term_scores(term, params[term.key], group, context))
    try:
        await asyncio.gather(*tasks.values())
        return {key: task.result() for key, task in tasks.items()}
    finally:
        for task in [*tasks.values(), *context.shared.values()]:
            task.cancel()
        context.token_scores.close()


async def score_groups(spec: RewardSpec, groups: list[RewardGroup], means: Means, deadline: float) -> list[GroupScores]:
    """Scores of each group, in order; verdicts still out at `deadline` (time.monotonic()) are `timeout`.

    Raises Problem when the request cannot be scored as a whole (see `check_groups`).
    """
    try:
        params = check_spec(spec, means.have)
    except SpecError as error:
        raise Problem(422, "The spec cannot be computed here", str(error), "spec") from error
    check_groups(spec, groups)
    turn = Turn()

    async def one(place: int, group: RewardGroup) -> GroupScores:
        context = Context(
            means.workers, deadline, turn, f"groups[{place}]", means.scorer, means.encoder, means.sandbox, means.http
        )
        components = await _components(spec, params, group, context)
        version = group.weight_version.version if group.weight_version else 0
        reason = unanimous(spec, {key: [score.value for score in scores] for key, scores in components.items()})
        if reason:
            SKIPPED.inc()
        ids = {"spec_id": spec.spec_id, "scorer_weight_version": context.weight_version}
        trail.note("is scored", group.group_id, weight_version=group.weight_version, **ids)
        return GroupScores(
            group_id=group.group_id,
            scores=combine_scores(spec, components, len(group.completions), version),
            spec_id=spec.spec_id,
            skipped=reason,
            scorer_weight_version=context.weight_version,
        )

    return list(await asyncio.gather(*(one(place, group) for place, group in enumerate(groups))))
