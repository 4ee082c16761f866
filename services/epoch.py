"""A recipe's batch arithmetic: completions a step, rows an epoch, steps that one epoch makes."""

from services.recipe import Recipe, RecipeError

PUBLISHED_STEPS = {(7500, 128): 58, (7500, 64): 117}
"""Steps of one epoch of MATH by rows and problems a step, in the table of hyperparameters of arXiv 2505.19590."""


def facts(recipe: Recipe, rows: int) -> dict[str, int | float]:
    """What `rows` and the steps amount to; `published_steps_per_epoch` where the paper has the same batches."""
    each = recipe.trainer.groups_per_step
    found = {
        "rows": rows,
        "steps_per_epoch": rows // each,
        "rows_left_over": rows % each,
        "epochs": round(recipe.trainer.steps * each / rows, 2),
    }
    published = PUBLISHED_STEPS.get((rows, each))
    return found if published is None else {**found, "published_steps_per_epoch": published}


def check_completions(recipe: Recipe, completions: int | None) -> None:
    """`completions` of a step as other trainers count them, devices x batch x accumulation. Raises RecipeError when
    they are not whole groups, or not as many as the recipe's; or when some ranks have no completion at all."""
    trainer, size = recipe.trainer, recipe.rollout.group_size
    own = trainer.groups_per_step * size
    if own < trainer.ranks:
        raise RecipeError(f"trainer.ranks: {trainer.ranks}, but a step has {own} completions; at most {own} have any")
    if completions is None:
        return
    groups, rest = divmod(completions, size)
    if rest:
        raise RecipeError(
            f"--completions {completions}: are no whole groups of rollout.group_size {size}: {groups} groups make "
            f"{groups * size}, {groups + 1} make {(groups + 1) * size}"
        )
    if groups != trainer.groups_per_step:
        raise RecipeError(
            f"--completions {completions}: are {groups} groups of {size}, and trainer.groups_per_step is "
            f"{trainer.groups_per_step}; set trainer.groups_per_step={groups}"
        )
