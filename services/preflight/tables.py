"""The report for the terminal."""

from rich.console import Console
from rich.table import Table

from services.intervals import Interval
from services.preflight.figures import PromptFigures, RewardFigures
from services.preflight.report import Report
from services.preflight.verdict import Level

STYLES: dict[Level, str] = {"go": "green", "caution": "yellow", "stop": "bold red"}
HEADLINES: dict[Level, str] = {
    "go": "nothing measured here speaks against training",
    "caution": "training may well come to nothing; look at the reasons first",
    "stop": "do not train on this as it is",
}


def _number(interval: Interval | None) -> str:
    return "-" if interval is None else f"{interval.mean:.2f} ({interval.low:.2f} to {interval.high:.2f})"


def _percent(interval: Interval | None, sign: str = "") -> str:
    if interval is None:
        return "-"
    return f"{100 * interval.mean:{sign}.1f} ({100 * interval.low:{sign}.0f} to {100 * interval.high:{sign}.0f})"


def _share(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _table(title: str, first: str, columns: list[str], rows: list[list[str]]) -> Table:
    shown = Table(title=title, title_justify="left")
    shown.add_column(first)
    for column in columns:
        shown.add_column(column, justify="right")
    for row in rows:
        shown.add_row(*row)
    return shown


def _prompt_row(prompt: PromptFigures) -> list[str]:
    shares = (prompt.any_right, prompt.all_right, prompt.all_wrong, prompt.same_text, prompt.truncated, prompt.copies)
    measured = [_percent(prompt.accuracy), _percent(prompt.over_own, "+"), _percent(prompt.majority)]
    return [prompt.name, *measured, *map(_share, shares), f"{prompt.length:.0f}"]


def _reward_row(reward: RewardFigures) -> list[str]:
    r = reward.length_correlation
    picked = [_percent(reward.best), _percent(reward.gain, "+"), _percent(reward.over_majority, "+")]
    ordered = [_number(reward.auc), _number(reward.beyond_length), "-" if r is None else f"{r:+.2f}"]
    return [reward.name, *picked, *ordered, _share(reward.flat)]


def show(report: Report, console: Console) -> None:
    """Shares and their differences in per cent."""
    own, n = report.own, report.samples
    judge = report.judge or "the majority, for want of answers"
    columns = ["right", "against own", f"maj@{n}", f"some of {n}", "all", "none", "same text", "cut off", "copies"]
    title = f"{own.tasks} tasks, {n} completions each, right by {judge}; per cent, and 95 % intervals"
    rows = [_prompt_row(prompt) for prompt in report.prompts]
    console.print(_table(title, "prompt", [*columns, "tokens"], rows))
    columns = [f"best of {n}", "gain", "over majority", "AUC in groups", "beyond length", "r with length", "flat"]
    title = f"rewards, with the prompt {own.name} (length alone: AUC {_number(own.length_auc)})"
    console.print(_table(title, "reward", columns, [_reward_row(reward) for reward in own.rewards]))
    show_verdict(report, console)
    for name, text in (("prompt", report.best_prompt), ("reward", report.best_reward)):
        console.print(f"best {name}: {text}", highlight=False, markup=False)
    for text in report.limits:
        console.print(text, style="dim", highlight=False, markup=False)


def show_verdict(report: Report, console: Console) -> None:
    level = report.verdict.level
    console.print(f"[{STYLES[level]}]{level}[/]: {HEADLINES[level]}", highlight=False)
    for finding in report.verdict.findings:
        console.print(f"  {finding.sign:<8} {finding.text}", highlight=False, markup=False)
