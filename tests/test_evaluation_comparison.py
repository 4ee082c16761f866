"""`rlif compare`: evaluations paired by item, arms of several runs by permutation."""

import io
import json
from pathlib import Path

import pytest
from scipy import stats
from typer.testing import CliRunner

from services.cli.main import app
from services.evaluation import comparison, paper, report
from services.evaluation.benchmark import Benchmark
from services.evaluation.protocol import PRESETS
from services.evaluation.results import Certainty, Figure, ItemValue, Results, TaskFigures
from services.evaluation.tasks import BENCHMARKS
from services.startup import StartupError
from services.table import table


def evaluated(folder: Path, values: dict[str, list[float]], sha: str = "s") -> Path:
    """A finished evaluation whose items are numbered."""
    folder.mkdir(parents=True)
    tasks = []
    for name, those in values.items():
        figure = Figure(value=sum(those) / len(those), low=0.0, high=1.0, items=len(those))
        tasks.append(
            TaskFigures(
                task=name,
                title=BENCHMARKS[name].title,
                measure="accuracy",
                source="f",
                sha256=sha,
                items=len(those),
                samples=1,
                seeds=[0],
                value=figure,
                at_least=figure.value,
            )
        )
    items = [
        ItemValue(task=name, item=str(n), value=value, answers=1)
        for name, those in values.items()
        for n, value in enumerate(those)
    ]
    report.write(folder, Results(model="m", identity="i", protocol=PRESETS["paper"], tasks=tasks), items)
    return folder


def trained(folder: Path, accuracy: list[float], evaluation: float | None = None) -> Path:
    folder.mkdir(parents=True)
    steps = [
        {"step": n, "start": 0, "lineage": 0, "accuracy.math_verify": value, "kl": 0.1, "tokens_per_second": 9.0}
        for n, value in enumerate(accuracy, 1)
    ]
    (folder / "steps.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    if evaluation is not None:
        (folder / "evaluations.jsonl").write_text(json.dumps({"metrics": {"accuracy": evaluation}}) + "\n")
    return folder


def compared(*given: object) -> dict[str, comparison.Difference]:
    made = comparison.compare(comparison.arms([str(one) for one in given]))
    return {f"{one.arm.label} {one.metric}": one for one in made.differences}


def test_evaluations_are_paired_by_item(tmp_path):
    a, b = [1.0] * 30 + [0.0] * 10, [1.0] * 20 + [0.0] * 20
    base = evaluated(tmp_path / "base", {"gsm8k": b, "math500": [0.5, 0.0, 0.25]})
    tuned = evaluated(tmp_path / "tuned", {"gsm8k": [*a, 1.0], "math500": [1.0, 0.5, 0.25]})
    found = compared(base, tuned)
    gsm8k = found["tuned gsm8k"]
    assert gsm8k.items == 40 and gsm8k.difference == pytest.approx(0.25) and gsm8k.test == "McNemar"
    assert gsm8k.p == pytest.approx(stats.binomtest(10, 10).pvalue) and 0 < gsm8k.low < 0.25 < gsm8k.high
    assert gsm8k.against.mean == 0.5 and gsm8k.arm.mean == pytest.approx(0.75)
    math = found["tuned math500"]
    assert math.test == "paired permutation" and math.p == pytest.approx(0.5)


def test_arms_of_several_seeds_are_compared_over_runs(tmp_path):
    for seed, value in enumerate((0.5, 0.6, 0.7)):
        trained(tmp_path / f"random-{seed}", [0.1] * 19 + [value - 0.3] * 2, value)
        trained(tmp_path / f"intuitor-seed-{seed}", [0.1] * 19 + [value] * 2, value + 0.1)
    found = compared(*sorted(tmp_path.glob("random-*")), *sorted(tmp_path.glob("intuitor-*")))
    accuracy = found["intuitor accuracy.math_verify"]
    assert (accuracy.arm.runs, accuracy.against.runs) == (3, 3) and accuracy.arm.mean == pytest.approx(0.6)
    assert accuracy.difference == pytest.approx(0.3) and accuracy.arm.deviation == pytest.approx(0.1)
    assert accuracy.p == pytest.approx(0.1) and accuracy.test == "permutation over runs" and accuracy.low is None
    assert found["intuitor evaluation.accuracy"].difference == pytest.approx(0.1)
    assert "intuitor kl" in found and "intuitor tokens_per_second" not in found


def test_one_training_run_a_side_has_no_test(tmp_path):
    found = compared(f"a={trained(tmp_path / 'x', [0.5])}", f"b={trained(tmp_path / 'y', [0.75])}")
    assert found["b accuracy.math_verify"].p is None and found["b accuracy.math_verify"].difference == 0.25


def test_the_command_prints_a_table_notes_and_json(tmp_path):
    base = evaluated(tmp_path / "base", {"gsm8k": [0.0, 1.0]})
    tuned = evaluated(tmp_path / "tuned", {"gsm8k": [1.0, 1.0]}, sha="other")
    done = CliRunner().invoke(app, ["compare", str(base), str(tuned)], env={"COLUMNS": "80"})
    told = " ".join(done.stdout.split())
    assert done.exit_code == 0 and "McNemar, 2 items (gsm8k)" in told and "+0.5 [+0, +1]" in told
    assert "the evaluations differ in protocol, tasks or questions" in told
    as_json = CliRunner().invoke(app, ["compare", str(base), str(tuned), "--json"])
    assert comparison.Comparison.model_validate_json(as_json.stdout).differences[0].p == 1.0


def test_what_cannot_be_compared_is_refused(tmp_path):
    one = trained(tmp_path / "run-1", [0.5])
    (tmp_path / "empty").mkdir()
    other = evaluated(tmp_path / "evaluation", {"gsm8k": [1.0]})
    for given, said in (
        ([one], "there is one arm, 'run', and nothing to compare it with"),
        ([one, tmp_path / "empty"], "neither the folder of an evaluation (results.json) nor of a run (steps.jsonl)"),
        ([one, other], "run has no metric in common with evaluation"),
    ):
        with pytest.raises(StartupError) as refused:
            compared(*given)
        assert said in str(refused.value)
    (other / "items.jsonl").unlink()
    with pytest.raises(StartupError, match="no finished evaluation"):
        compared(one, other)


# ---- beside the paper ------------------------------------------------------------------------------------------


def test_every_benchmark_of_the_paper_has_its_column():
    columns = {benchmark.column for benchmark in BENCHMARKS.values() if benchmark.column}
    assert columns == set(paper.COLUMNS) and all(isinstance(one, Benchmark) for one in BENCHMARKS.values())
    intuitor = next(row for row in paper.ROWS if (row.family, row.name) == ("3b", "+ Intuitor"))
    assert intuitor.value("CRUXEval-O") == 41.6 and len(paper.ROWS) == 22


def test_the_table_beside_the_paper(tmp_path):
    from rich.console import Console

    results, _ = report.read(evaluated(tmp_path / "e", {"gsm8k": [1.0, 0.0], "ifeval": [1.0]}))
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report.figures_table(results), report.beside_paper(results, ["3b"]))
    shown = console.export_text()
    assert (
        "50.0 [0.0, 100.0]" in shown
        and "79.2" in shown
        and "74.7" not in shown
        and shown.count("IFEval") == 1
        and "…" not in shown
    )
    assert report.remarks(results) == []
    assert report.plot(results, ["3b"], tmp_path / "plot.png").stat().st_size > 10_000


