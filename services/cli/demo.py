"""`rlif demo`, `rlif demo-all`: a run that learns on two CPU cores, from nothing to a report. `rlif demo-model`,
`rlif demo-prepare`: its parts."""

import asyncio
import os
import shutil
import socket
import sysconfig
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from services import logs, recipe
from services.cli.run import run_recipe
from services.demo.arms import ARMS, COMPARED, Arm, rewards
from services.startup import StartupError

if TYPE_CHECKING:
    from services.demo.evaluation import Evaluation
    from services.demo.report import Report

RECIPES = (Path(__file__).parent.parent.parent / "recipes", Path(sysconfig.get_path("data")) / "share/rlif/recipes")
"""Of a checkout, of an installed package."""
SEEDS = (2, 3, 4)
"""Fresh ones: the recipe was chosen while looking at 0 and 1."""

Where = Annotated[Path, typer.Option("--dir", help="Folder for the demo's models and runs.")]
Steps = Annotated[int | None, typer.Option(help="Optimizer steps; the recipe's when left out.", min=1)]
Problems = Annotated[int, typer.Option(help="Held-out problems to measure on.", min=1)]


def _recipe(overrides: list[str]) -> recipe.Recipe:
    found = [folder / "demo.yaml" for folder in RECIPES if (folder / "demo.yaml").exists()]
    if not found:
        raise StartupError(f"the demo's recipe is missing: there is no demo.yaml in {' or '.join(map(str, RECIPES))}")
    return recipe.load(found[0], overrides)


