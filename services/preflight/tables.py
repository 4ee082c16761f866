"""The report for the terminal."""

from rich.console import Console
from rich.table import Table

from services.intervals import Interval
from services.preflight.figures import PromptFigures, RewardFigures
from services.preflight.report import Report
from services.preflight.verdict import Level, percent, within

STYLES: dict[Level, str] = {"go": "green", "caution": "yellow", "stop": "bold red"}
HEADLINES: dict[Level, str] = {
    "go": "nothing measured here speaks against training",
    "caution": "training may well come to nothing; look at the reasons first",
    "stop": "do not train on this as it is",
}


def _number(interval: Interval | None) -> str:
    return "-" if interval is None else f"{interval.mean:.2f} ({interval.low:.2f} to {interval.high:.2f})"


def _points(interval: Interval | None) -> str:
    if interval is None:
        return "-"
    return f"{100 * interval.mean:+.1f} ({100 * interval.low:+.0f} to {100 * interval.high:+.0f})"


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
    measured = [within(prompt.accuracy), _points(prompt.over_own), within(prompt.majority)]
    return [prompt.name, *measured, *map(percent, shares), f"{prompt.length:.0f}"]


def _reward_row(reward: RewardFigures) -> list[str]:
    r = reward.length_correlation
    picked = [within(reward.best), _points(reward.gain), _points(reward.over_majority)]
    ordered = [_number(reward.auc), _number(reward.beyond_length), "-" if r is None else f"{r:+.2f}"]
    return [reward.name, *picked, *ordered, percent(reward.flat)]


def show(report: Report, console: Console) -> None:
    own, n = report.own, report.samples
    right = "right" if report.judge else "in the majority"
    columns = [
        right,
        "against own",
        f"maj@{n}",
        f"some of {n}",
        "all",
        "none",
        "same text",
        "cut off",
        "copies",
        "tokens",
    ]
    judge = report.judge or "the majority, for want of answers"
    title = f"{own.tasks} tasks, {n} completions each, right by {judge}; 95 % intervals"
    console.print(_table(title, "prompt", columns, [_prompt_row(prompt) for prompt in report.prompts]))
    columns = [
        f"best of {n}",
        "gain",
        "over majority",
        "AUC in groups",
        "beyond length",
        "r with length",
        "says nothing",
    ]
    title = f"rewards, with the prompt {own.name} (length alone: AUC {_number(own.length_auc)})"
    console.print(_table(title, "reward", columns, [_reward_row(reward) for reward in own.rewards]))
    level = report.verdict.level
    console.print(f"[{STYLES[level]}]{level}[/]: {HEADLINES[level]}", highlight=False)
    for finding in report.verdict.findings:
        console.print(f"  {finding.level:<8} {finding.text}", highlight=False, markup=False)
    for name, text in (("prompt", report.best_prompt), ("reward", report.best_reward)):
        console.print(f"best {name}: {text}", highlight=False, markup=False)
    for text in report.limits:
        console.print(text, style="dim", highlight=False, markup=False)
