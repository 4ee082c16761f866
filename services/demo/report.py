"""What a run of the demo did: a table, a plot, a JSON file, and one line in words made of measured numbers only.

What the demo can show is a choice: the model comes to prefer the way of answering it is surer of. So the line tells how
accuracy changed, how the choice between the ways changed, and, apart from both, what became of accuracy inside the
step-by-step way; it never says that arithmetic was learned.
"""

import math
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from rich.table import Table

from services.demo.arms import Arm
from services.demo.evaluation import Evaluation
from services.intervals import Interval
from services.preflight.verdict import direction
from services.steps import read_steps

GIVEN = {
    "self_certainty": "With self-certainty as the only reward and no answers given,",
    "verifiable": "Rewarded for right answers,",
    "both": "Rewarded for self-certainty and for right answers,",
    "random": "With a random reward (the control),",
    "format": "Rewarded for the form of an answer, right or wrong (a control),",
    "plurality": "Rewarded for the answer that most of a group give, with no answers given,",
    "intuitor_then_grpo": "Rewarded for self-certainty in the first half and for right answers in the second,",
}
CURVES = (
    ("components.exact_match", "accuracy on training prompts", "%"),
    ("components.self_certainty", "self-certainty", "nats per token"),
    ("completion_length", "length", "tokens"),
    ("entropy", "entropy", "nats per token"),
    ("kl", "KL to the base model", "nats per token"),
)
"""Field of steps.jsonl, title, unit."""


class ReportError(ValueError):
    """The run's files do not hold what a report needs; the message names file and line."""


