"""What a step leaves behind: a line in `steps.jsonl` (the audit trail), Prometheus, the trackers. Rank 0 only."""

import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from prometheus_client import Counter, Gauge, Histogram

from services import tracking
from services.commands import EvaluationResult
from services.contract import Outcome, ScoredGroup
from services.recipe import Recipe
from trainer import diversity
from trainer.step import StepResult

log = logging.getLogger(__name__)

STEP = Gauge("rlif_trainer_step", "Optimizer steps done")
PLANNED = Gauge("rlif_trainer_planned_steps", "Optimizer steps the run is to make")
STEP_AT = Gauge(
    "rlif_trainer_last_step_timestamp_seconds", "Unix time at which the last step was done, or the trainer started"
)
STEP_AT.set_to_current_time()
LINEAGE = Gauge("rlif_trainer_lineage", "Lineage of the weights being trained")


def _unknown(name: str, documentation: str) -> Gauge:
    """NaN until there is a step: a 0 would be a number."""
    gauge = Gauge(name, documentation)
    gauge.set(math.nan)
    return gauge


LAST = {
    "loss": _unknown("rlif_trainer_loss", "Loss, mean over the last step's updates"),
    "kl": _unknown("rlif_trainer_kl_nats", "KL from the reference policy (k3), mean over the last step's tokens"),
    "entropy": _unknown("rlif_trainer_entropy_nats", "Entropy of the policy, mean over the last step's tokens"),
    "clip_fraction": _unknown("rlif_trainer_clipped_ratio", "Share of the last step's tokens that the clip held"),
    "clip_cov_fraction": _unknown(
        "rlif_trainer_clip_cov_ratio", "Share of the last step's tokens that clip-cov kept the policy gradient off"
    ),
    "ratio_mean": _unknown("rlif_trainer_policy_ratio_mean", "Policy over rollout probability, mean over tokens"),
    "ratio_max": _unknown("rlif_trainer_policy_ratio_max", "Policy over rollout probability, largest of any token"),
    "importance_mean": _unknown(
        "rlif_trainer_importance_mean", "Importance weight after truncation or mask, mean over tokens"
    ),
    "importance_truncated": _unknown(
        "rlif_trainer_importance_truncated_ratio", "Share of tokens whose importance weight was truncated or masked"
    ),
    "logprob_gap_mean": _unknown(
        "rlif_trainer_logprob_gap_nats", "Trainer's against rollout's logprob of a token, mean absolute difference"
    ),
    "logprob_gap_max": _unknown(
        "rlif_trainer_logprob_gap_max_nats", "Trainer's against rollout's logprob of a token, largest difference"
    ),
    "rollout_kl": _unknown(
        "rlif_trainer_rollout_kl_nats", "KL of the trainer's policy from the rollout's (k3), mean over tokens"
    ),
    "grad_norm": _unknown(
        "rlif_trainer_gradient_norm", "Norm of the gradient before clipping, mean over the last step's updates"
    ),
    "updates": _unknown("rlif_trainer_updates", "Optimizer updates of the last step: epochs x minibatches"),
    "lr": _unknown("rlif_trainer_learning_rate", "Learning rate of the last step"),
    "micro_batches": _unknown("rlif_trainer_micro_batches", "Micro-batches of the last step on one rank"),
    "forwarded": _unknown(
        "rlif_trainer_forwarded_ratio",
        "Tokens the last step computed, as a share of its sequences' tokens: shared prompts count once",
    ),
    "reward_mean": _unknown("rlif_trainer_reward", "Weighted sum of components, mean over valid completions"),
    "advantage_abs_mean": _unknown("rlif_trainer_advantage_magnitude", "Absolute advantage, mean of valid completions"),
    "valid_fraction": _unknown("rlif_trainer_valid_ratio", "Share of completions that have a usable reward"),
    "distinct_2": _unknown(
        "rlif_trainer_distinct_bigrams_ratio", "Distinct bigrams of a group's completions over all of them, mean"
    ),
    "answer_diversity": _unknown(
        "rlif_trainer_distinct_answers_ratio", "Distinct final answers of a group over its completions, mean"
    ),
    "stop_share": _unknown("rlif_trainer_stopped_ratio", "Share of completions that ended by themselves"),
    "completion_length": _unknown("rlif_trainer_completion_length_tokens", "Mean length of a completion"),
    "staleness_mean": _unknown(
        "rlif_trainer_staleness_versions",
        "Versions from the policy that made a completion to the one trained, mean",
    ),
    "staleness_max": _unknown("rlif_trainer_staleness_max_versions", "The same, largest of any completion"),
}
"""By the name in `steps.jsonl`; NaN where the last step has no such number."""
COMPONENTS = Gauge(
    "rlif_trainer_component", "Raw value of a component of the reward, mean over the last step's groups", ["component"]
)
ACCURACY = Gauge(
    "rlif_trainer_accuracy_ratio",
    "Share of `correct` among the completions that a component judged correct, wrong or without an answer",
    ["component"],
)
PHASES = Histogram(
    "rlif_trainer_phase_seconds",
    "Time of a step's phase: wait (for groups), pack, compute, optimizer, publish, checkpoint",
    ["phase"],
    buckets=(0.01, 0.1, 0.5, 1, 5, 10, 30, 60, 120, 300, 600, 1800),
)
TOKENS = Counter("rlif_trainer_tokens_total", "Prompt and completion tokens trained on")
COMPLETIONS = Counter("rlif_trainer_completions_total", "Completions trained on")
GROUPS = Counter("rlif_trainer_groups_total", "Scored groups trained on")
TRACKING = Counter("rlif_trainer_tracking_failures_total", "What a tracker did not take", ["service"])

