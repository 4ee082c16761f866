"""`rlif up`, `rlif orchestrate`, `rlif train`, `rlif export`: a run, or one part of it."""

import logging
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from services import logs, recipe
from services.cli.launch import RLIF, plan
from services.cli.preflight import gate
from services.cli.recipes import ControlArm, check_data, check_rewards, doubts, load_arm
from services.cli.watch import watch
from services.model_folder import check_local
from services.run_folder import only_one, prepare
from services.startup import StartupError
from services.steps import why_stopped

log = logging.getLogger(__name__)

RecipePath = Annotated[Path, typer.Argument(help="The recipe (YAML).")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides: key.sub=value")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint of the run.")]
ResumeFrom = Annotated[
    Path | None,
    typer.Option(help="Without a checkpoint, go on from this model folder's weights, with a fresh optimizer."),
]
Preflight = Annotated[
    bool, typer.Option("--preflight", help="First measure what the reward would teach; refuse on a clear stop sign.")
]


def run_recipe(chosen: recipe.Recipe, resume: bool, console: Console) -> int:
    """All processes of the recipe on this machine until training is done. Returns an exit code."""
    from services.cli.progress import Progress
    from services.supervisor import supervise

    prepare(chosen, resume)
    with only_one(chosen.run.dir):
        check_local(chosen.model.path, "model.path")  # sooner than the servers would
        services, filled, port = plan(chosen, resume)
        run_dir = filled.run.dir
        console.print(f"run {filled.run.name} in {run_dir} (logs in {run_dir / 'logs'})", highlight=False)
        console.print(f"console http://127.0.0.1:{port}/", highlight=False)
        with Progress(run_dir, filled.trainer.steps, console) as progress:
            code = supervise(services, "trainer", run_dir / "logs", progress)
        if code == 0 and (why := why_stopped(run_dir)):
            console.print(f"stopped {why}", style="red", highlight=False)
            return 1
        return code


def up(
    recipe_path: RecipePath,
    overrides: Overrides = None,
    resume: Resume = False,
    control: ControlArm = None,
    preflight: Preflight = False,
) -> None:
    """Run a whole recipe on this machine: redis, servers, orchestrator, trainer, supervised. Ctrl-C stops it."""
    logs.configure("WARNING")
    logging.getLogger("services.supervisor").setLevel(logging.INFO)
    chosen = load_arm(recipe_path, overrides, control)
    check_rewards(chosen)
    rows, doubtful = check_data(chosen)
    for line in [*doubts(chosen, rows), *doubtful]:
        log.warning(line)
    console = Console()
    if preflight:
        if resume:
            raise StartupError("--preflight measures a model before training: it does not go with --resume")
        gate(chosen, console)
    raise typer.Exit(run_recipe(chosen, resume, console))


def _addresses(chosen: recipe.Recipe, *needed: str) -> None:
    missing = [
        key
        for key, value in (
            ("queue.url (or RLIF_REDIS_URL)", recipe.redis_url(chosen)),
            ("rollout.urls", chosen.rollout.urls),
            ("scorer.urls", chosen.scorer.urls),
        )
        if key.split()[0] in needed and not value
    ]
    if missing:
        raise StartupError(
            f"{', '.join(missing)}: needed by a part that runs alone; set it in the recipe or on the command line "
            f"(`rlif up` fills it in by itself)"
        )


def orchestrate(
    recipe_path: RecipePath,
    overrides: Overrides = None,
    stay: Annotated[
        bool, typer.Option("--stay", help="When training is over, go on serving status and metrics until stopped.")
    ] = False,
    port: Annotated[
        int | None,
        typer.Option(
            help="Port of status, metrics and console; tracking.metrics_port + 1 when left out.", min=1, max=65535
        ),
    ] = None,
) -> None:
    """Run the orchestrator alone: tasks to rollouts to rewards to the queue."""
    watch("orchestrator")
    chosen = recipe.load(recipe_path, overrides)
    _addresses(chosen, "queue.url", "rollout.urls", "scorer.urls")
    from services.orchestrator.run import main

    url = recipe.redis_url(chosen)
    assert url
    raise typer.Exit(main(chosen, chosen.rollout.urls, chosen.scorer.urls, url, stay, port))


def train(
    recipe_path: RecipePath,
    overrides: Overrides = None,
    resume: Resume = False,
    resume_from: ResumeFrom = None,
    nodes: Annotated[int, typer.Option(help="Nodes that train together; each runs this command.", min=1)] = 1,
    node_rank: Annotated[int, typer.Option(help="This node's number.", min=0)] = 0,
    leader: Annotated[str | None, typer.Option(help="HOST:PORT of node 0, as the other nodes reach it.")] = None,
) -> None:
    """Run the trainer alone: `trainer.ranks` processes, dealt out evenly over the nodes."""
    watch("trainer")
    chosen = recipe.load(recipe_path, overrides)
    _addresses(chosen, "queue.url")
    if chosen.trainer.ranks % nodes:
        raise StartupError(f"trainer.ranks: {chosen.trainer.ranks} do not divide among --nodes {nodes}")
    if "RANK" not in os.environ and chosen.trainer.ranks > 1:
        from services.launch.ranks import launch, place
        from services.status import serving_status  # rank 0 has its own

        here = place(nodes, node_rank, leader)
        options = ["--resume"] if resume else []
        options += ["--resume-from", str(resume_from)] if resume_from else []
        argv = [*RLIF, "train", str(recipe_path), *options, "--", *(overrides or [])]
        states = {"ranks": "waiting for the other nodes"}
        port = chosen.tracking.metrics_port
        with serving_status("trainer", port, lambda: states) if port and node_rank else nullcontext():
            code = launch(argv, chosen.trainer.ranks // nodes, here, states)
        raise typer.Exit(code)
    from trainer.train import main

    url = recipe.redis_url(chosen)
    assert url
    raise typer.Exit(main(chosen, url, resume, resume_from))


BestOption = Annotated[bool, typer.Option("--best", help="The checkpoint that evaluation found to be the best.")]


def export(
    run: Annotated[Path, typer.Argument(help="The run's folder.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    best: BestOption = False,
) -> None:
    """Write the run's newest weights as a Hugging Face model folder that transformers and vLLM load."""
    logs.configure("WARNING")
    from trainer.export import export as export_run

    version = export_run(run, out, best)
    Console().print(f"{out}: version {version} of {run}", highlight=False)


def push_to_hub(
    run: Annotated[Path, typer.Argument(help="The run's folder.")],
    repository: Annotated[str, typer.Argument(help="The model's name on the hub: OWNER/NAME.")],
    private: Annotated[bool, typer.Option("--private", help="Only you see it, where it is made anew.")] = False,
    best: BestOption = False,
) -> None:
    """Export the run's newest weights, with a model card, to the Hugging Face hub. HF_TOKEN has the token."""
    logs.configure("WARNING")
    from trainer.export import push

    Console().print(push(run, repository, private, best), highlight=False)
