"""`rlif recipe check` and `rlif recipe show`."""

import json
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from services import epoch, memory, recipe
from services.algorithms import contradiction, cut_sampling
from services.control import CONTROLS, with_control
from services.preparation.known import published_rows
from services.recipe import Recipe, RecipeError
from services.recipe_watching import Evaluation
from services.rows import DataError, is_local
from services.startup import StartupError
from services.tasks import read

app = typer.Typer(no_args_is_help=True, help="Look at a recipe before it runs.")

RecipePath = Annotated[Path, typer.Argument(help="The recipe (YAML).")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides: key.sub=value")]
AsJson = Annotated[bool, typer.Option("--json", help="For machines.")]


def _parts(chosen: Recipe) -> dict[str, Recipe | Evaluation]:
    """What has data and rewards, by what stands before their keys."""
    return {"": chosen} if chosen.evaluation is None else {"": chosen, "evaluation.": chosen.evaluation}


def check_rewards(chosen: Recipe) -> None:
    """Of training and of evaluation. Raises RecipeError when a reward or its parameters are unknown to the reward
    server of this installation, and StartupError when a plug-in of the recipe cannot be used."""
    from reward_server import plugins
    from reward_server.specs import EVERY_PART, SpecError, check_spec, named_spec

    scorer = chosen.scorer
    plugins.install(scorer.plugins)
    parts = {"scorer": True, "sandbox": scorer.sandbox != "none", "reference_model": scorer.reference_model is not None}
    # What somebody else's servers have, they say themselves.
    have = EVERY_PART if scorer.urls else frozenset(part for part, is_there in parts.items() if is_there)
    for section, part in _parts(chosen).items():
        try:
            check_spec(part.spec or named_spec(str(part.rewards)), have)
        except SpecError as error:
            message = str(error)
            where = message if message.startswith("rewards") else f"rewards: {message}"
            raise RecipeError(section + where) from error


REMEDY = "take them out (`rlif data prepare` does of math and code_contests), or keep the reward off them by `sources`"
FATE = {
    "": f"groups are made of them, refused by the reward server and given up, and 11 in a row end the run; {REMEDY}",
    "evaluation.": "they are left out of every evaluation",
}
"""What becomes of rows that lack what a reward needs, by part."""
LACKING = 0.25
"""Share of the rows of training above which a reward that needs what they lack is refused. At that share 11 in a row
are hardly met (0.25 ** 11 is 2e-7)."""


def check_data(chosen: Recipe, held_out: bool = True, absent: bool = False) -> tuple[int | None, list[str]]:
    """How many rows the data of training has, and what is doubtful about any data, a line for each. Files and folders
    here are read as the run reads them; of a data set on the hub the rows are known (else none) as published. Without
    `held_out` only the training data is looked at; with `absent` a file or folder may be missing here.

    Rewards are known to be sound. Raises DataError for what the run could not use, RecipeError when a reward needs what
    no task has, or of training more than `LACKING` have not.
    """
    from reward_server.evaluate import lacking
    from reward_server.specs import named_spec

    rows, doubtful = published_rows(chosen.data), []
    for section, part in _parts(chosen).items():
        if section and not held_out or not is_local(part.data.path):
            continue
        if absent and not Path(part.data.path).exists():
            continue
        try:
            tasks = read(part.data, seed=chosen.run.seed)
        except DataError as error:
            raise DataError(f"{section}{error}" if str(error).startswith("data.") else str(error)) from error
        rows = rows if section else len(tasks)
        spec = part.spec or named_spec(str(part.rewards))
        needs = Counter((found[0].key, found[1]) for task in tasks if (found := lacking(spec, task)) is not None)
        for (key, need), count in needs.items():
            place = need.replace("reference", "fields")
            line = f"{section}rewards: {key!r} needs the {need.replace('.', ' ')}, which"
            if count == len(tasks):
                raise RecipeError(f"{line} no row of {part.data.path!r} has; {section}data.{place} names its column")
            line += f" {count} of {len(tasks)} rows of {part.data.path!r} lack"
            if not section and count > LACKING * len(tasks):
                raise RecipeError(f"{line}, more than a quarter; {REMEDY}")
            doubtful.append(f"{line}: {FATE[section]}")
    return rows, doubtful


ControlArm = Annotated[
    str | None, typer.Option("--control", help=f"A control arm of the recipe: {', '.join(CONTROLS)}.", metavar="ARM")
]


def load_arm(recipe_path: Path, overrides: list[str] | None, control: str | None) -> Recipe:
    """The recipe, or a control arm of it. Raises RecipeError, and StartupError for an arm that there is not."""
    chosen = recipe.load(recipe_path, overrides)
    if control is None:
        return chosen
    if control not in CONTROLS:
        raise StartupError(f"--control {control}: choose {', '.join(CONTROLS[:-1])} or {CONTROLS[-1]}")
    from reward_server.specs import SpecError, named_spec

    try:
        return with_control(chosen, control, chosen.spec or named_spec(str(chosen.rewards)), overrides)
    except SpecError as error:
        raise RecipeError(f"rewards: {error}") from error


def doubts(chosen: Recipe, rows: int | None) -> list[str]:
    """What can run, and is hardly meant: a line for each. `rows`: the data's, where they are known."""
    from reward_server.specs import named_spec

    spec = chosen.spec or named_spec(str(chosen.rewards))
    repeated, each = "", chosen.trainer.groups_per_step
    if rows is not None and rows < each:
        repeated = f"trainer.groups_per_step: {each}, but the data has {rows} rows: a step has tasks more than once"
    doubtful = (contradiction(chosen.trainer.algorithm, spec.combine), cut_sampling(chosen.rollout.sampling), repeated)
    return [line for line in doubtful if line]


def facts(chosen: Recipe) -> dict[str, object]:
    """What the recipe amounts to: sizes worth a look before a long run."""
    trainer, rollout = chosen.trainer, chosen.rollout
    return {
        "run": chosen.run.name,
        "model": chosen.model.path,
        "algorithm": trainer.algorithm,
        "completions_per_step": trainer.groups_per_step * rollout.group_size,
        "prompts_in_all": trainer.steps * trainer.groups_per_step,
        "tokens_per_step_at_most": trainer.groups_per_step
        * rollout.group_size
        * (rollout.sampling.max_tokens + chosen.data.max_prompt_tokens),
        "updates_per_step": trainer.updates,
        "requests_per_step": trainer.groups_per_step // rollout.groups_per_request,
        "max_staleness": chosen.pacing.max_staleness,
        "rewards": chosen.rewards if isinstance(chosen.rewards, str) else [term.key for term in chosen.rewards],
    }


GpuGib = Annotated[
    float | None, typer.Option("--gpu-gib", min=0.1, help="Refuse what a trainer's GPU of this many GiB cannot hold.")
]


def check_memory(chosen: Recipe, gpu_gib: float) -> dict[str, object]:
    """What a rank of the trainer needs, by part, in GiB.

    Raises RecipeError when that is more than `gpu_gib`, naming the settings to change.
    """
    model = memory.shape(chosen.model)
    needed = memory.need(chosen, model)
    limit = int(gpu_gib * memory.GIB)
    if needed.total > limit:
        parts = ", ".join(f"{name} {size / memory.GIB:.1f}" for name, size in needed.parts.items() if size)
        lines = [f"trainer: a rank needs about {needed.total / memory.GIB:.1f} GiB of {gpu_gib:g} ({parts})"]
        tried = memory.remedies(chosen, limit, model)
        lines += [f"  with {override}: {found.total / memory.GIB:.1f} GiB" for override, found in tried]
        if not tried or tried[-1][1].total > limit:
            lines.append("  that is not enough: use more ranks with trainer.zero_stage=3, or a smaller model")
        raise RecipeError("\n".join(lines))
    sizes = {name: round(size / memory.GIB, 2) for name, size in needed.parts.items()}
    return {"trainer_gib_per_rank": {**sizes, "total": round(needed.total / memory.GIB, 2)}}


Rows = Annotated[int | None, typer.Option(min=1, help="Rows of the data, where they are not known here.")]
Completions = Annotated[
    int | None,
    typer.Option(min=1, help="Completions a step as other trainers count them; refused where they are no groups."),
]


@app.command()
def check(
    recipe_path: RecipePath,
    overrides: Overrides = None,
    as_json: AsJson = False,
    gpu_gib: GpuGib = None,
    rows: Rows = None,
    completions: Completions = None,
) -> None:
    """Refuse what cannot run, and say what the recipe amounts to."""
    chosen = recipe.load(recipe_path, overrides)
    check_rewards(chosen)
    epoch.check_completions(chosen, completions)
    known_rows, doubtful = check_data(chosen, absent=rows is not None)
    rows = rows or known_rows
    found, doubtful = facts(chosen), [*doubts(chosen, rows), *doubtful]
    if rows is not None:
        found |= epoch.facts(chosen, rows)
    if gpu_gib is not None:
        found |= check_memory(chosen, gpu_gib)
    if as_json:
        typer.echo(json.dumps({**found, "doubts": doubtful}))
        return
    console = Console()
    console.print(f"[green]ok[/green] {recipe_path}", highlight=False)
    for key, value in found.items():
        if isinstance(value, dict):
            value = ", ".join(f"{part} {size}" for part, size in value.items())
        console.print(f"  {key.replace('_', ' '):<26} {value}", highlight=False)
    for line in doubtful:
        console.print(f"[yellow]doubtful[/yellow] {line}", highlight=False, soft_wrap=True)


@app.command()
def show(
    recipe_path: RecipePath, overrides: Overrides = None, control: ControlArm = None, as_json: AsJson = False
) -> None:
    """The recipe, or a control arm of it, with every default written out: parts that run alone can be started on it."""
    chosen = load_arm(recipe_path, overrides, control)
    typer.echo(json.dumps(chosen.model_dump(mode="json")) if as_json else recipe.dump(chosen), nl=as_json)
