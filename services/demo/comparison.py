"""The table that compares the demo's arms over seeds: the base models, and what became of them in each arm."""

from collections.abc import Sequence
from statistics import fmean

from rich.console import Group

from services import table as tables
from services.demo.arms import ARMS
from services.demo.evaluation import Evaluation
from services.demo.report import Report

HEADER = ("reward", "seed", "sampled", "change", "greedy", "stepwise", "of those", "certainty")
TITLE = "Held-out problems, percent (of those: right of the stepwise; certainty: nats per token)"
BASE = "base model"


def _row(name: str, seed: str, shown: Sequence[Evaluation], base: Sequence[Evaluation] = ()) -> list[str]:
    """Means over the evaluations; the change is from those of `base`. Accuracy inside the step-by-step way is that of
    the runs in which an answer took it."""
    ways = [one.ways["step_by_step"] for one in shown]
    inside = [way.accuracy for way in ways if way.accuracy is not None]
    sampled = fmean(one.sampled_accuracy for one in shown)
    return [
        name,
        seed,
        f"{100 * sampled:.1f}",
        f"{100 * (sampled - fmean(one.sampled_accuracy for one in base)):+.1f}" if base else "",
        f"{100 * fmean(one.greedy_accuracy for one in shown):.1f}",
        f"{100 * fmean(way.share for way in ways):.1f}",
        f"{100 * fmean(inside):.1f}" if inside else "-",
        f"{fmean(one.self_certainty for one in shown):.2f}",
    ]


def blocks(reports: Sequence[Report]) -> list[list[list[str]]]:
    """The base models by seed, then a block for each arm with its runs; each ends with the mean where there are several
    seeds. Columns as `HEADER`: percent, and nats per token."""
    bases = {one.seed: one.before for one in sorted(reports, key=lambda one: one.seed)}
    made = [[_row(BASE, str(seed), [base]) for seed, base in bases.items()]]
    if len(bases) > 1:
        made[0].append(_row(BASE, "mean", list(bases.values())))
    for arm in ARMS:
        mine = sorted((one for one in reports if one.arm == arm), key=lambda one: one.seed)
        if mine:
            made.append([_row(arm, str(one.seed), [one.after], [one.before]) for one in mine])
        if len(mine) > 1:
            made[-1].append(_row(arm, "mean", [one.after for one in mine], [one.before for one in mine]))
    return made


def table(reports: Sequence[Report]) -> Group:
    """For the terminal."""
    return tables.table(TITLE, HEADER, *blocks(reports))


def markdown(reports: Sequence[Report]) -> str:
    """The same table for a README."""
    lines = [list(HEADER), ["---"] * len(HEADER), *(row for block in blocks(reports) for row in block)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
