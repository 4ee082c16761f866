"""Evaluation beside training: held-out tasks through the run's own servers, judged by a spec of their own.

Its few requests run beside those of training. A repeatable run admits no training groups meanwhile, so that exactly
one version answers; elsewhere the result says which versions did.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any

import orjson
from prometheus_client import Counter, Gauge, Histogram

from services import commands
from services.api import RolloutRequest
from services.clients import CallError, Refused, RewardClient, RolloutClient, ServerFault
from services.commands import Evaluated, EvaluationResult
from services.contract import Group, ScoredGroup, Task, Version, group_id, group_seed
from services.keys import Keys
from services.orchestrator.chunk import Desk, reward_body
from services.orchestrator.data import TaskSource
from services.orchestrator.measures import measure
from services.orchestrator.progress import made_by, newest_of
from services.recipe import Evaluation
from services.redis import insist

log = logging.getLogger(__name__)

METRIC = Gauge("rlif_evaluation_metric", "Numbers of the newest evaluation", ["metric"])
STEP = Gauge("rlif_evaluation_step", "Step whose weights were evaluated last")
BEST = Gauge("rlif_evaluation_best_step", "Step whose weights are the best so far")
SECONDS = Histogram(
    "rlif_evaluation_seconds", "Time of one evaluation", buckets=(1, 5, 10, 30, 60, 120, 300, 600, 1200, 3600)
)
FAILED = Counter("rlif_evaluation_failures_total", "Tasks that could not be answered or judged")
PATIENCE_SECONDS = 300.0


class Evaluator:
    """`results` are those of the surviving history, by step."""

    def __init__(self, desk: Desk, chosen: Evaluation, source: TaskSource):
        self.desk, self.chosen, self.source = desk, chosen, source
        self.keys = Keys(desk.recipe.run.name)
        self.results: dict[int, EvaluationResult] = {}
        self.slots = asyncio.Semaphore(chosen.max_requests_in_flight)

    async def load(self) -> None:
        """What was evaluated before this start."""
        found = await self._insist(lambda: self.desk.watch.redis.hgetall(self.keys.evaluations), "read evaluations")
        results = [EvaluationResult.model_validate_json(body) for body in found.values()]
        self.results = {result.version.version: result for result in sorted(results, key=lambda one: one.version)}

    async def forget(self, newest: Version, floor: int) -> None:
        """A roll-back undid what older lineages than `floor` did after the step at which that one began, as its first
        step tells, else the `newest` version."""
        redis = self.desk.watch.redis
        steps = await self._insist(lambda: redis.xrange(self.keys.steps), "read where a lineage began")
        lines = [orjson.loads(fields[b"line"]) for _, fields in steps if b"line" in fields]
        began = next((line["start"] for line in lines if line["lineage"] >= floor), newest.version)
        undone = {step for step, result in self.results.items() if step > began and result.version.lineage < floor}
        names = [str(self.results[step].version) for step in undone]
        self.results = {step: result for step, result in self.results.items() if step not in undone}
        if names:
            await self._insist(lambda: redis.hdel(self.keys.evaluations, *names), "forget evaluations")

    def due(self) -> Version | None:
        """The version that is to be evaluated now: of the newest step that is a multiple of `every`, or the last."""
        newest = self.desk.watch.version
        if newest is None:
            return None
        is_last = newest.version >= self.desk.recipe.trainer.steps
        step = newest.version if is_last else newest.version - newest.version % self.chosen.every
        return None if step in self.results else Version(lineage=newest.lineage, version=step)

    async def evaluate(self, version: Version) -> EvaluationResult:
        """Answer and judge every task with weights of at least `version`; note and announce the result."""
        started = time.monotonic()
        tasks, size = self.source.tasks, self.chosen.tasks_per_request
        batches = [tasks[start : start + size] for start in range(0, len(tasks), size)]
        scored = [
            group for batch in await asyncio.gather(*(self._batch(b, version) for b in batches)) for group in batch
        ]
        metrics = measure(scored, self.chosen.judge, "self_certainty") if scored else {}
        result = EvaluationResult(
            version=version,
            oldest=min((made_by(group) for group in scored), default=None),
            newest=max((newest_of(group) for group in scored), default=None),
            tasks=len(tasks),
            failed=len(tasks) - len(scored),
            metrics=metrics,
            best=self._is_best(metrics),
            seconds=time.monotonic() - started,
        )
        if self.desk.watch.floor <= version.lineage:  # else a roll-back undid what was evaluated
            await self._note(result)
        return result

    def _is_best(self, metrics: dict[str, float]) -> bool:
        name, sign = self.chosen.best, 1 if self.chosen.best_is == "highest" else -1
        earlier = [one.metrics[name] for one in self.results.values() if name in one.metrics]
        return name in metrics and all(sign * metrics[name] > sign * value for value in earlier)

    async def _batch(self, tasks: Sequence[Task], version: Version) -> list[ScoredGroup]:
        async with self.slots:
            try:
                return await self._score(await self._answer(tasks, version))
            except (Refused, ServerFault) as error:
                if len(tasks) == 1:
                    FAILED.inc()
                    log.warning("evaluation: task %s is left out: %s", tasks[0].task_id, error)
                    return []
            except CallError as error:  # no server could be used for long: training will say so, too
                FAILED.inc(len(tasks))
                log.warning("evaluation: %d tasks are left out: %s", len(tasks), error)
                return []
        return [group for task in tasks for group in await self._batch([task], version)]

    async def _answer(self, tasks: Sequence[Task], version: Version) -> list[Group]:
        recipe = self.desk.recipe
        sampling = self.chosen.sampling or recipe.rollout.sampling
        requests = []
        for task in tasks:
            name = group_id(f"{recipe.run.name}/evaluation", 0, task.task_id)
            requests.append(
                RolloutRequest(
                    group_id=name,
                    messages=task.messages,
                    prompt=task.prompt,
                    n=self.chosen.samples,
                    # The same at every evaluation: versions are compared, not luck.
                    sampling=sampling.model_copy(update={"seed": group_seed(recipe.run.seed, name)}),
                    min_weight_version=version,
                )
            )

        async def ask(client: RolloutClient) -> list[Group]:
            response = await client.rollouts(requests, recipe.rollout.deadline_seconds)
            return [
                group.of(task, request.sampling)
                for task, request, group in zip(tasks, requests, response.groups, strict=True)
            ]

        return await self.desk.servers.rollouts.call(ask)

    async def _score(self, groups: list[Group]) -> list[ScoredGroup]:
        servers, deadline = self.desk.servers, self.desk.recipe.scorer.deadline_seconds

        async def ask(client: RewardClient) -> list[ScoredGroup]:
            bodies = [reward_body(group, self.desk.matches(client)) for group in groups]
            try:
                scores = (await client.rewards(bodies, servers.evaluation_spec, deadline)).groups
            except Refused as error:
                if "spec" not in error.fields:
                    raise
                await servers.install_specs(client)
                scores = (await client.rewards(bodies, servers.evaluation_spec, deadline)).groups
            return [ScoredGroup.join(group, score) for group, score in zip(groups, scores, strict=True)]

        return await servers.rewards.call(ask)

    async def _note(self, result: EvaluationResult) -> None:
        run_id, redis, step = self.keys.run_id, self.desk.watch.redis, result.version.version
        body = result.model_dump_json()
        order = Evaluated(id=f"evaluated-{result.version}", result=result)
        # The order first: once the result is noted, nobody evaluates that step again.
        await self._insist(lambda: commands.send(redis, run_id, order), "tell the trainer of an evaluation")
        await self._insist(lambda: redis.hset(self.keys.evaluations, str(result.version), body), "note an evaluation")
        self.results[step] = result
        STEP.set(step)
        SECONDS.observe(result.seconds)
        METRIC.clear()
        for name, value in result.metrics.items():
            METRIC.labels(name).set(value)
        if result.best:
            BEST.set(step)
        self.desk.watch.extra["evaluation"] = result.model_dump(mode="json")
        shown = ", ".join(f"{name} {value:.4g}" for name, value in result.metrics.items())
        made = (
            "" if result.oldest == result.newest == result.version else f", made by {result.oldest} to {result.newest}"
        )
        best = ", the best so far" if result.best else ""
        log.info("evaluation of weights %s in %.1f s: %s%s%s", result.version, result.seconds, shown, best, made)

    async def _insist(self, call: Any, what: str) -> Any:
        return await insist(call, f"run {self.keys.run_id}: {what}", PATIENCE_SECONDS)