def test_what_makes_a_figure_another_thing_than_the_papers_is_said(tmp_path):
    results, _ = report.read(evaluated(tmp_path / "e", {"gsm8k": [1.0, 0.0], "ifeval": [1.0]}))
    math, instructions = results.tasks
    lost = math.model_copy(
        update={"left_out": 98, "failed": {"timeout": 1, "unanswered": 2}, "samples": 4, "at_least": 0.2}
    )
    cut = instructions.model_copy(update={"left_out": 3})
    assert report.remarks(results.model_copy(update={"tasks": [lost, cut]})) == [
        "GSM8K: the first 2 of 100 questions (--limit); the paper's figure is of all",
        "GSM8K: 3 of 8 answers are not in the figure (1 timeout, 2 unanswered); were they wrong, it would be 20.0",
        "IFEval: the first 1 of 4 questions (--limit)",
    ]


def test_tables_read_well_in_80_columns(tmp_path):
    """Nothing is cut off, and no figure is broken in two lines."""
    from rich.console import Console

    figure = Figure(value=1.0, low=1.0, high=1.0, items=9)
    said = Certainty(scorer="s", right=17.2, wrong=16.1, auc=0.61, r=0.2, p=0.031, surest=figure, borda=figure)
    results, _ = report.read(evaluated(tmp_path / "e", {name: [1.0] for name in BENCHMARKS}))
    many = {"samples": 8, "failed": {"unanswered": 12}, "by_seed": {"0": 0.5}, "certainty": said, "length": 2048.0}
    many |= {"pass_at": {"1": figure, "8": figure}, "majority": figure, "stopped": 1.0, "value": figure}
    results = results.model_copy(update={"tasks": [task.model_copy(update=many) for task in results.tasks]})
    console = Console(width=80, record=True, file=io.StringIO())
    for made in (report.figures_table, report.several_table, report.certainty_table):
        console.print(made(results))
    console.print(report.beside_paper(results, paper.FAMILIES))
    console.print(table("metrics", ["metric", "mean"], [["components." + "x" * 100, "1.0"]]))
    text = console.export_text()
    assert text.split("components.")[1].count("x") == 100
    assert "…" not in text and text.count("100.0 [100.0, 100.0]") == 7 * (1 + 4)
    assert all(f"{row.name} " in text for row in paper.ROWS)
