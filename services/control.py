"""Control arms: a recipe whose reward is replaced by one that a gain must not come from."""

from collections.abc import Sequence
from typing import Literal, get_args

from services import recipe as recipes
from services.recipe import Recipe
from services.spec import RewardSpec, RewardTerm

Control = Literal["random", "format", "inverted"]
CONTROLS: tuple[Control, ...] = get_args(Control)
KEY = "control"
"""Key of the replacing term in `components`."""
FOLDERS = (("run", "dir"), ("weights", "dir"))


def with_control(recipe: Recipe, control: Control, spec: RewardSpec, overrides: Sequence[str] | None = None) -> Recipe:
    """The recipe as a control arm of itself. Only the reward changes, and the run's name and folders, which get the
    arm's name as suffix: the name always, since two runs of one name would share their keys in redis; a folder unless
    one of the `overrides` that the recipe was loaded with gives it. `spec` is the recipe's reward written out: its
    terms stay, measured and not trained on; `inverted` trains on them with the opposite sign instead.

    Raises RecipeError.
    """
    if control == "inverted":
        terms = [term.model_copy(update={"weight": -term.weight}) for term in spec.rewards]
    else:
        params = {"seed": recipe.run.seed} if control == "random" else {}
        measured = [term.model_copy(update={"weight": 0.0, "schedule": None}) for term in spec.rewards]
        terms = [RewardTerm(name=control, label=KEY, params=params), *measured]
    tree = recipe.model_dump(mode="json")
    given = recipes.tree_of(overrides or [])
    tree["run"]["name"] = f"{recipe.run.name}-{control}"
    for section, key in FOLDERS:
        if tree[section][key] is not None and key not in (given.get(section) or {}):
            tree[section][key] = f"{tree[section][key]}-{control}"
    tree["rewards"] = [term.model_dump(mode="json") for term in terms]
    tree["combine"] = spec.combine.model_dump(mode="json")
    return recipes.parse(tree)
