"""Evaluations and training runs side by side. Runs of one label are one arm: the same recipe with several seeds, say.

Two evaluations are compared item by item, on the items that both have: a bootstrap interval of the mean difference,
and McNemar's exact test where every value is 0 or 1, else a paired permutation test. Where an arm has several runs, the
runs are what chance varies, and a permutation test compares their means.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev

from pydantic import Field
from rich.console import Group

from services.contract import Wire
from services.demo.report import ReportError
from services.demo.report import read as read_demo
from services.evaluation import report
from services.evaluation.results import Results
from services.evaluation.statistics import mcnemar, permutation, sign_flips
from services.intervals import interval
from services.startup import StartupError
from services.steps import StepsError, read_steps
from services.table import table

LAST = 10
"""Of a training run, each number is the mean over the last tenth of its steps: single steps are noisy."""
SHOWN = ("components.", "accuracy.", "reward_mean", "completion_length", "entropy", "kl")
SEED = re.compile(r"[-_](?:seed[-_]?)?\d+$")


class Run(Wire):
    """`numbers` by metric. An evaluation's metrics are its tasks, of which it also has `items` by their ids."""

    path: str
    numbers: dict[str, float]
    items: dict[str, dict[str, float]] = Field(default_factory=dict)
    asked: str = ""
    """An evaluation's protocol and questions: figures of different ones are not comparable."""


@dataclass
class Arm:
    label: str
    runs: list[Run] = field(default_factory=list)

    def values(self, metric: str) -> list[float]:
        return [run.numbers[metric] for run in self.runs if metric in run.numbers]


class Side(Wire):
    """`deviation`: the standard deviation over runs (ddof 1), none for a single one."""

    label: str
    runs: int
    mean: float
    deviation: float | None


class Difference(Wire):
    """`arm` minus `against`, with a 95 % interval where items are paired, of which there are `items`. `p` is two-sided,
    and none where one run stands against one and nothing is paired."""

    metric: str
    arm: Side
    against: Side
    difference: float
    low: float | None = None
    high: float | None = None
    items: int | None = None
    p: float | None = None
    test: str | None = None


class Comparison(Wire):
    """`notes` are what keeps figures from being comparable."""

    differences: list[Difference]
    notes: list[str]


# ---- reading ---------------------------------------------------------------------------------------------------


def _evaluation(folder: Path) -> Run:
    results, values = report.read(folder)
    items: dict[str, dict[str, float]] = {}
    for value in values:
        items.setdefault(value.task, {})[value.item] = value.value
    numbers = {task.task: task.value.value for task in results.tasks if task.value is not None}
    return Run(path=str(folder), numbers=numbers, items=items, asked=_asked(results))


def _asked(results: Results) -> str:
    protocol = results.protocol.model_dump_json(exclude={"preset"})
    return f"{protocol} {sorted((task.task, task.sha256) for task in results.tasks)}"


