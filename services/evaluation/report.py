"""What an evaluation leaves behind: results.json, items.jsonl, a table beside the paper's rows, a plot."""

import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Group

from services.evaluation import paper
from services.evaluation.protocol import described
from services.evaluation.results import Figure, ItemValue, Results, TaskFigures
from services.evaluation.tasks import BENCHMARKS
from services.startup import StartupError
from services.table import table

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


def _title(task: TaskFigures) -> str:
    return task.title if task.measure == "accuracy" else f"{task.title}, {task.measure}"


def figures_table(results: Results) -> Group:
    """A row for each task; shares in percent, intervals in brackets. A column that says nothing of any is left out."""
    tasks = results.tasks
    columns = {
        "items": [str(task.items) for task in tasks],
        "%": [percent(task.value) for task in tasks],
        "failed": [str(sum(task.failed.values())) if task.failed else "" for task in tasks],
        "at least": [_number(task.at_least, 1, 100) if task.failed else "" for task in tasks],
        "tokens": [_number(task.length, 0) for task in tasks],
        "stopped": [_number(task.stopped, 1, 100) for task in tasks],
    }
    told = {name: cells for name, cells in columns.items() if any(cells)}
    rows = [[_title(task), *(cells[place] for cells in told.values())] for place, task in enumerate(tasks)]
    return table(f"{results.model}, protocol {described(results.protocol)}", ["task", *told], rows)


def _several(task: TaskFigures) -> dict[str, str]:
    """What there is of several answers to a question, by name."""
    told = {f"seed {seed}": _number(value, 1, 100) for seed, value in task.by_seed.items()}
    told |= {f"pass@{k}": percent(figure) for k, figure in task.pass_at.items() if k != "1"}
    certainty = task.certainty
    votes = {
        f"maj@{task.samples}": task.majority,
        "surest": certainty and certainty.surest,
        "Borda vote": certainty and certainty.borda,
    }
    return told | {name: percent(figure) for name, figure in votes.items() if figure}


def several_table(results: Results) -> Group | None:
    """A row for each figure of several answers; none where each question was answered once."""
    blocks = [[[_title(task), name, figure] for name, figure in _several(task).items()] for task in results.tasks]
    if not any(blocks):
        return None
    return table("Several answers to each question", ["task", "figure", "%"], *filter(None, blocks), left=["figure"])


def certainty_table(results: Results) -> Group | None:
    """None where certainty was not asked for."""
    rows = []
    for task in results.tasks:
        if said := task.certainty:
            numbers = [_number(value) for value in (said.right, said.wrong, said.auc, said.r)]
            p = "-" if said.p is None else f"{said.p:.2g}"
            rows.append([task.title, *numbers, p, _number(said.group_auc)])
    if not rows:
        return None
    columns = ["task", "right", "wrong", "AUC", "r", "p", "AUC inside items"]
    return table("Self-certainty (nats per token) of right and wrong answers", columns, rows)


def _headline(task: TaskFigures) -> float | None:
    """The figure that stands beside the paper's, in percent."""
    if named := BENCHMARKS[task.task].beside:
        return 100 * task.further[named] if named in task.further else None
    return None if task.value is None else 100 * task.value.value


def _columns(results: Results) -> list[tuple[str, TaskFigures]]:
    return [(column, task) for task in results.tasks if (column := BENCHMARKS[task.task].column)]


def beside_paper(results: Results, families: Sequence[str]) -> Group | None:
    """This evaluation's figures above the paper's rows; none where no task is among the paper's."""
    columns = _columns(results)
    if not columns:
        return None
    chosen = [[row for row in paper.ROWS if row.family == family] for family in families]
    numbers = sorted({row.table for rows in chosen for row in rows})
    title = f"Beside {paper.SOURCE}, table {' and '.join(map(str, numbers))} (percent)"
    ours = [["this model", *(_number(_headline(task), 1) for _, task in columns)]]
    theirs = [
        [[row.name, *(_number(row.value(column), 1) for column, _ in columns)] for row in rows] for rows in chosen
    ]
    return table(title, ["model", *(column for column, _ in columns)], ours, *theirs)


def remarks(results: Results) -> list[str]:
    """What keeps a figure from being what it looks like, or the same thing as the paper's, a line for each."""
    lines = []
    for task in results.tasks:
        benchmark = BENCHMARKS[task.task]
        if task.left_out:
            line = f"{task.title}: the first {task.items} of {task.items + task.left_out} questions (--limit)"
            lines.append(f"{line}; the paper's figure is of all" if benchmark.column else line)
        if task.failed:
            asked, lost = task.items * task.samples * len(task.seeds), sum(task.failed.values())
            why = ", ".join(f"{count} {reason}" for reason, count in task.failed.items())
            line = f"{task.title}: {lost} of {asked} answers are not in the figure ({why})"
            instead = f"; were they wrong, it would be {_number(task.at_least, 1, 100)}"
            lines.append(line if benchmark.beside else line + instead)
    return lines


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
