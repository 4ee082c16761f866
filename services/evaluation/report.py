"""What an evaluation leaves behind: results.json, items.jsonl, a table beside the paper's rows, a plot."""

import math
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from services.evaluation import paper
from services.evaluation.protocol import described
from services.evaluation.results import Figure, ItemValue, Results, TaskFigures
from services.evaluation.tasks import BENCHMARKS
from services.startup import StartupError

OURS, THEIRS = "#2f6f9f", "YlOrBr"
"""A colour, and a map of colours, of which the paper's rows take as many as they are."""


def _replace(path: Path, text: str) -> None:
    aside = path.with_name(path.name + ".part")
    aside.write_text(text)
    aside.replace(path)


def write(folder: Path, results: Results, items: Sequence[ItemValue]) -> None:
    _replace(folder / "items.jsonl", "".join(item.model_dump_json() + "\n" for item in items))
    _replace(folder / "results.json", results.model_dump_json(indent=2) + "\n")


def read(folder: Path) -> tuple[Results, list[ItemValue]]:
    """Raises StartupError: it is not the folder of an evaluation that has finished."""
    try:
        results = Results.model_validate_json((folder / "results.json").read_text())
        lines = (folder / "items.jsonl").read_text().splitlines()
        return results, [ItemValue.model_validate_json(line) for line in lines]
    except OSError as error:
        raise StartupError(f"{folder}: no finished evaluation: {error.filename}: {error.strerror}") from error
    except ValueError as error:
        raise StartupError(f"{folder}: not the results of an evaluation: {error}") from error


# ---- tables ----------------------------------------------------------------------------------------------------


def percent(figure: Figure | None) -> str:
    if figure is None:
        return "-"
    spread = "" if figure.low is None or figure.high is None else f" [{100 * figure.low:.1f}, {100 * figure.high:.1f}]"
    return f"{100 * figure.value:.1f}{spread}"


def _number(value: float | None, digits: int = 2, scale: float = 1.0) -> str:
    return "-" if value is None else f"{scale * value:.{digits}f}"


def table(results: Results) -> Table:
    """A row for each task; shares in percent, intervals in brackets. A column that says nothing of any is left out."""
    tasks, several = results.tasks, results.protocol.samples
    powers = sorted({int(k) for task in tasks for k in task.pass_at if k != "1"})
    columns = {
        "items": [str(task.items) for task in tasks],
        "%": [percent(task.value) for task in tasks],
        "by seed": [" ".join(_number(value, 1, 100) for value in task.by_seed.values()) for task in tasks],
        **{f"pass@{k}": [percent(task.pass_at.get(str(k))) for task in tasks] for k in powers},
        f"maj@{several}": [percent(task.majority) if task.majority else "" for task in tasks],
        "failed": [", ".join(f"{count} {reason}" for reason, count in task.failed.items()) for task in tasks],
        "at least": [_number(task.at_least, 1, 100) if task.failed else "" for task in tasks],
        "tokens": [_number(task.length, 0) for task in tasks],
        "stopped": [_number(task.stopped, 1, 100) for task in tasks],
    }
    shown = Table(title=f"{results.model}, protocol {described(results.protocol)}", title_justify="left")
    shown.add_column("task")
    told = {name: cells for name, cells in columns.items() if any(cells)}
    for name in told:
        shown.add_column(name, justify="right", overflow="fold")
    for place, task in enumerate(tasks):
        name = task.title if task.measure == "accuracy" else f"{task.title}, {task.measure}"
        shown.add_row(name, *(cells[place] for cells in told.values()))
    return shown


def certainty_table(results: Results) -> Table | None:
    """None where certainty was not asked for."""
    tasks = [task for task in results.tasks if task.certainty is not None]
    if not tasks:
        return None
    shown = Table(title="Self-certainty (nats per token) of right and wrong answers", title_justify="left")
    shown.add_column("task")
    for column in ("right", "wrong", "AUC", "r", "p", "AUC inside items", "surest", "Borda vote"):
        shown.add_column(column, justify="right")
    for task in tasks:
        said = task.certainty
        assert said is not None
        numbers = [_number(value) for value in (said.right, said.wrong, said.auc, said.r)]
        p = "-" if said.p is None else f"{said.p:.2g}"
        shown.add_row(task.title, *numbers, p, _number(said.group_auc), percent(said.surest), percent(said.borda))
    return shown


def _headline(task: TaskFigures) -> float | None:
    """The figure that stands beside the paper's, in percent."""
    if named := BENCHMARKS[task.task].beside:
        return 100 * task.further[named] if named in task.further else None
    return None if task.value is None else 100 * task.value.value


def _columns(results: Results) -> list[tuple[str, TaskFigures]]:
    return [(column, task) for task in results.tasks if (column := BENCHMARKS[task.task].column)]


def beside_paper(results: Results, families: Sequence[str]) -> Table | None:
    """This evaluation's figures above the paper's rows; none where no task is among the paper's."""
    columns = _columns(results)
    if not columns:
        return None
    shown = Table(title=f"Beside {paper.SOURCE} (percent)", title_justify="left")
    shown.add_column("model")
    shown.add_column("table", justify="right")
    for column, _ in columns:
        shown.add_column(column, justify="right")
    shown.add_row(results.model, "", *(_number(_headline(task), 1) for _, task in columns), style="bold")
    for family in families:
        shown.add_section()
        for row in paper.ROWS:
            if row.family == family:
                shown.add_row(row.name, str(row.table), *(_number(row.value(column), 1) for column, _ in columns))
    return shown


# ---- plot ------------------------------------------------------------------------------------------------------


def plot(results: Results, families: Sequence[str], path: Path) -> Path:
    """Bars by task: this evaluation with its intervals, then the rows of the paper, as a PNG."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    rows = [row for row in paper.ROWS if row.family in families]
    tasks, count = results.tasks, 1 + len(rows)
    canvas = Canvas(figsize=(2.5 + 1.8 * len(tasks), 4.5), layout="constrained")
    FigureCanvasAgg(canvas)
    panel = canvas.subplots()
    width = 0.8 / count
    for place, task in enumerate(tasks):
        start = place - 0.4 + width / 2
        value, figure = _headline(task), task.value
        label = results.model if place == 0 else None
        panel.bar(start, value or 0.0, width, color=OURS, label=label)
        if figure is not None and figure.low is not None and BENCHMARKS[task.task].beside is None:
            reach = [[100 * (figure.value - figure.low)], [100 * ((figure.high or 0.0) - figure.value)]]
            panel.errorbar(start, 100 * figure.value, reach, color="black", capsize=3, linewidth=1)
        column = BENCHMARKS[task.task].column
        for number, row in enumerate(rows, 1):
            height = row.value(column) if column else math.nan
            name = f"{row.family}: {row.name}" if place == 0 else None
            panel.bar(
                start + number * width, height, width, color=colormaps[THEIRS](0.15 + 0.75 * number / count), label=name
            )
    panel.set_xticks(range(len(tasks)), [task.title for task in tasks])
    panel.set_ylabel("percent")
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", alpha=0.25)
    panel.legend(frameon=False, fontsize=8)
    panel.set_title(f"bars after the first: {paper.SOURCE}" if rows else "", loc="left", fontsize=9)
    canvas.savefig(path, dpi=120)
    return path