class Report(BaseModel):
    """`line` and `preflight` are sentences; `seconds` is the wall time of training (none when unknown)."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    arm: Arm
    seed: int
    steps: int
    seconds: float | None = None
    line: str
    preflight: str
    before: Evaluation
    after: Evaluation


# ---- words -----------------------------------------------------------------------------------------------------


def _percent(share: float | None) -> str:
    return "none" if share is None else f"{100 * share:.1f} %"


def _direction(change: float, error: float) -> int:
    """1, 0 or -1: up, within noise (two standard errors of the difference), down."""
    return 0 if abs(change) <= 2 * error else 1 if change > 0 else -1


def _binomial_error(share: float, count: float) -> float:
    return math.sqrt(share * (1 - share) / max(1.0, count))


def _accuracy_clause(before: Evaluation, after: Evaluation) -> str:
    change = after.sampled_accuracy - before.sampled_accuracy
    error = math.hypot(before.sampled_error, after.sampled_error)
    figures = f"{_percent(before.sampled_accuracy)} to {_percent(after.sampled_accuracy)}"
    greedy = f"greedy {_percent(before.greedy_accuracy)} to {_percent(after.greedy_accuracy)}"
    points = f"{100 * change:+.1f} points"
    match _direction(change, error):
        case 1:
            return f"held-out accuracy rose from {figures} ({points}; {greedy})"
        case -1:
            return f"held-out accuracy fell from {figures} ({points}; {greedy})"
        case _:
            noise = f"within two standard errors, {200 * error:.1f} points"
            return f"held-out accuracy did not measurably change: {figures} ({points}, {noise}; {greedy})"


def _choice_clause(before: Evaluation, after: Evaluation) -> str:
    old, new = before.ways["step_by_step"], after.ways["step_by_step"]
    guess = before.ways["guess"]
    error = math.hypot(
        *(_binomial_error(one.ways["step_by_step"].share, one.problems * one.samples) for one in (before, after))
    )
    direction = _direction(new.share - old.share, error)
    shares = f"{_percent(old.share)} to {_percent(new.share)} of answers"
    if direction == 0:
        return f"the model answers step by step about as often as before ({shares})"
    clause = f"the model answers step by step {'more' if direction > 0 else 'less'} often ({shares})"
    if old.self_certainty is None or guess.self_certainty is None:
        return clause
    surer = "surer" if old.self_certainty > guess.self_certainty else "less sure"
    certainty = f"{old.self_certainty:.2f} against {guess.self_certainty:.2f} for guesses"
    return f"{clause}, the way of answering it was {surer} of (self-certainty of the base model {certainty})"


def _inside_clause(before: Evaluation, after: Evaluation) -> str:
    old, new = before.ways["step_by_step"], after.ways["step_by_step"]
    if old.accuracy is None or new.accuracy is None:
        return "no accuracy of step-by-step answers to compare"
    errors = (
        _binomial_error(way.accuracy or 0.0, way.share * one.problems * one.samples)
        for way, one in ((old, before), (new, after))
    )
    verb = {1: "rose", 0: "did not measurably change", -1: "fell"}[
        _direction(new.accuracy - old.accuracy, math.hypot(*errors))
    ]
    return f"accuracy inside step-by-step answers {verb} ({_percent(old.accuracy)} to {_percent(new.accuracy)})"


def conclusion(arm: Arm, before: Evaluation, after: Evaluation) -> str:
    """What happened, in one line."""
    clauses = [_choice_clause(before, after), _inside_clause(before, after)]
    return f"{GIVEN[arm]} {_accuracy_clause(before, after)}; {'; '.join(clauses)}."


def preflight(base: Evaluation) -> str:
    """Whether certainty points at right answers in the base model. It takes the answers to know, so it is no reward."""
    gain = base.surest_accuracy - base.sampled_accuracy
    figures = (
        f"of {base.samples} answers the surest one (by self-certainty) is right in {_percent(base.surest_accuracy)}, "
        f"an average one in {_percent(base.sampled_accuracy)}"
    )
    error = 2 * math.hypot(base.surest_error, base.sampled_error)
    verdict = direction(Interval(mean=gain, low=gain - error, high=gain + error), "certainty").text
    return f"Pre-flight, with the answers known: {figures}; {verdict}."


# ---- pictures --------------------------------------------------------------------------------------------------


def table(report: Report) -> Table:
    """For the terminal: the base model against the trained one."""
    before, after = report.before, report.after
    shown = Table(title=f"{report.arm}, seed {report.seed}, {report.steps} steps", title_justify="left")
    shown.add_column(f"{before.problems} held-out problems, {before.samples} answers each")
    for column in ("before", "after", "change"):
        shown.add_column(column, justify="right")

    def add(
        name: str, old: float | None, new: float | None, scale: float = 1.0, digits: int = 2, unit: str = ""
    ) -> None:
        texts = ["-" if value is None else f"{scale * value:.{digits}f}{unit}" for value in (old, new)]
        change = "-" if old is None or new is None else f"{scale * (new - old):+.{digits}f}"
        shown.add_row(name, *texts, change)

    def add_percent(name: str, old: float | None, new: float | None) -> None:
        add(name, old, new, 100, 1, " %")

    add_percent("accuracy, sampled", before.sampled_accuracy, after.sampled_accuracy)
    add_percent("accuracy, greedy", before.greedy_accuracy, after.greedy_accuracy)
    add_percent(f"accuracy, surest of {before.samples}", before.surest_accuracy, after.surest_accuracy)
    steps_before, steps_after = before.ways["step_by_step"], after.ways["step_by_step"]
    add_percent("answers step by step", steps_before.share, steps_after.share)
    add_percent("accuracy of those", steps_before.accuracy, steps_after.accuracy)
    add_percent("accuracy of guesses", before.ways["guess"].accuracy, after.ways["guess"].accuracy)
    add("self-certainty (nats per token)", before.self_certainty, after.self_certainty)
    add("entropy (nats per token)", before.entropy, after.entropy)
    add("length (tokens)", before.length, after.length, digits=1)
    return shown


def plot(steps: list[dict[str, Any]], report: Report, path: Path) -> Path:
    """Accuracy on the training prompts, self-certainty, length, entropy and KL by step, as a PNG.

    The dots at the left and right edge are the held-out figures before and after. A step without a value (no completion
    could be scored) is a gap. Raises ReportError when no step has one.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    before, after = report.before, report.after
    ends = {
        "components.exact_match": (100 * before.sampled_accuracy, 100 * after.sampled_accuracy),
        "components.self_certainty": (before.self_certainty, after.self_certainty),
        "completion_length": (before.length, after.length),
        "entropy": (before.entropy, after.entropy),
    }
    figure = Figure(figsize=(9, 9), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(CURVES), 1, sharex=True)
    numbers = [row["step"] for row in steps]
    for panel, (field, title, unit) in zip(panels, CURVES, strict=True):
        scale = 100 if unit == "%" else 1
        values = [math.nan if row.get(field) is None else scale * row[field] for row in steps]
        if all(map(math.isnan, values)):
            raise ReportError(f"steps.jsonl: no step has {field!r}")
        panel.plot(numbers, values, color="#2f6f9f", linewidth=1.3)
        if field in ends:
            edges = (numbers[0] - 1, numbers[-1] + 1)
            panel.plot(edges, ends[field], "o", color="#c4572e", markersize=5, label="held-out problems")
        panel.set_title(title, loc="left", fontsize=10)
        panel.set_ylabel(unit, fontsize=9)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=9, loc="upper left")
    panels[-1].set_xlabel("step")
    figure.suptitle(f"rlif demo: reward {report.arm}, seed {report.seed}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


# ---- the whole -------------------------------------------------------------------------------------------------


def write(
    run_dir: Path, arm: Arm, seed: int, before: Evaluation, after: Evaluation, seconds: float | None = None
) -> Report:
    """Make the report of a finished run from its steps.jsonl; leaves report.json and report.png beside it.

    Raises ReportError, and StepsError where there are no steps.
    """
    steps = read_steps(run_dir / "steps.jsonl")
    report = Report(
        arm=arm,
        seed=seed,
        steps=len(steps),
        seconds=seconds,
        line=conclusion(arm, before, after),
        preflight=preflight(before),
        before=before,
        after=after,
    )
    plot(steps, report, run_dir / "report.png")
    (run_dir / "report.json").write_text(report.model_dump_json(indent=2) + "\n")
    return report


def read(path: Path) -> Report:
    """A report.json. Raises ReportError."""
    try:
        return Report.model_validate_json(path.read_text())
    except OSError as error:
        raise ReportError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ReportError(f"{path}: not a report: {error}") from error
