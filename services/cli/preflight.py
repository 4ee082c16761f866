"""`rlif preflight`: would the recipe's reward teach its model what is right? Asked before any training."""

import asyncio
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from services import logs, recipe
from services.cli.launch import environment, share
from services.cli.recipes import check_data, check_rewards
from services.model_folder import check_available, quiet_hub
from services.recipe_sections import Rollout, Scorer
from services.startup import StartupError
from services.supervisor import EXIT_FAILED, EXIT_REFUSED

if TYPE_CHECKING:
    from services.preflight.flight import Plan
    from services.preflight.report import Report

RecipePath = Annotated[Path, typer.Argument(help="The recipe (YAML).")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides: key.sub=value")]

TASKS, SAMPLES = 64, 8
EXIT_STOP = 3
"""The verdict is `stop`: nothing failed, and nothing was wrong with what was asked."""
ANSWER_SECONDS = 10.0
LOADING_SECONDS = 3600.0
"""How long a model may take to load; the first time it is downloaded."""


def _check_answers(kind: str, url: str) -> None:
    """A run's own recipe.yaml names servers that went with the run. Raises StartupError."""
    import httpx

    from services.clients import credentials

    bare, _ = credentials(url)
    try:
        httpx.get(f"{bare}/healthz", timeout=ANSWER_SECONDS)
    except httpx.HTTPError as error:
        key = "rollout.urls" if kind == "rollout" else "scorer.urls"
        fresh = "rollout.urls=[] scorer.urls=[] starts servers of its own"
        raise StartupError(f"{key} {bare}: nobody answers there ({type(error).__name__}); {fresh}") from error


@contextmanager
def _servers(chosen: recipe.Recipe, console: Console) -> Iterator[tuple[str, str]]:
    """(rollout URL, reward URL): the recipe's, or a server of each kind as `rlif up` would start it."""
    from services.cli.child import starting

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rlif-preflight-")))
        path = folder / "recipe.yaml"
        path.write_text(recipe.dump(chosen))

        def start(kind: str, section: Rollout | Scorer) -> Callable[[float], str]:
            if section.urls:
                _check_answers(kind, section.urls[0])
                return lambda _: section.urls[0]
            env = environment(chosen, section.threads, share(section.gpus, 0, section.replicas))
            return stack.enter_context(starting(kind, "--recipe", str(path), "--no-follow", env=env))

        rollout, reward = start("rollout", chosen.rollout), start("reward", chosen.scorer)
        with console.status("waiting for the servers"):
            urls = rollout(LOADING_SECONDS), reward(LOADING_SECONDS)
        yield urls


async def _ask(plan: "Plan", run: str, samples: int, urls: tuple[str, str], console: Console) -> "Report":
    from services.clients import CallError
    from services.orchestrator.servers import Servers
    from services.preflight.flight import fly

    servers = Servers(plan.recipe, [urls[0]], [urls[1]], recipe_changed=True)
    columns = (TextColumn("answering and scoring"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            bar = progress.add_task("tasks", total=plan.count)
            return await fly(plan, run, samples, servers, lambda count: progress.advance(bar, count))
    finally:
        if plan.recipe.scorer.urls:  # somebody else's server should not keep a spec that nobody uses
            try:
                await servers.rewards.routes[0].client.delete_spec(servers.spec_name, deadline_seconds=10)
            except CallError:
                pass
        await servers.close()


def run_preflight(
    chosen: recipe.Recipe, console: Console, tasks: int = TASKS, samples: int = SAMPLES, others: bool = True
) -> "Report":
    """Answer and score the recipe's first `tasks` tasks and judge what came of it; with `others`, under other prompts,
    too. Raises StartupError, RecipeError, CallError."""
    from reward_server.specs import named_spec
    from services.preflight import flight

    check_rewards(chosen)
    check_data(chosen, held_out=False)  # what cannot be read here is refused before the hub is asked for anything
    check_available(chosen.model.path, chosen.model.revision, "model.path")  # sooner than the servers would
    spec = chosen.spec or named_spec(str(chosen.rewards))
    with console.status("reading tasks"):
        plan = flight.plan(chosen, spec, tasks, others)
    with _servers(plan.recipe, console) as urls:
        return asyncio.run(_ask(plan, chosen.run.name, samples, urls, console))


def gate(chosen: recipe.Recipe, console: Console) -> None:
    """A preflight with the recipe's own prompt alone. Raises typer.Exit on a stop sign, which it tells."""
    from services.preflight.tables import show_verdict

    report = _checked(lambda: run_preflight(chosen, console, others=False), console)
    console.print("preflight, before training:", highlight=False)
    show_verdict(report, console)
    if report.verdict.level == "stop":
        reasons = "; ".join(report.verdict.reasons)
        sys.stderr.write(f"rlif: --preflight: do not train on this as it is: {reasons}\n")
        raise typer.Exit(EXIT_STOP)


def _checked(fly: Callable[[], "Report"], console: Console) -> "Report":
    """Raises typer.Exit where a server failed or refused, with a line that says which."""
    from services.clients import CallError, Refused

    try:
        return fly()
    except CallError as error:
        console.print(f"rlif: {error}", style="red", highlight=False, markup=False)
        raise typer.Exit(EXIT_REFUSED if isinstance(error, Refused) else EXIT_FAILED) from error


def preflight(
    recipe_path: RecipePath,
    overrides: Overrides = None,
    prompts: Annotated[int, typer.Option(help="Problems of the recipe's data to answer.", min=1)] = TASKS,
    samples: Annotated[int, typer.Option(help="Completions of each, under each prompt.", min=2, max=1024)] = SAMPLES,
    own_prompt: Annotated[
        bool, typer.Option("--own-prompt", help="Measure the recipe's own prompt alone, which the verdict is on.")
    ] = False,
    rollout_url: Annotated[str | None, typer.Option(help="A running rollout server; else one is started.")] = None,
    reward_url: Annotated[str | None, typer.Option(help="A running reward server; else one is started.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the report there, too (JSON).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Before training: does the recipe's reward prefer right answers, which prompt and reward look best, and is there
    anything to learn? Exit code 3 on a clear sign that training would do harm or come to nothing."""
    from services.preflight.tables import show

    logs.configure("WARNING")
    quiet_hub()
    urls = [f"{key}=[{url}]" for key, url in (("rollout.urls", rollout_url), ("scorer.urls", reward_url)) if url]
    chosen = recipe.load(recipe_path, [*(overrides or []), *urls])
    if out is not None:
        _check_writable(out)
    console = Console(stderr=True)
    report = _checked(lambda: run_preflight(chosen, console, prompts, samples, not own_prompt), console)
    text = report.model_dump_json(indent=2) + "\n"
    if out is not None:
        out.write_text(text)
    if as_json:
        typer.echo(text, nl=False)
    else:
        show(report, Console())
    raise typer.Exit(EXIT_STOP if report.verdict.level == "stop" else 0)


def _check_writable(out: Path) -> None:
    """Before a model is loaded for nothing. Raises StartupError."""
    if out.is_dir():
        raise StartupError(f"--out {out}: is a folder; name a file")
    if not os.access(out if out.exists() else out.parent, os.W_OK):
        raise StartupError(f"--out {out}: cannot be written")
