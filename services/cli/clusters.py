"""`rlif launch slurm` and `rlif launch ray`: a whole run over several machines."""

import logging
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from services import logs, recipe
from services.cli.progress import Progress
from services.cli.recipes import check_rewards
from services.cli.run import ResumeFrom
from services.launch import credentials
from services.launch.plan import Plan, fill, make
from services.recipe import Recipe
from services.run_folder import clear_untrained, only_one, prepare, write_private
from services.startup import StartupError
from services.supervisor import Service

app = typer.Typer(no_args_is_help=True, help="Run a recipe over several machines.")

RecipePath = Annotated[Path, typer.Argument(help="The recipe (YAML).")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides: key.sub=value")]
Nodes = Annotated[int, typer.Option(help="Machines: the servers' first, the others train.", min=1)]
GpusPerNode = Annotated[int, typer.Option(help="GPUs of each machine; 0 to run on CPUs.", min=0)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be started; write nothing.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint of the run.")]


def _plan(path: Path, overrides: list[str] | None, nodes: int, gpus_per_node: int) -> tuple[Recipe, Plan]:
    """The recipe as every node reads it, and who runs where."""
    chosen = recipe.load(path, overrides)
    check_rewards(chosen)
    plan = make(chosen, nodes, gpus_per_node)
    return fill(chosen, plan), plan


def _prepare(filled: Recipe, resume: bool, files: dict[str, str]) -> None:
    """Recipe, credentials and `files` in the run's folder, unless that is of another run or of one that is going on."""
    run_dir = filled.run.dir
    prepare(filled, resume)
    with only_one(run_dir):
        if not resume:
            clear_untrained(run_dir)
        try:
            write_private(run_dir / "recipe.yaml", recipe.dump(filled))
            for name, text in files.items():
                write_private(run_dir / name, text)
        except OSError as error:
            raise StartupError(f"run.dir: cannot write in {run_dir}: {error.strerror}") from error
        credentials.write(run_dir)


@app.command()
def slurm(
    recipe_path: RecipePath,
    overrides: Overrides = None,
    nodes: Nodes = 1,
    gpus_per_node: GpusPerNode = 8,
    partition: Annotated[str | None, typer.Option(help="Slurm partition.")] = None,
    account: Annotated[str | None, typer.Option(help="Slurm account.")] = None,
    time: Annotated[str | None, typer.Option(help="Time limit, as 12:00:00 or 4-00:00:00.")] = None,
    container: Annotated[
        str | None, typer.Option(help="Image with rlif: a .sif file (Apptainer), or a name for Slurm's Pyxis.")
    ] = None,
    setup: Annotated[
        list[str] | None, typer.Option(help="Shell line before the run, as 'module load cuda'; repeat for more.")
    ] = None,
    sbatch: Annotated[
        list[str] | None, typer.Option(help="One more option of sbatch, as --sbatch=--qos=high; repeat for more.")
    ] = None,
    resume: Resume = False,
    resume_from: ResumeFrom = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the job's end; exit with its code.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Submit one job with every part of the run: redis, orchestrator, servers, trainer."""
    from services.launch.slurm import Job, check, find_sbatch, refuse_second, script, submit

    filled, plan = _plan(recipe_path, overrides, nodes, gpus_per_node)
    start = resume_from and resume_from.resolve()
    text = script(filled, plan, Job(partition, account, time, container, setup or [], sbatch or [], start))
    if dry_run:
        typer.echo(text, nl=False)
        return
    sbatch_command = find_sbatch()
    refuse_second(filled.run.dir)
    check(sbatch_command, text)
    _prepare(filled, resume, {"job.sbatch": text})
    console = Console()

    def tell(job: str) -> None:
        for line in plan.table():
            console.print(line, highlight=False, soft_wrap=True)
        stop = f"scancel --batch --signal=USR1 {job}"
        console.print(f"job {job}: {filled.run.dir}/slurm-{job}.log (stop: {stop})", highlight=False, soft_wrap=True)

    raise typer.Exit(submit(sbatch_command, filled.run.dir / "job.sbatch", wait, tell))


@app.command()
def ray(
    recipe_path: RecipePath,
    overrides: Overrides = None,
    nodes: Nodes = 1,
    gpus_per_node: GpusPerNode = 8,
    address: Annotated[str, typer.Option(help="The Ray cluster: auto, or HOST:PORT of its head.")] = "auto",
    resume: Resume = False,
    resume_from: ResumeFrom = None,
    dry_run: DryRun = False,
) -> None:
    """Run every part of the run as actors on a Ray cluster, until training is done. Ctrl-C stops with a checkpoint."""
    logs.configure()
    filled, plan = _plan(recipe_path, overrides, nodes, gpus_per_node)
    console = Console()
    for line in plan.table():
        console.print(line, highlight=False, soft_wrap=True)
    if dry_run:
        return
    from services.launch.ray import Driver, connect

    connect(address)
    _prepare(filled, resume, {})
    raise typer.Exit(Driver(filled, plan, resume_from and resume_from.resolve()).run())


def _address(name: str) -> str:
    """How the other nodes reach this one, from what the batch script found."""
    known = dict(pair.split("=", 1) for pair in os.environ.get("RLIF_NODE_ADDRESSES", "").split(",") if "=" in pair)
    if name not in known:
        raise StartupError(f"--host: no address of node {name!r} in RLIF_NODE_ADDRESSES; name it")
    return known[name]


@app.command(hidden=True)
def node(
    recipe_path: RecipePath,
    nodes: Nodes,
    gpus_per_node: GpusPerNode,
    number: Annotated[int, typer.Option(envvar="SLURM_NODEID", min=0)],
    name: Annotated[str, typer.Option(envvar="SLURMD_NODENAME")],
    attempt: Annotated[str, typer.Option(envvar="RLIF_ATTEMPT")],
    host: Annotated[str | None, typer.Option(help="Address for the other nodes; Slurm's when left out.")] = None,
    resume_from: ResumeFrom = None,
) -> None:
    """One machine's share of a run that `rlif launch slurm` or `rlif launch ray` started."""
    logs.configure("WARNING")
    for logger in ("services.supervisor", "services.launch"):
        logging.getLogger(logger).setLevel(logging.INFO)
    from services.launch.node import run_node

    progress: Progress | None = None

    def tick(services: list[Service]) -> None:
        nonlocal progress
        if progress is None:
            filled = recipe.load(recipe_path)
            progress = Progress(filled.run.dir, filled.trainer.steps, Console())
            progress.file.new()  # what earlier starts trained was told by them
        progress(services)

    host = host or _address(name)
    code = run_node(recipe_path, nodes, gpus_per_node, number, name, host, attempt, resume_from, tick)
    raise typer.Exit(code)
