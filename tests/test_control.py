"""Control arms: only the reward changes, and where the run lies."""

import re

import pytest
from typer.testing import CliRunner

from services import recipe
from services.cli import recipes
from services.cli.main import app
from services.control import CONTROLS, with_control
from services.recipe import RecipeError
from services.startup import StartupError

TREE = {
    "run": {"name": "math", "dir": "runs/math", "seed": 7},
    "model": {"path": "m"},
    "data": {"path": "d.jsonl", "fields": {"prompt": "p"}},
    "rewards": [{"name": "self_certainty", "weight": 0.5}, {"name": "exact_match", "weight": 1.0, "gate": None}],
    "combine": {"normalize": "rank"},
    "trainer": {"steps": 1, "groups_per_step": 1},
    "weights": {"dir": "/shared/weights"},
}


@pytest.mark.parametrize("control", CONTROLS)
def test_only_the_reward_and_the_place_change(control):
    chosen = recipe.parse(TREE)
    arm = with_control(chosen, control, chosen.spec)
    assert (arm.run.name, str(arm.run.dir), str(arm.weights.dir)) == (
        f"math-{control}", f"runs/math-{control}", f"/shared/weights-{control}",
    )  # fmt: skip
    same = {"run": chosen.run, "rewards": chosen.rewards, "weights": chosen.weights}
    assert arm.model_copy(update=same) == chosen
    weights = {term.key: term.weight for term in arm.spec.rewards}
    if control == "inverted":
        assert weights == {"self_certainty": -0.5, "exact_match": -1.0}
    else:
        assert weights == {"control": 1.0, "self_certainty": 0.0, "exact_match": 0.0}
        assert arm.spec.rewards[0].params == ({"seed": 7} if control == "random" else {})
    recipes.check_rewards(arm)


@pytest.mark.parametrize(
    ("overrides", "name", "folder", "weights"),
    [
        ([], "math-random", "runs/math-random", "/shared/weights-random"),
        (["run.dir=/mine"], "math-random", "/mine", "/shared/weights-random"),
        (["run={name: x, dir: /mine}", "weights.dir=/w"], "x-random", "/mine", "/w"),
        (["run.name=math"], "math-random", "runs/math-random", "/shared/weights-random"),
        (["weights.dir=null"], "math-random", "runs/math-random", "None"),
    ],
)
def test_a_folder_that_is_given_stays_and_the_name_never_does(tmp_path, overrides, name, folder, weights):
    path = tmp_path / "r.yaml"
    path.write_text(recipe.yaml.safe_dump(TREE))
    arm = recipes.load_arm(path, overrides, "random")
    assert (arm.run.name, str(arm.run.dir), str(arm.weights.dir)) == (name, folder, weights)
    assert arm.spec.rewards[0].name == "random"


def test_a_preset_is_written_out(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(recipe.yaml.safe_dump({**{k: v for k, v in TREE.items() if k != "combine"}, "rewards": "intuitor"}))
    shown = CliRunner().invoke(app, ["recipe", "show", str(path), "--control", "inverted"])
    assert shown.exit_code == 0
    arm = recipe.parse(recipe.yaml.safe_load(shown.stdout))
    assert [(term.name, term.weight) for term in arm.spec.rewards] == [("self_certainty", -1.0)]
    with pytest.raises(StartupError, match=re.escape("--control placebo: choose random, format or inverted")):
        recipes.load_arm(path, None, "placebo")
    path.write_text(recipe.yaml.safe_dump({**{k: v for k, v in TREE.items() if k != "combine"}, "rewards": "nothing"}))
    with pytest.raises(RecipeError, match="rewards: there is no spec 'nothing'"):
        recipes.load_arm(path, None, "random")
