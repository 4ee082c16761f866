"""`rlif up`, `rlif orchestrate`, `rlif train`, `rlif export`: a run, or one part of it."""

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from services import logs, recipe
from services.cli.recipes import check_rewards, doubts
from services.cli.watch import watch
from services.http import StartupError
from services.supervisor import die_with_parent

log = logging.getLogger(__name__)

RecipePath = Annotated[Path, typer.Argument(help="The recipe (YAML).")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides: key.sub=value")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint of the run.")]


def run_recipe(chosen: recipe.Recipe, resume: bool, console: Console) -> int:
    """All processes of the recipe on this machine until training is done. Returns an exit code."""
    from services.cli.launch import only_one, plan, prepare_run_dir
    from services.cli.progress import Progress
    from services.supervisor import supervise

    prepare_run_dir(chosen, resume)
    with only_one(chosen.run.dir):
        services, filled = plan(chosen, resume)
        run_dir = filled.run.dir
        console.print(f"run {filled.run.name} in {run_dir} (logs in {run_dir / 'logs'})", highlight=False)
        with Progress(run_dir, filled.trainer.steps, console) as progress:
            return supervise(services, "trainer", run_dir / "logs", progress)


def up(recipe_path: RecipePath, overrides: Overrides = None, resume: Resume = False) -> None:
    """Run a whole recipe on this machine: redis, servers, orchestrator, trainer, supervised. Ctrl-C stops it."""
    logs.configure("WARNING")
    logging.getLogger("services.supervisor").setLevel(logging.INFO)
    chosen = recipe.load(recipe_path, overrides)
    check_rewards(chosen)
    for line in doubts(chosen):
        log.warning(line)
    raise typer.Exit(run_recipe(chosen, resume, Console()))


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
) -> None:
    """Run the orchestrator alone: tasks to rollouts to rewards to the queue."""
    watch("orchestrator")
    chosen = recipe.load(recipe_path, overrides)
    _addresses(chosen, "queue.url", "rollout.urls", "scorer.urls")
    from services.orchestrator.run import main

    url = recipe.redis_url(chosen)
    assert url
    raise typer.Exit(main(chosen, chosen.rollout.urls, chosen.scorer.urls, url, stay))


def train(recipe_path: RecipePath, overrides: Overrides = None, resume: Resume = False) -> None:
    """Run the trainer alone, in one process or as one rank under torchrun."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        die_with_parent()  # a torchrun that was killed leaves its ranks behind
    watch("trainer")
    chosen = recipe.load(recipe_path, overrides)
    _addresses(chosen, "queue.url")
    from trainer.train import main

    url = recipe.redis_url(chosen)
    assert url
    raise typer.Exit(main(chosen, url, resume))


def export(
    run: Annotated[Path, typer.Argument(help="The run's folder.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
) -> None:
    """Write the run's newest weights as a Hugging Face model folder that transformers and vLLM load."""
    logs.configure("WARNING")
    from trainer.export import export as export_run

    version = export_run(run, out)
    Console().print(f"{out}: version {version} of {run}", highlight=False)