JUDGED = frozenset({Outcome.correct, Outcome.wrong, Outcome.no_answer})


def of_groups(groups: Sequence[ScoredGroup], step: int) -> dict[str, float | None]:
    """Numbers of the groups that optimizer step `step` (the first is 1) was made from.

    Rewards and components are means over those that have a value, none where none has; accuracies are shares of
    `correct` among those that were judged. Staleness is in versions, between the weights that made a completion and
    those it trains. Lengths are in tokens, over all completions.
    """
    completions = [completion for group in groups for completion in group.completions]
    scores = [score for group in groups for score in group.scores]
    components: dict[str, list[float]] = {}
    judged: dict[str, list[bool]] = {}
    for score in scores:
        for name, component in score.components.items():
            if component.value is not None:
                components.setdefault(name, []).append(component.value)
            if component.outcome in JUDGED:
                judged.setdefault(name, []).append(component.outcome == Outcome.correct)
    distinct = [diversity.distinct(group.completions) for group in groups]
    staleness = [step - 1 - completion.weight_version.version for completion in completions]
    return {
        "reward_mean": _mean([score.reward for score in scores if score.reward is not None]),
        "advantage_abs_mean": _mean([abs(score.advantage) for score in scores if score.valid]),
        "valid_fraction": _mean([score.valid for score in scores]),
        "stop_share": _mean([completion.finish_reason == "stop" for completion in completions]),
        "completion_length": _mean([len(completion.token_ids) for completion in completions]),
        "distinct_2": _mean([share for share in distinct if share is not None]),
        "answer_diversity": _mean([diversity.answers(group.completions) for group in groups]),
        "staleness_mean": _mean(staleness),
        "staleness_max": max(staleness, default=None),
        **{f"components.{name}": _mean(values) for name, values in sorted(components.items())},
        **{f"accuracy.{name}": _mean(correct) for name, correct in sorted(judged.items())},
    }


def record(
    lineage: int, start: int, step: int, groups: Sequence[ScoredGroup], result: StepResult, seconds: dict[str, float]
) -> dict[str, Any]:
    """One line of `steps.jsonl`. `step` is the version the step made; `start` is the step its lineage went on from, so
    that lines of earlier lineages with a higher step are known to be lost."""
    phases = {**seconds, **result.seconds}
    total = sum(phases.values())
    numbers = {key: value for key, value in asdict(result).items() if key != "seconds"}
    return {
        "lineage": lineage,
        "start": start,
        "step": step,
        "group_ids": [group.group_id for group in groups],
        **numbers,
        **of_groups(groups, step),
        "tokens_per_second": result.tokens / max(total, 1e-9),
        "seconds": {**phases, "total": total},
    }