def _pretrain(directory: Path, seed: int, console: Console) -> None:
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # beside ours they only flicker
    from services.demo.base_model import STEPS, make_demo_model

    console.print("pretraining: a minute or two on two free cores", style="dim")
    columns = (TextColumn("base model"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("pretraining", total=STEPS)
        make_demo_model(directory, seed, progress=lambda step, *_: progress.update(task, completed=step))


def _base_model(base: Path, seed: int, console: Console) -> Path:
    """The base model of a seed; made once, also where several machines start on it in one shared folder."""
    if (base / "config.json").exists():
        console.print(f"base model: {base} (made earlier)", highlight=False)
        return base
    aside = base.with_name(f"{base.name}.{socket.gethostname()}.{os.getpid()}.part")
    try:
        _pretrain(aside, seed, console)
        aside.rename(base)
    except OSError:
        if not (base / "config.json").exists():
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    console.print(f"base model: {base}", highlight=False)
    return base


def _evaluate(model: Path, problems: int, seed: int, console: Console) -> "Evaluation":
    from services.cli.child import serving
    from services.demo.evaluation import evaluate

    one = ("--threads", "1")
    with (
        console.status(f"answering and scoring {problems} problems"),
        serving("rollout", "--model", str(model), *one) as rollout_url,
        serving("reward", "--model", str(model), *one) as reward_url,
    ):
        token = os.environ.get("RLIF_API_TOKEN")
        return asyncio.run(evaluate(rollout_url, reward_url, problems, seed=seed, token=token))


def _base_evaluation(base: Path, problems: int, seed: int, console: Console) -> "Evaluation":
    """Kept beside the base model: the arms of one seed start from the same figures."""
    from services.demo.evaluation import Evaluation

    kept = base / f"evaluation-{problems}.json"
    if not kept.exists():
        kept.write_text(_evaluate(base, problems, seed, console).model_dump_json())
    return Evaluation.model_validate_json(kept.read_text())


def _fresh_run_dir(folder: Path, reward: Arm, seed: int) -> Path:
    run_dir = folder / f"{reward}-{seed}"
    if run_dir.exists():
        earlier = time.strftime("%Y%m%d-%H%M%S", time.localtime(run_dir.stat().st_mtime))
        run_dir.rename(run_dir.with_name(f"{run_dir.name}.{earlier}"))
    return run_dir


def _check_arm(reward: str, option: str = "--reward") -> Arm:
    if reward not in ARMS:
        raise StartupError(f"{option} {reward}: choose {', '.join(ARMS)}")
    return reward


def run_demo(
    reward: Arm, seed: int, folder: Path, steps: int | None, problems: int, console: Console
) -> "Report | int":
    """One arm with one seed, from the base model to the report; an exit code when the run did not finish."""
    from services.demo import report, task
    from trainer.export import export

    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    console.rule(f"1/5  base model, seed {seed}")
    base = _base_model(folder / f"base-{seed}", seed, console)
    task.write_tasks(folder / "train.jsonl")

    console.rule("2/5  before: held-out problems")
    before = _base_evaluation(base, problems, seed, console)
    console.print(report.preflight(before), highlight=False)

    console.rule(f"3/5  training: reward {reward}")
    run_dir = _fresh_run_dir(folder, reward, seed)
    planned = steps or _recipe([]).trainer.steps
    terms = [term.model_dump(mode="json") for term in rewards(reward, seed, planned)]
    overrides = [
        f"run.dir={run_dir}",
        f"run.seed={seed}",
        f"model.path={base}",
        f"data.path={folder / 'train.jsonl'}",
        f"rewards={recipe.yaml.safe_dump(terms, default_flow_style=True, width=10**6).strip()}",
    ]
    overrides += [f"trainer.steps={steps}"] if steps else []
    trained_at = time.monotonic()
    code = run_recipe(_recipe(overrides), False, console)
    if code:
        return code
    seconds = time.monotonic() - trained_at

    console.rule("4/5  after: held-out problems")
    export(run_dir, run_dir / "model-trained")
    after = _evaluate(run_dir / "model-trained", problems, seed, console)

    console.rule("5/5  report")
    made = report.write(run_dir, reward, seed, before, after, seconds)
    console.print(report.table(made))
    console.print(f"plot    {run_dir / 'report.png'}", highlight=False)
    console.print(f"figures {run_dir / 'report.json'}", highlight=False)
    console.print(f"its console, now that it is over: rlif report {run_dir} report.html", highlight=False)
    minutes = (time.monotonic() - began) / 60
    console.print(f"training took {seconds:.0f} s, everything {minutes:.1f} min", highlight=False)
    console.print(f"\n[bold]{made.line}[/bold]", highlight=False)
    return made


def demo(
    reward: Annotated[str, typer.Option(help=f"{', '.join(ARMS)} (random and format are controls).")] = ARMS[0],
    seed: Annotated[int, typer.Option(help="Decides base model, order, sampling.", min=0)] = 0,
    folder: Where = Path("runs/demo"),
    steps: Steps = None,
    problems: Problems = 400,
) -> None:
    """Train a small model that is made on the spot, with the real services, and report what changed."""
    logs.configure("WARNING")
    made = run_demo(_check_arm(reward), seed, folder.resolve(), steps, problems, Console())
    if isinstance(made, int):
        raise typer.Exit(made)


def demo_all(
    folder: Where = Path("runs/demo"),
    steps: Steps = None,
    problems: Problems = 400,
    seeds: Annotated[str, typer.Option(help="Comma-separated seeds.")] = ",".join(map(str, SEEDS)),
    arms: Annotated[str, typer.Option(help=f"Comma-separated arms, of {', '.join(ARMS)}.")] = ",".join(COMPARED),
) -> None:
    """Arms over three seeds, then the table that compares them (arms that were run already are not run again)."""
    from services.demo import comparison, curves, report
    from services.steps import read_steps

    logs.configure("WARNING")
    console = Console()
    try:
        chosen_seeds = [int(seed) for seed in seeds.split(",")]
    except ValueError as error:
        raise StartupError(f"--seeds {seeds}: write numbers, as in 0,1,2") from error
    chosen_arms = [_check_arm(name.strip(), "--arms") for name in arms.split(",")]
    folder = folder.resolve()
    reports: list[Report] = []
    for seed in chosen_seeds:
        for arm in chosen_arms:
            kept = folder / f"{arm}-{seed}" / "report.json"
            if kept.exists():
                reports.append(report.read(kept))
                continue
            made = run_demo(arm, seed, folder, steps, problems, console)
            if isinstance(made, int):
                raise typer.Exit(made)
            reports.append(made)
    console.print(comparison.table(reports))
    (folder / "comparison.md").write_text(comparison.markdown(reports))
    console.print(f"the same as markdown: {folder / 'comparison.md'}", highlight=False)
    taken: dict[Arm, list] = {}
    for one in reports:
        taken.setdefault(one.arm, []).append(read_steps(folder / f"{one.arm}-{one.seed}" / "steps.jsonl"))
    console.print(f"learning curves: {curves.plot(taken, folder / 'comparison.png')}", highlight=False)


def demo_model(
    directory: Annotated[Path, typer.Argument(help="Folder to make.")],
    seed: Annotated[int, typer.Option(help="Decides weights and text.", min=0)] = 0,
) -> None:
    """Make the demo's small base model as a Hugging Face folder (about a minute)."""
    if directory.exists() and any(directory.iterdir()):
        raise StartupError(f"{directory} is not empty")
    console = Console()
    _pretrain(directory, seed, console)
    console.print(f"{directory}: the demo's base model, seed {seed}", highlight=False)


def _replace(path: Path, text: str) -> None:
    aside = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.part")
    aside.write_text(text)
    aside.replace(path)


def demo_prepare(
    directory: Annotated[Path, typer.Argument(help="Folder to make or complete.")],
    seed: Annotated[int, typer.Option(help="Decides base model, order, sampling.", min=0)] = 0,
) -> None:
    """Make what a demo run by other means needs: DIRECTORY/model, train.jsonl, and recipe.yaml, which names both.

    A model that is there stays; tasks and recipe are written again. The recipe's run.dir and addresses are yours.
    """
    logs.configure("WARNING")
    from services.demo import task

    console = Console()
    directory = directory.resolve()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        model = _base_model(directory / "model", seed, console)
        _replace(directory / "train.jsonl", task.as_jsonl(task.problems("train")))
        chosen = _recipe([f"model.path={model}", f"data.path={directory / 'train.jsonl'}", f"run.seed={seed}"])
        _replace(directory / "recipe.yaml", recipe.dump(chosen))
    except OSError as error:
        raise StartupError(f"{directory} cannot be written: {error.strerror or error}") from error
    console.print(f"recipe: {directory / 'recipe.yaml'}", highlight=False)