def _training(folder: Path) -> Run:
    try:
        steps = read_steps(folder / "steps.jsonl")
    except StepsError as error:
        raise StartupError(str(error)) from error
    last = steps[-max(1, len(steps) // LAST) :]
    names = sorted({name for row in last for name in row if name.startswith(SHOWN)})
    numbers = {}
    for name in names:
        known = [row[name] for row in last if isinstance(row.get(name), int | float)]
        if known:
            numbers[name] = fmean(known)
    return Run(path=str(folder), numbers={**_held_out(folder), **numbers})


def _held_out(folder: Path) -> dict[str, float]:
    """Of the newest evaluation beside training, and of a demo's report."""
    numbers: dict[str, float] = {}
    if (path := folder / "evaluations.jsonl").is_file():
        try:
            newest = json.loads(path.read_text().splitlines()[-1])
            numbers = {f"evaluation.{name}": float(value) for name, value in newest["metrics"].items()}
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise StartupError(f"{path}: its last line is no evaluation: {error}") from error
    if (path := folder / "report.json").is_file():
        try:
            demo = read_demo(path)
        except ReportError as error:
            raise StartupError(str(error)) from error
        for name in ("sampled_accuracy", "greedy_accuracy"):
            before, after = getattr(demo.before, name), getattr(demo.after, name)
            numbers |= {f"held_out.{name}": after, f"held_out.{name}.change": after - before}
    return numbers


def read(folder: Path) -> Run:
    """Raises StartupError: it holds neither a finished evaluation nor a run's steps."""
    if (folder / "results.json").is_file():
        return _evaluation(folder)
    if (folder / "steps.jsonl").is_file():
        return _training(folder)
    raise StartupError(f"{folder}: neither the folder of an evaluation (results.json) nor of a run (steps.jsonl)")


def arms(given: Sequence[str]) -> list[Arm]:
    """From LABEL=FOLDER or FOLDER, whose name without a seed's number at its end is the label."""
    found: dict[str, Arm] = {}
    for text in given:
        label, mark, rest = text.partition("=")
        if not mark or Path(text).exists():
            label, rest = SEED.sub("", Path(text).resolve().name), text
        found.setdefault(label, Arm(label)).runs.append(read(Path(rest)))
    if len(found) < 2:
        raise StartupError(
            f"{' '.join(given)}: there is one arm, {next(iter(found))!r}, and nothing to compare it with; "
            "LABEL=FOLDER gives a run another label"
        )
    return list(found.values())


# ---- comparing -------------------------------------------------------------------------------------------------


def _side(arm: Arm, metric: str) -> Side:
    values = arm.values(metric)
    deviation = stdev(values) if len(values) > 1 else None
    return Side(label=arm.label, runs=len(values), mean=fmean(values), deviation=deviation)


def _paired(metric: str, ours: Arm, theirs: Arm) -> Difference | None:
    """Item by item, where either side is one evaluation."""
    if len(ours.runs) > 1 or len(theirs.runs) > 1:
        return None
    left, right = ours.runs[0].items.get(metric, {}), theirs.runs[0].items.get(metric, {})
    common = [item for item in left if item in right]
    if not common:
        return None
    a, b = [left[item] for item in common], [right[item] for item in common]
    differences = [x - y for x, y in zip(a, b, strict=True)]
    found = interval(differences)
    is_binary = set(a) | set(b) <= {0.0, 1.0}
    return Difference(
        metric=metric,
        arm=Side(label=ours.label, runs=1, mean=fmean(a), deviation=None),
        against=Side(label=theirs.label, runs=1, mean=fmean(b), deviation=None),
        difference=fmean(differences),
        low=found.low if found else None,
        high=found.high if found else None,
        items=len(common),
        p=mcnemar(a, b) if is_binary else sign_flips(differences),
        test="McNemar" if is_binary else "paired permutation",
    )


def _over_runs(metric: str, ours: Arm, theirs: Arm) -> Difference:
    a, b = ours.values(metric), theirs.values(metric)
    several = len(a) + len(b) > 2
    return Difference(
        metric=metric,
        arm=_side(ours, metric),
        against=_side(theirs, metric),
        difference=fmean(a) - fmean(b),
        p=permutation(a, b) if several else None,
        test="permutation over runs" if several else None,
    )


def compare(given: Sequence[Arm]) -> Comparison:
    """Every arm against the first, on each metric that both have."""
    first, *others = given
    notes = []
    if len({run.asked for arm in given for run in arm.runs if run.asked}) > 1:
        notes.append("the evaluations differ in protocol, tasks or questions: their figures are of different things")
    differences = []
    for arm in others:
        metrics = [name for run in first.runs for name in run.numbers]
        for metric in dict.fromkeys(name for name in metrics if arm.values(name)):
            differences.append(_paired(metric, arm, first) or _over_runs(metric, arm, first))
    if not differences:
        raise StartupError(f"{first.label} has no metric in common with {', '.join(arm.label for arm in others)}")
    return Comparison(differences=differences, notes=notes)


# ---- table -----------------------------------------------------------------------------------------------------


def _shown(side: Side, runs: int) -> str:
    """Of `runs`, as many as any metric of the side has; it is told where this one has fewer."""
    spread = "" if side.deviation is None else f" ± {side.deviation:.3g}"
    return f"{side.mean:.4g}{spread}" + (f" ({side.runs})" if side.runs < runs else "")


def tables(comparison: Comparison) -> list[Group]:
    """One of each arm against the first."""
    by_arm: dict[tuple[str, str], list[Difference]] = {}
    for one in comparison.differences:
        by_arm.setdefault((one.arm.label, one.against.label), []).append(one)
    return [_table(arm, against, rows) for (arm, against), rows in by_arm.items()]


def _table(arm: str, against: str, differences: Sequence[Difference]) -> Group:
    ours, theirs = max(one.arm.runs for one in differences), max(one.against.runs for one in differences)
    runs = f" (runs: {ours} and {theirs})" if max(ours, theirs) > 1 else ""
    rows = []
    for one in differences:
        p = "-" if one.p is None else f"{one.p:.2g}"
        spread = "" if one.low is None or one.high is None else f" [{one.low:+.3g}, {one.high:+.3g}]"
        rows.append(
            [one.metric, _shown(one.arm, ours), _shown(one.against, theirs), f"{one.difference:+.3g}{spread}", p]
        )
    tests = [f"{one.test}, {one.items} items ({one.metric})" if one.items else one.test for one in differences]
    said = "; ".join(dict.fromkeys(test for test in tests if test))
    title = f"{arm} minus {against}{runs}" + (
        f"; p is two-sided, not corrected for many tests, by {said}" if said else ""
    )
    return table(title, ["metric", "mean", "against", "difference", "p"], rows)
