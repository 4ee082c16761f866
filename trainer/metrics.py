"""What a step leaves behind: a line in `steps.jsonl` (the audit trail), TensorBoard, Prometheus. Rank 0 only."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prometheus_client import Counter, Gauge, start_http_server

from services.contract import ScoredGroup
from services.recipe import RecipeError, Tracking
from trainer.step import StepResult

STEP = Gauge("rlif_trainer_step", "Optimizer steps done")
LINEAGE = Gauge("rlif_trainer_lineage", "Lineage of the weights being trained")
VALUES = Gauge(
    "rlif_trainer_value", "Numbers of the last step: loss, kl, entropy, grad_norm, reward_mean, ...", ["name"]
)
SECONDS = Gauge("rlif_trainer_seconds", "Seconds of the last step by phase", ["phase"])
TOKENS = Counter("rlif_trainer_tokens", "Prompt and completion tokens trained on")
GROUPS = Counter("rlif_trainer_groups", "Scored groups trained on")


def of_groups(groups: Sequence[ScoredGroup], step: int) -> dict[str, float | None]:
    """Numbers of the groups that optimizer step `step` (the first is 1) was made from.

    Rewards and components are means over those that have a value, none where none has. Staleness is in versions,
    between the weights that made a completion and those it trains. Lengths are in tokens, over all completions.
    """
    completions = [completion for group in groups for completion in group.completions]
    scores = [score for group in groups for score in group.scores]
    components: dict[str, list[float]] = {}
    for score in scores:
        for name, component in score.components.items():
            components.setdefault(name, []).extend([] if component.value is None else [component.value])
    staleness = [step - 1 - completion.weight_version.version for completion in completions]
    return {
        "reward_mean": _mean([score.reward for score in scores if score.reward is not None]),
        "advantage_abs_mean": _mean([abs(score.advantage) for score in scores if score.valid]),
        "valid_fraction": _mean([score.valid for score in scores]),
        "stop_share": _mean([completion.finish_reason == "stop" for completion in completions]),
        "completion_length": _mean([len(completion.token_ids) for completion in completions]),
        "staleness_mean": _mean(staleness),
        "staleness_max": max(staleness, default=None),
        **{f"components.{name}": _mean(values) for name, values in sorted(components.items()) if values},
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
    step.

    Raises RecipeError when `tracking.metrics_port` is taken.
    """

    def __init__(self, run_dir: Path, tracking: Tracking, start: int):
        path = run_dir / "steps.jsonl"
        _drop_torn_line(path)
        self.file = path.open("ab")
        self.board = None
        if tracking.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start + 1)
        if tracking.metrics_port is not None:
            try:
                start_http_server(tracking.metrics_port)
            except OSError as error:
                raise RecipeError(f"tracking.metrics_port: {tracking.metrics_port}: {error.strerror}") from error

    def write(self, line: dict[str, Any]) -> None:
        """Raises ValueError for NaN and infinity."""
        self.file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())
        numbers = {key: value for key, value in line.items() if isinstance(value, int | float)}
        STEP.set(line["step"])
        LINEAGE.set(line["lineage"])
        for name, value in numbers.items():
            VALUES.labels(name).set(value)
        for phase, value in line["seconds"].items():
            SECONDS.labels(phase).set(value)
        TOKENS.inc(line["tokens"])
        GROUPS.inc(len(line["group_ids"]))
        if self.board is not None:
            for name, value in numbers.items():
                self.board.add_scalar(name.replace(".", "/"), value, line["step"])
            for phase, value in line["seconds"].items():
                self.board.add_scalar(f"seconds/{phase}", value, line["step"])
            self.board.flush()

    def close(self) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()


def _drop_torn_line(path: Path) -> None:
    """What a killed trainer left half-written goes, so that the next line stands on its own."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        file.truncate(file.read().rfind(b"\n") + 1)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
