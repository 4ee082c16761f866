"""The report for the terminal."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from services.intervals import Interval
from services.preflight.figures import PromptFigures, RewardFigures
from services.preflight.report import Report
from services.preflight.verdict import Level
from services.table import table

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


def _prompt_row(prompt: PromptFigures) -> list[str]:
    return [prompt.name, _percent(prompt.accuracy), _percent(prompt.over_own, "+"), _percent(prompt.majority)]


def _group_row(prompt: PromptFigures) -> list[str]:
    shares = (prompt.any_right, prompt.all_right, prompt.all_wrong, prompt.same_text, prompt.truncated, prompt.copies)
    return [prompt.name, *map(_share, shares), f"{prompt.length:.0f}"]


def _best_row(reward: RewardFigures) -> list[str]:
    return [reward.name, _percent(reward.best), _percent(reward.gain, "+"), _percent(reward.over_majority, "+")]


def _order_row(reward: RewardFigures) -> list[str]:
    r = reward.length_correlation
    ordered = [_number(reward.auc), _number(reward.beyond_length), "-" if r is None else f"{r:+.2f}"]
    return [reward.name, *ordered, _share(reward.flat)]


def show(report: Report, console: Console) -> None:
    """Shares and their differences in per cent."""
    own, n = report.own, report.samples
    judge = report.judge or "the majority, for want of answers"
    title = f"{own.tasks} tasks, {n} completions each, right by {judge}; per cent, and 95 % intervals"
    rows = [_prompt_row(prompt) for prompt in report.prompts]
    console.print(table(title, ["prompt", "right", "against own", f"maj@{n}"], rows))
    columns = ["prompt", f"some of {n}", "all", "none", "same text", "cut off", "copies", "tokens"]
    title = "tasks with some, all, none right, with one text; completions cut off, and copies"
    console.print(table(title, columns, [_group_row(prompt) for prompt in report.prompts]))
    rows = [_best_row(reward) for reward in own.rewards]
    title = f"rewards, with the prompt {own.name}: how often what they like best is right"
    console.print(table(title, ["reward", f"best of {n}", "gain", "over majority"], rows))
    rows = [_order_row(reward) for reward in own.rewards]
    title = f"order inside groups (length alone: AUC {_number(own.length_auc)}); r: with length"
    console.print(table(title, ["reward", "AUC in groups", "beyond length", "r", "flat"], rows))
    show_verdict(report, console)
    for name, text in (("prompt", report.best_prompt), ("reward", report.best_reward)):
        console.print(f"best {name}: {text}", highlight=False, markup=False)
    for text in report.limits:
        console.print(text, style="dim", highlight=False, markup=False)


def show_verdict(report: Report, console: Console) -> None:
    level = report.verdict.level
    console.print(f"[{STYLES[level]}]{level}[/]: {HEADLINES[level]}", highlight=False)
    findings = Table.grid(padding=(0, 2))
    for finding in report.verdict.findings:
        findings.add_row("", finding.sign, Text(finding.text))
    console.print(findings)