class StepLog:
    """Appends records. A line is on disk when `write` returns: it must be there before a checkpoint that holds its
    step. A tracker that fails costs its numbers, never the run.
    """

    def __init__(self, recipe: Recipe, start: int):
        """Raises StartupError when a tracker cannot be started."""
        path = recipe.run.dir / "steps.jsonl"
        _drop_torn_line(path)
        self.evaluations = recipe.run.dir / "evaluations.jsonl"
        self.trackers = tracking.start(recipe, start)
        self.every = recipe.tracking.samples_every
        self.file = path.open("ab")
        self._shown: dict[Gauge, set[str]] = {}
        PLANNED.set(recipe.trainer.steps)
        STEP.set(start)

    def write(self, line: dict[str, Any]) -> None:
        """Raises ValueError for NaN and infinity."""
        self.file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())
        self._export(line)
        numbers = {key: value for key, value in line.items() if isinstance(value, int | float)}
        numbers |= {f"seconds.{phase}": value for phase, value in line["seconds"].items()}
        self.track(line["step"], numbers)

    def track(self, step: int, numbers: Mapping[str, float]) -> None:
        """To the trackers alone."""
        for tracker in self.trackers:
            _try(tracker, partial(tracker.log, step, numbers))

    def evaluated(self, result: EvaluationResult) -> None:
        """A line of `evaluations.jsonl`, and what the trackers are told. A restored trainer is told of some again."""
        line = result.model_dump_json()
        _drop_torn_line(self.evaluations)
        if not self.evaluations.exists() or line not in self.evaluations.read_text().splitlines():
            with self.evaluations.open("a") as file:
                file.write(line + "\n")
        self.track(result.version.version, {f"evaluation.{name}": value for name, value in result.metrics.items()})

    def samples(self, step: int, groups: Sequence[ScoredGroup]) -> None:
        """What the step was trained on, completion by completion, where the recipe asks for this step's."""
        if self.every and step % self.every == 0:
            rows = sample_rows(groups)
            for tracker in self.trackers:
                _try(tracker, partial(tracker.samples, step, rows))

    def _export(self, line: dict[str, Any]) -> None:
        STEP.set(line["step"])
        STEP_AT.set_to_current_time()
        LINEAGE.set(line["lineage"])
        for name, gauge in LAST.items():
            value = line.get(name)
            gauge.set(math.nan if value is None else value)
        self._export_labelled(COMPONENTS, "components.", line)
        self._export_labelled(ACCURACY, "accuracy.", line)
        for phase, seconds in line["seconds"].items():
            if phase != "total":
                PHASES.labels(phase).observe(seconds)
        TOKENS.inc(line["tokens"])
        COMPLETIONS.inc(line["completions"])
        GROUPS.inc(len(line["group_ids"]))

    def _export_labelled(self, gauge: Gauge, prefix: str, line: dict[str, Any]) -> None:
        """The spec may change in mid-run: a component that is gone must not keep its last value."""
        values = {name.removeprefix(prefix): value for name, value in line.items() if name.startswith(prefix)}
        for gone in self._shown.get(gauge, set()) - values.keys():
            gauge.remove(gone)
        for component, value in values.items():
            gauge.labels(component).set(value)
        self._shown[gauge] = set(values)

    def close(self) -> None:
        self.file.close()
        for tracker in self.trackers:
            _try(tracker, tracker.close)


def sample_rows(groups: Sequence[ScoredGroup]) -> list[dict[str, Any]]:
    """A row for each completion; of a component its raw value and outcome, none and empty where a group has no such."""
    names = sorted({name for group in groups for score in group.scores for name in score.components})
    rows = []
    for group in groups:
        prompt = group.task.prompt or "\n".join(f"{turn.role}: {turn.content}" for turn in group.task.messages or [])
        for completion, score in zip(group.completions, group.scores, strict=True):
            row = {
                "group_id": group.group_id,
                "task_id": group.task.task_id,
                "prompt": prompt,
                "completion": completion.text,
                "finish_reason": completion.finish_reason,
                "version": str(completion.weight_version),
                "reward": score.reward,
                "advantage": score.advantage,
                "valid": score.valid,
            }
            for name in names:
                component = score.components.get(name)
                row[f"value.{name}"] = component.value if component else None
                row[f"outcome.{name}"] = str(component.outcome) if component else ""
            rows.append(row)
    return rows


def _try(tracker: tracking.Tracker, call: Callable[[], None]) -> None:
    """Whatever a tracker's library raises: the run's own files have the numbers."""
    try:
        call()
    except Exception as error:
        TRACKING.labels(tracker.name).inc()
        log.warning(
            "tracking: %s did not take it: %s", tracker.name, str(error).splitlines()[0] if str(error) else error
        )


def _drop_torn_line(path: Path) -> None:
    """What a killed trainer left half-written goes, so that the next line stands on its own."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        file.truncate(file.read().rfind(b"\n") + 1)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
