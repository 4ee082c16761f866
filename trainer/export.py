"""A run's weights as a Hugging Face model folder, from the run's files alone."""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from services import recipe as recipes
from services.contract import Version, WeightVersion
from services.recipe import Model, RecipeError
from services.weights import disk
from trainer import checkpoint, pieces
from trainer import policy as policies

FOLDER = re.compile(r"^(\d+)-(\d+)$")


def export(run_dir: Path, out_dir: Path) -> Version:
    """Write the newest weights of the run in `run_dir` to the new folder `out_dir`, and return their version.

    Takes the newest published version, or the newest checkpoint where that is newer or what was published is damaged.
    Raises RecipeError: no weights there, or `out_dir` is not empty.
    """
    run_dir, out_dir = Path(run_dir), Path(out_dir)
    if out_dir.exists() and any(out_dir.iterdir()):
        raise RecipeError(f"{out_dir} is not empty; choose a new folder")
    published = _newest(_weights_dir(run_dir), lambda path: (path / "manifest.json").exists() and _sound(path))
    saved = _newest(run_dir / "checkpoints", checkpoint.sound)
    if published is None and saved is None:
        raise RecipeError(f"{run_dir} holds neither published weights nor a checkpoint")
    aside = out_dir.with_name(f".{out_dir.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    if saved is None or (published is not None and published[0] >= saved[0]):
        assert published is not None
        version, folder = published
        shutil.copytree(folder, aside, ignore=shutil.ignore_patterns("manifest.json"))
    else:
        version, folder = saved
        aside.mkdir(parents=True)
        manifest = disk.write_tensors(aside, _tensors(folder))
        disk.copy_config(run_dir / "model", aside, manifest)
    if out_dir.exists():
        out_dir.rmdir()
    aside.rename(out_dir)
    return version


def _weights_dir(run_dir: Path) -> Path:
    """Where the recipe put the weights, when the run's folder has the recipe."""
    path = run_dir / "recipe.yaml"
    return recipes.load(path).weights_dir if path.exists() else run_dir / "weights"


def _newest(directory: Path, sound: Callable[[Path], bool]) -> tuple[Version, Path] | None:
    found = []
    for path in directory.iterdir() if directory.is_dir() else []:
        if match := FOLDER.match(path.name):
            found.append((Version(lineage=int(match[1]), version=int(match[2])), path))
    return next((item for item in sorted(found, reverse=True) if sound(item[1])), None)


def _sound(folder: Path) -> bool:
    try:
        weights = WeightVersion.model_validate_json((folder / "manifest.json").read_bytes())
        disk.verify(folder, weights.manifest)
    except (OSError, ValueError):
        return False
    return True


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The policy's weights out of a checkpoint, under their Hugging Face names, in the model's dtype."""
    saved, about = pieces.Pieces(checkpoint.rank_folders(folder)), checkpoint.state(folder)
    dtype = getattr(torch, about["identity"]["model.dtype"])
    if (adapters := about["identity"].get("model.lora")) is not None:
        # A checkpoint holds what is trained: the adapters. They are put into the model that they stand on.
        model = Model(path=about["identity"]["model.path"], dtype=about["identity"]["model.dtype"], lora=adapters)
        whole = policies.load(model)
        parameters = dict(whole.named_parameters())
        for name, shape in about["shapes"].items():
            parameters[name].data.copy_(saved.whole(name, shape))
        yield from policies.tensors(whole, partitioned=False, adapters=model.lora)
        return
    for name, shape in about["shapes"].items():
        yield name.removeprefix("model."), saved.whole(name, shape).to(dtype)
    for name in saved.names(pieces.BUFFER):
        yield name.removeprefix("model."), saved.one(pieces.BUFFER, name)
