"""Curves over the steps: which there are, and few enough points of each that thousands of steps stay quick to draw."""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from services.console.history import Row
from services.console.source import PATIENCE_SECONDS, Desk
from services.redis import insist
from services.steps import StepsError, read_steps

BUCKETS = 400
"""Of a curve's width, two points each: no more can be told apart on a screen."""
TITLES = {
    "reward_mean": ("Reward", "weighted sum of the components"),
    "entropy": ("Entropy", "nats per token"),
    "completion_length": ("Length", "tokens of a completion"),
    "kl": ("KL to the reference", "nats per token"),
    "clip_fraction": ("Clipped", "share of tokens"),
    "staleness_mean": ("Staleness", "versions"),
}
COMPONENT, ACCURACY = "components.", "accuracy."
MOST_RUNS = 6
"""On one chart."""
MOST_FOUND = 200
"""Runs on offer."""


@dataclass(frozen=True)
class Curve:
    """`field` of a step's numbers."""

    field: str
    title: str
    unit: str


def curves(there: Iterable[str]) -> list[Curve]:
    """Of the numbers that are there: reward, accuracies, components (self-certainty first), the others."""
    there = set(there)
    accuracies = [Curve(name, f"Accuracy: {name[len(ACCURACY) :]}", "share correct") for name in there if _is(name, 0)]
    parts = sorted((name for name in there if _is(name, 1)), key=lambda name: ("self_certainty" not in name, name))
    components = [Curve(name, _component(name), "raw value") for name in parts]
    fixed = [Curve(name, *titles) for name, titles in TITLES.items() if name in there]
    first = [one for one in fixed if one.field == "reward_mean"]
    return [*first, *sorted(accuracies, key=lambda one: one.field), *components, *fixed[len(first) :]]


def _is(name: str, which: int) -> bool:
    return name.startswith((ACCURACY, COMPONENT)[which])


def _component(name: str) -> str:
    key = name[len(COMPONENT) :]
    return "Self-certainty" if key == "self_certainty" else f"Component: {key}"


def decimate(
    steps: Sequence[int], values: Sequence[float | None], buckets: int = BUCKETS
) -> tuple[list[int], list[float | None]]:
    """At most two points in each of `buckets` equal parts of the range of steps: the lowest and the highest value, so
    that no peak is lost. A curve of few points stays as it is; steps without a value are left out of a long one."""
    if len(steps) <= 2 * buckets:
        return list(steps), list(values)
    x = np.asarray(steps, np.int64)
    y = np.asarray([np.nan if value is None else value for value in values], np.float64)
    there = ~np.isnan(y)
    x, y = x[there], y[there]
    if len(x) <= 2 * buckets:
        return x.tolist(), y.tolist()
    bucket = ((x - x[0]) * buckets) // (x[-1] - x[0] + 1)
    edges = np.flatnonzero(np.diff(bucket, prepend=-1))
    kept = set[int]()
    for start, end in zip(edges, [*edges[1:], len(x)], strict=True):
        kept |= {int(start + np.argmin(y[start:end])), int(start + np.argmax(y[start:end]))}
    chosen = sorted({0, *kept, len(x) - 1})
    return x[chosen].tolist(), y[chosen].tolist()


def columns(rows: dict[int, Row], wanted: Iterable[Curve]) -> dict[str, Any]:
    """By field: [steps, values], decimated."""
    steps = sorted(rows)
    return {one.field: decimate(steps, [rows[step].get(one.field) for step in steps]) for one in wanted}


async def runs_to_compare(desk: Desk) -> list[str]:
    """Names of other runs: in the same redis, then folders beside this run's. Raises DeadlineExceeded."""

    async def scan() -> list[str]:
        keys = [key.decode(errors="replace") async for key in desk.redis.scan_iter("rlif:{*}:steps", count=1000)]
        found = dict.fromkeys(key.removeprefix("rlif:{").removesuffix("}:steps") for key in keys)
        return [name for name in found if name != desk.run_id][:MOST_FOUND]

    names = await insist(scan, f"run {desk.run_id}: look for others", PATIENCE_SECONDS)
    folders = await asyncio.to_thread(_neighbours, desk.source.run_dir)
    return sorted(names) + [name for name in folders if name not in names]


def _neighbours(run_dir: Path | None) -> dict[str, Path]:
    """The steps of the runs whose folders lie beside `run_dir`, by the folder's name."""
    if run_dir is None or not run_dir.parent.is_dir():
        return {}
    found = [path for path in run_dir.parent.glob("*/steps.jsonl") if path.parent.name != run_dir.name]
    return {path.parent.name: path for path in sorted(found)[:MOST_FOUND]}


async def rows_of(desk: Desk, name: str) -> dict[int, Row]:
    """Of a run on offer; empty where it cannot be read. Raises DeadlineExceeded."""
    path = (await asyncio.to_thread(_neighbours, desk.source.run_dir)).get(name)
    if path is not None:
        try:
            return {row["step"]: row for row in await asyncio.to_thread(read_steps, path)}
        except StepsError:
            return {}
    return dict((await desk.history(name)).rows)


async def answer(desk: Desk, over: Sequence[str]) -> dict[str, Any]:
    """What the charts are drawn from: this run's curves, and the same ones of the runs laid `over` it."""
    mine = await desk.history()
    wanted = curves(mine.fields)
    known = set(await runs_to_compare(desk)) if over else set()
    runs = [{"name": desk.run_id, "curves": await asyncio.to_thread(columns, dict(mine.rows), wanted)}]
    for name in [name for name in over if name in known][: MOST_RUNS - 1]:
        rows = await rows_of(desk, name)
        runs.append({"name": name, "curves": await asyncio.to_thread(columns, rows, wanted)})
    last = max(mine.rows, default=0)
    return {"charts": [vars(one) for one in wanted], "runs": runs, "step": last, "undone": mine.undone}
