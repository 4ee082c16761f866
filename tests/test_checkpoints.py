"""Which checkpoints stay, and what a signal in the midst of one does: folders alone, without an engine."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from services import recipe
from services.recipe import RecipeError
from trainer import checkpoint, fragments
from trainer.checkpoint import Progress
from trainer.export import export
from trainer.feed import graceful
from trainer.ranks import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))
WEIGHT = "model.layer.weight"


@pytest.fixture
def run(tmp_path, monkeypatch) -> SimpleNamespace:
    """A run's folder; `save(step)` writes a checkpoint of a model of one weight, which is the step's number."""
    tree = {
        "run": {"name": "kept", "dir": str(tmp_path)},
        "model": {"path": "toy", "dtype": "float32"},
        "data": {"path": "d.jsonl", "fields": {"prompt": "p"}},
        "rewards": "intuitor",
        "trainer": {"steps": 9, "groups_per_step": 1, "checkpoints": {"keep": 2}},
    }
    chosen, folder = recipe.parse(tree), tmp_path / "checkpoints"
    (tmp_path / "recipe.yaml").write_text(recipe.dump(chosen))
    made = SimpleNamespace(recipe=chosen, folder=folder, amid=lambda: None)

    def tensors(engine, ranks, reference):  # noqa: ARG001
        yield fragments.MASTER, 0, WEIGHT, torch.full((2,), float(engine))
        made.amid()

    monkeypatch.setattr(checkpoint, "_tensors", tensors)
    monkeypatch.setattr(fragments, "shapes", lambda engine: {WEIGHT: [2]})
    made.save = lambda step, lineage=0: checkpoint.save(step, folder, Progress(step, lineage), chosen, ALONE)
    made.names = lambda: {path.name for path in folder.iterdir() if path.is_dir()}
    return made


def test_the_best_outlives_the_newest_until_another_is_named(run):
    for step in (1, 2, 3):
        run.save(step)
    checkpoint.mark_best(run.folder, "0-2")
    for step in (4, 5, 6):
        run.save(step)
    assert run.names() == {"0-2", "0-5", "0-6"}
    checkpoint.mark_best(run.folder, "0-6")
    # Of a newer lineage a lower step is newer.
    run.save(3, lineage=1)
    run.save(4, lineage=1)
    assert run.names() == {"0-6", "1-3", "1-4"}
    found = checkpoint.newest(run.folder, run.recipe)
    assert found is not None and (found[1].step, found[1].lineage) == (4, 1)


def test_where_a_roll_back_goes(run):
    for step in (2, 4):
        run.save(step)
    checkpoint.mark_best(run.folder, "0-4")
    there = checkpoint.before(run.folder, run.recipe, 5)
    assert there is not None and there[1].step == 4
    there = checkpoint.before(run.folder, run.recipe, 4)  # the best is of the fault: the newest from before it
    assert there is not None and there[1].step == 2 and checkpoint.best_folder(run.folder) == run.folder / "0-2"
    assert checkpoint.before(run.folder, run.recipe, 2) is None


def test_signals_in_the_midst_of_a_checkpoint_leave_it_whole(run):
    heard: list[int] = []
    feed = SimpleNamespace(stop=lambda number, frame: heard.append(number))
    run.amid = lambda: [os.kill(os.getpid(), number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM)]
    with graceful(feed):
        path = run.save(1)
    assert len(heard) == 3 and checkpoint.sound(path) and run.names() == {"0-1"}


def test_a_disk_that_is_full_costs_the_new_checkpoint_alone(run):
    run.save(1)

    def full() -> None:
        raise OSError(28, "No space left on device")

    run.amid = full
    with pytest.raises(OSError, match="No space"):
        run.save(2)
    run.amid = lambda: None
    found = checkpoint.newest(run.folder, run.recipe)
    assert found is not None and found[1].step == 1
    run.save(2)
    assert run.names() == {"0-1", "0-2"}


def test_the_best_checkpoint_is_exported_where_it_is_asked_for(run, tiny_model, tmp_path):
    (tmp_path / "model").symlink_to(tiny_model)
    run.save(1)
    with pytest.raises(RecipeError, match="has no best checkpoint"):
        export(tmp_path, tmp_path / "nothing", best=True)
    checkpoint.mark_best(run.folder, "0-1")
    for step in (2, 3, 4):
        run.save(step)
    assert str(export(tmp_path, tmp_path / "newest")) == "0.4"
    assert str(export(tmp_path, tmp_path / "b", best=True)) == "0.1"
    assert weight_of(tmp_path / "newest") == 4 and weight_of(tmp_path / "b") == 1
    assert "step 1" in (tmp_path / "b" / "README.md").read_text()
    (victim,) = (run.folder / "0-1").glob("rank-0/*.safetensors")
    os.truncate(victim, 8)
    with pytest.raises(RecipeError, match="or it is damaged"):
        export(tmp_path, tmp_path / "nothing", best=True)


def weight_of(folder: Path) -> float:
    from safetensors.torch import load_file

    return float(load_file(folder / "model.safetensors")[WEIGHT.removeprefix("model.")][0])
