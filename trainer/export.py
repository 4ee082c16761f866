"""A run's weights as a Hugging Face model folder, from the run's files alone."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from services import recipe as recipes
from services.contract import Version, WeightVersion
from services.recipe import RecipeError
from services.weights import disk
from services.weights.mirror import whole
from trainer import checkpoint

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
        with whole(_manifest(folder)) as model:
            shutil.copytree(model, aside, ignore=shutil.ignore_patterns("manifest.json"))
    else:
        version, folder = saved
        aside.mkdir(parents=True)
        manifest = disk.write_tensors(aside, _tensors(folder).items())
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


def _manifest(folder: Path) -> WeightVersion:
    weights = WeightVersion.model_validate_json((folder / "manifest.json").read_bytes())
    return weights.model_copy(update={"location": str(folder)})  # the run may have been moved


def _sound(folder: Path) -> bool:
    try:
        with whole(_manifest(folder)):
            return True
    except (OSError, ValueError):
        return False


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The policy's weights out of a DeepSpeed checkpoint of any ZeRO stage and number of ranks, in the model's dtype.

    Of tied weights, one name is kept.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    state = checkpoint.state(folder)
    dtype = getattr(torch, state["identity"]["model.dtype"])
    if state["identity"]["trainer.zero_stage"] == 0:
        # Our own file, verified by its checksum.
        path = folder / checkpoint.TAG / "mp_rank_00_model_states.pt"
        whole = torch.load(path, map_location="cpu", weights_only=False)["module"]
    else:
        whole = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=checkpoint.TAG)
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in whole.items():
        if tensor.data_ptr() not in seen or tensor.numel() == 0:
            seen.add(tensor.data_ptr())
            tensors[name.removeprefix("model.")] = tensor
    return {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor.clone() for name, tensor in tensors.items()
    }
