"""Checkpoints of everything a run needs to go on: DeepSpeed's state, the run's progress, random states.

`<run>/checkpoints/<lineage>-<step>/` holds DeepSpeed's files, `rng-<rank>.safetensors` and `state.json`, which lists
the size and checksum of every other file. A checkpoint is written aside, synced, and renamed: a folder with a proper
name is whole, unless its disk spoilt it, which the checksums tell.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import load_file, save_file

from services.recipe import Recipe, RecipeError
from trainer.ranks import Ranks
from trainer.reference import Reference

log = logging.getLogger(__name__)

TAG = "engine"
STATE = "state.json"
LATEST = "latest"


@dataclass
class Progress:
    """Where a run stands: `step` optimizer steps are done. `unacknowledged` are the queue entries that were trained
    since the last checkpoint: acknowledged as soon as one that holds their effect is durable."""

    step: int = 0
    lineage: int = 0
    unacknowledged: list[str] = field(default_factory=list)


def identity(recipe: Recipe) -> dict[str, Any]:
    """What must not differ between the run that wrote a checkpoint and the one that goes on from it."""
    return {
        "run.name": recipe.run.name,
        "model.path": recipe.model.path,
        "model.dtype": recipe.model.dtype,
        "model.lora": None if recipe.model.lora is None else recipe.model.lora.model_dump(),
        "trainer.ranks": recipe.trainer.ranks,
        "trainer.zero_stage": recipe.trainer.zero_stage,
    }


def save(
    engine: Any,
    directory: Path,
    progress: Progress,
    recipe: Recipe,
    ranks: Ranks,
    reference: Reference | None = None,
) -> Path:
    """Called by every rank; when it returns, the checkpoint is durable and older ones than `keep` are gone."""
    target = directory / f"{progress.lineage}-{progress.step}"
    aside = directory / f".{target.name}.tmp"
    if ranks.first:
        for leftover in directory.glob(".*.tmp"):
            shutil.rmtree(leftover)
        aside.mkdir(parents=True)
    ranks.barrier()
    engine.save_checkpoint(str(aside), tag=TAG, save_latest=False)
    save_file(_random_state(ranks), aside / f"rng-{ranks.rank}.safetensors")
    if ranks.first and reference is not None:
        reference.save(aside)
    ranks.barrier()
    if ranks.first:
        files = {str(path.relative_to(aside)): _fingerprint(path) for path in _files(aside)}
        contents = {
            "step": progress.step,
            "lineage": progress.lineage,
            "unacknowledged": progress.unacknowledged,
            "identity": identity(recipe),
            "files": files,
        }
        (aside / STATE).write_text(json.dumps(contents))
        for path in [*_files(aside), *(path for path in aside.rglob("*") if path.is_dir()), aside]:
            _sync(path)
        if target.exists():
            # Left by a trainer of this lineage that redis has forgotten; what is being saved is at least as new.
            shutil.rmtree(target)
        aside.rename(target)
        _sync(directory)
        _point(directory, target.name)
        for old in _named(directory)[recipe.trainer.checkpoints.keep :]:
            shutil.rmtree(old)
    ranks.barrier()
    return target


def newest(directory: Path, recipe: Recipe) -> tuple[Path, Progress] | None:
    """The newest whole checkpoint, verified; none when there is none. For rank 0.

    One that is damaged is passed over, with the reason in the log. Raises RecipeError when the checkpoint belongs to
    another run, model, or number of ranks.
    """
    for path in _named(directory):
        if not sound(path):
            continue
        found = state(path)
        for key, here in identity(recipe).items():
            if (there := found["identity"].get(key)) != here:
                raise RecipeError(f"{key}: {here!r}, but checkpoint {path} is of {there!r}")
        return path, Progress(found["step"], found["lineage"], found["unacknowledged"])
    return None


def sound(path: Path) -> bool:
    """Whether every byte of a checkpoint is what was written; the log says what is not."""
    try:
        for name, (size, checksum) in state(path)["files"].items():
            found = _fingerprint(path / name)
            if found != (size, checksum):
                raise ValueError(f"{name} has {found[0]} bytes with checksum {found[1]}, not {size} with {checksum}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.error("checkpoint %s is damaged and passed over: %s", path, error)
        return False
    return True


def state(path: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint."""
    return json.loads((path / STATE).read_text())


def load(engine: Any, path: Path, ranks: Ranks) -> None:
    """Called by every rank: puts engine and random states back to where they were."""
    loaded, _ = engine.load_checkpoint(str(path), tag=TAG)
    if loaded is None:
        raise RuntimeError(f"DeepSpeed found nothing to load in {path / TAG}")
    random = load_file(path / f"rng-{ranks.rank}.safetensors")
    torch.set_rng_state(random["cpu"])
    if "cuda" in random and ranks.device.type == "cuda":
        torch.cuda.set_rng_state(random["cuda"], ranks.device)


def _random_state(ranks: Ranks) -> dict[str, torch.Tensor]:
    random = {"cpu": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state(ranks.device)
    return random


def _named(directory: Path) -> list[Path]:
    """Checkpoint folders, newest first: by lineage, then by step."""
    found = []
    for path in directory.iterdir() if directory.is_dir() else []:
        lineage, _, step = path.name.partition("-")
        if path.is_dir() and lineage.isdigit() and step.isdigit():
            found.append((int(lineage), int(step), path))
    return [path for _, _, path in sorted(found, reverse=True)]


def _files(directory: Path) -> Iterator[Path]:
    return (path for path in sorted(directory.rglob("*")) if path.is_file())


def _fingerprint(path: Path) -> tuple[int, str]:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return path.stat().st_size, digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _point(directory: Path, name: str) -> None:
    aside = directory / f".{LATEST}"
    aside.write_text(name)
    _sync(aside)
    aside.rename(directory / LATEST)
    _sync(directory)
