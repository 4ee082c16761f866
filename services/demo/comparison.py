"""The table that compares the demo's arms over seeds."""

from collections.abc import Sequence
from statistics import fmean

from rich.table import Table

from services.demo.arms import ARMS
from services.demo.report import Report

HEADER = (
    "reward",
    "seed",
    "sampled accuracy",
    "change",
    "greedy accuracy",
    "answers step by step",
    "accuracy of those",
    "self-certainty",
    "length",
)


def _percent(before: Sequence[float], after: Sequence[float]) -> str:
    return f"{100 * fmean(before):.1f} -> {100 * fmean(after):.1f} %"


def _number(before: Sequence[float], after: Sequence[float], digits: int) -> str:
    return f"{fmean(before):.{digits}f} -> {fmean(after):.{digits}f}"


def _row(name: str, seed: str, reports: Sequence[Report]) -> list[str]:
    """Means over the reports. Accuracy inside a way of answering is left out where no answer took that way."""
    before, after = [one.before for one in reports], [one.after for one in reports]
    steps_before, steps_after = ([one.ways["step_by_step"] for one in side] for side in (before, after))
    inside_before, inside_after = (
        [one.accuracy for one in side if one.accuracy is not None] for side in (steps_before, steps_after)
    )
    sampled_before, sampled_after = ([one.sampled_accuracy for one in side] for side in (before, after))
    return [
        name,
        seed,
        _percent(sampled_before, sampled_after),
        f"{100 * (fmean(sampled_after) - fmean(sampled_before)):+.1f}",
        _percent([one.greedy_accuracy for one in before], [one.greedy_accuracy for one in after]),
        _percent([one.share for one in steps_before], [one.share for one in steps_after]),
        _percent(inside_before, inside_after) if inside_before and inside_after else "-",
        _number([one.self_certainty for one in before], [one.self_certainty for one in after], 2),
        _number([one.length for one in before], [one.length for one in after], 1),
    ]


def rows(reports: Sequence[Report]) -> list[list[str]]:
    """One row for each run, arm by arm, and the mean of each arm that ran with several seeds; columns as `HEADER`."""
    found = []
    for arm in ARMS:
        mine = sorted((one for one in reports if one.arm == arm), key=lambda one: one.seed)
        found += [_row(arm, str(one.seed), [one]) for one in mine]
        if len(mine) > 1:
            found.append(_row(arm, "mean", mine))
    return found


def table(reports: Sequence[Report]) -> Table:
    """For the terminal."""
    shown = Table(title="Base model -> trained model, on held-out problems", title_justify="left")
    for column in HEADER:
        shown.add_column(column, justify="left" if column == "reward" else "right")
    for row in rows(reports):
        is_mean = row[1] == "mean"
        shown.add_row(*row, style="bold" if is_mean else None, end_section=is_mean)
    return shown


def markdown(reports: Sequence[Report]) -> str:
    """The same table for a README."""
    lines = [HEADER, ["---"] * len(HEADER), *rows(reports)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
