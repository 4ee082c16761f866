"""A run's folder: nothing of the user's is removed, and no secret goes where others may write."""

import os
import stat
from pathlib import Path

import pytest

from services import recipe as recipes
from services.launch import credentials
from services.launch.board import Board
from services.recipe import RecipeError
from services.run_folder import clear_untrained, prepare
from services.startup import StartupError

TREE = {
    "run": {"name": "r"},
    "model": {"path": "some/model"},
    "data": {"path": "data.jsonl", "fields": {"prompt": "p"}},
    "rewards": "intuitor",
    "trainer": {"steps": 1, "groups_per_step": 1},
}


def made(run_dir: Path, *overrides: str) -> recipes.Recipe:
    return recipes.parse(TREE, [f"run.dir={run_dir}", *overrides])


def test_a_start_that_came_to_nothing_is_cleared(tmp_path):
    recipe = made(tmp_path / "run")
    prepare(recipe, resume=False)
    for name in ("redis", "weights", "notes"):
        (tmp_path / "run" / name).mkdir()
    (tmp_path / "run" / "recipe.yaml").touch()
    prepare(recipe, resume=False)
    clear_untrained(tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".rlif", "recipe.yaml", "notes"}


@pytest.mark.parametrize("name", ["recipe.yaml", "model", "weights", "logs", "redis"])
def test_the_users_own_folders_stay(tmp_path, name):
    """A folder with a recipe of the user's, and the model beside it."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "precious").touch()
    (tmp_path / "recipe.yaml").touch()
    (tmp_path / name).mkdir() if name not in ("recipe.yaml", "model") else None
    with pytest.raises(StartupError, match="is not of a run that rlif prepared"):
        prepare(made(tmp_path), resume=False)
    clear_untrained(tmp_path)
    assert (tmp_path / "model" / "precious").exists()


@pytest.mark.parametrize("key", ["model.path", "data.path", "evaluation.data.path"])
def test_model_and_data_do_not_lie_where_the_run_writes(tmp_path, key):
    (tmp_path / "run" / "model").mkdir(parents=True)
    inside = tmp_path / "run" / "model"
    held_out = "evaluation={data: {path: elsewhere, fields: {prompt: p}}, every: 10, rewards: exact_match}"
    with pytest.raises(StartupError, match=f"{key}: .* where the run writes"):
        prepare(made(tmp_path / "run", held_out, f"{key}={inside}"), resume=False)


def test_a_new_folder_is_this_users_alone(tmp_path):
    prepare(made(tmp_path / "run"), resume=False)
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o700


def writable(run_dir: Path) -> None:
    run_dir.chmod(0o775)


def foreign(run_dir: Path) -> None:
    os.chown(run_dir, 12345, 12345)


def linked(run_dir: Path) -> None:
    elsewhere = run_dir.with_name("elsewhere")
    elsewhere.mkdir()
    (run_dir / "cluster").symlink_to(elsewhere)


@pytest.mark.parametrize(
    ("spoil", "said"), [(writable, "chmod go-w"), (foreign, "belongs to another user"), (linked, "is a link")]
)
def test_no_credentials_go_where_others_may_write(tmp_path, spoil, said):
    if spoil is foreign and os.getuid() != 0:
        pytest.skip("only root can give a folder away")
    run_dir = tmp_path / "run"
    run_dir.mkdir(mode=0o700)
    spoil(run_dir)
    with pytest.raises(StartupError, match=said):
        credentials.write(run_dir)
    assert not list(tmp_path.rglob("credentials.json"))


def test_a_board_that_others_may_read_is_closed(tmp_path):
    (tmp_path / "cluster").mkdir(mode=0o755)
    board = Board(tmp_path, "a")
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in (board.folder, board.folder.parent)} == {0o700}


@pytest.mark.parametrize("key", ["run.dir", "weights.dir", "model.path", "data.path"])
@pytest.mark.parametrize("mark", ["\n", '"', "'", "\\", "\x1b"])
def test_what_would_escape_a_script_or_redis_conf_is_refused(tmp_path, key, mark):
    section, name = key.split(".")
    tree = {**TREE, "run": {"name": "r", "dir": str(tmp_path)}}
    tree[section] = {**tree.get(section, {}), name: f"/data/a{mark}loadmodule evil"}
    with pytest.raises(RecipeError, match=f"{key}: .* cannot be in a path"):
        recipes.parse(tree)
