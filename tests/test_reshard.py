"""Checkpoints between numbers of ranks and ZeRO stages: 2 ranks wrote, 1 reads and writes, 2 read again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks_command import command
from safetensors.torch import load_file

from services import recipe
from services.recipe import RecipeError
from trainer import checkpoint, pieces

pytestmark = pytest.mark.slow
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
RANKS = (2, 1, 2)
STEPS = 3
CASES = {
    "0-2-3": {"stages": (0, 2, 3)},
    "1-0-1": {"stages": (1, 0, 1)},
    "2-3-0": {"stages": (2, 3, 0)},
    "3-2-2": {"stages": (3, 2, 2)},
    "bfloat16 2-3-1": {"stages": (2, 3, 1), "dtype": "bfloat16"},
}
"""The ZeRO stage under each of RANKS."""


def make_recipe(ranks: int, stage: int, dtype: str = "float32") -> dict:
    trainer = {"steps": 9, "groups_per_step": 1, "ranks": ranks, "zero_stage": stage, "learning_rate": 1e-2}
    return {
        "run": {"name": "reshard", "dir": "unused"},
        "model": {"path": "toy", "dtype": dtype},
        "data": {"path": "unused.jsonl", "fields": {"prompt": "p"}},
        "rewards": "intuitor",
        "trainer": {**trainer, "weight_decay": 0.1, "device": "cpu", "threads": 1},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reshard")
    for turn, ranks in enumerate(RANKS):
        cases = []
        for name, case in CASES.items():
            own = folder / name
            own.mkdir(exist_ok=True)
            cases.append(
                {
                    "recipe": make_recipe(ranks, case["stages"][turn], case.get("dtype", "float32")),
                    "steps": STEPS,
                    "lineage": turn,
                    "load": str(own / f"{turn - 1}-{STEPS}") if turn else None,
                    "checkpoints": str(own),
                    "out": str(own / f"out-{turn}"),
                    "again": str(own / f"again-{turn}"),
                }
            )
        (folder / "cases.json").write_text(json.dumps(cases))
        worker = str(Path(__file__).with_name("reshard_worker.py"))
        argv = command(ranks, worker, str(folder / "cases.json"))
        done = subprocess.run(argv, env=ENVIRONMENT, timeout=120, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert done.returncode == 0, done.stdout.decode()[-8000:]
    return folder


def everything(path: Path) -> dict[str, torch.Tensor]:
    """Weights, moments and step of every parameter, whole; buffers."""
    saved = pieces.Pieces(checkpoint.rank_folders(path))
    found = {f"buffer {name}": saved.one(pieces.BUFFER, name) for name in saved.names(pieces.BUFFER)}
    for name, shape in checkpoint.state(path)["shapes"].items():
        count = int(torch.Size(shape).numel())
        found |= {f"{kind} {name}": saved.read(name, kind, 0, count) for kind in ("master", "exp_avg", "exp_avg_sq")}
        found[f"step {name}"] = saved.one(pieces.STEP, name)
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_state_is_the_same_bits_under_other_ranks_and_stages(folder, name):
    first, *others = (everything(folder / name / f"{turn}-{STEPS}") for turn in range(len(RANKS)))
    assert len(first) == 8 * 4 + 1 and first["buffer model.scale"] == 1
    assert float(first["step model.0.weight"]) == STEPS and first["exp_avg model.4.bias"].abs().max() > 0
    for other in others:
        assert set(other) == set(first)
        for key in first:
            assert torch.equal(first[key], other[key]), key


@pytest.mark.parametrize("name", CASES)
def test_the_next_update_is_that_of_the_run_that_did_not_change(folder, name):
    first = load_file(folder / name / "out-0")
    before = everything(folder / name / f"0-{STEPS}")
    for key, weights in first.items():
        moved = (weights.float() - before[f"master {key}"].view(weights.shape)).abs().max()
        assert moved > 1e-3, key
    for turn in (1, 2):
        # The sum over one rank's examples and the mean of two ranks' sums round differently.
        tolerance = 1e-6 if CASES[name].get("dtype") is None else 4e-3
        for key, weights in load_file(folder / name / f"out-{turn}").items():
            assert (weights.float() - first[key].float()).abs().max() < tolerance, (turn, key)


@pytest.mark.parametrize("name", CASES)
def test_an_engine_that_goes_back_trains_the_same_bits(folder, name):
    for turn in range(len(RANKS)):
        out, again = (load_file(folder / name / f"{what}-{turn}") for what in ("out", "again"))
        for key in out:
            assert torch.equal(out[key], again[key]), (turn, key)


def test_what_the_ranks_hold_is_written_once(folder):
    path = folder / "2-3-0" / f"0-{STEPS}"
    held = [sum(entry.shape[0] for entry in pieces.entries(rank) if entry.name.startswith("master/"))
            for rank in checkpoint.rank_folders(path)]  # fmt: skip
    total = sum(int(torch.Size(shape).numel()) for shape in checkpoint.state(path)["shapes"].values())
    assert sum(held) == total and min(held) > 0


def test_a_checkpoint_that_lacks_elements_is_refused_as_damaged(folder, tmp_path, caplog):
    path = folder / "2-3-0" / f"0-{STEPS}"
    saved = pieces.Pieces([path / "rank-0"])
    with pytest.raises(ValueError, match=r"model\..*elements from 0 on are in the checkpoint \(master\)"):
        for name, shape in checkpoint.state(path)["shapes"].items():
            saved.whole(name, shape)
    target = tmp_path / path.name
    target.mkdir()
    (target / "state.json").write_text((path / "state.json").read_text())
    assert not checkpoint.sound(target) and "is damaged" in caplog.text


def test_another_format_is_refused_by_name(tmp_path):
    (tmp_path / "0-3").mkdir()
    (tmp_path / "0-3" / "state.json").write_text('{"step": 3, "files": {}}')
    with pytest.raises(RecipeError, match="0-3 is of format 1; this version reads 2"):
        checkpoint.newest(tmp_path, recipe.parse(make_recipe(1, 0)))
