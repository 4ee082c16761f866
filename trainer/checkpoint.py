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

log = logging.getLogger(__name__)

TAG = "engine"
STATE = "state.json"
LATEST = "latest"
BEST = "best"


@dataclass
class Progress:
    """Where a run stands: `step` optimizer steps are done. `unacknowledged` are the queue entries that were trained
    since the last checkpoint: acknowledged as soon as one that holds their effect is durable."""

    step: int = 0
    lineage: int = 0
    unacknowledged: list[str] = field(default_factory=list)
    orders: int = 0
    """So many of the run's orders (services.commands) are obeyed; what they changed is below."""
    kl_beta: float | None = None
    rate: float = 1.0
    """A factor of the learning rate."""


def identity(recipe: Recipe) -> dict[str, Any]:
    """What must not differ between the run that wrote a checkpoint and the one that goes on from it."""
    return {
        "run.name": recipe.run.name,
        "model.path": recipe.model.path,
        "model.dtype": recipe.model.dtype,
        "trainer.ranks": recipe.trainer.ranks,
        "trainer.zero_stage": recipe.trainer.zero_stage,
    }


def save(engine: Any, directory: Path, progress: Progress, recipe: Recipe, ranks: Ranks) -> Path:
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
    ranks.barrier()
    if ranks.first:
        files = {str(path.relative_to(aside)): _fingerprint(path) for path in _files(aside)}
        contents = {
            "step": progress.step,
            "lineage": progress.lineage,
            "unacknowledged": progress.unacknowledged,
            "orders": progress.orders,
            "kl_beta": progress.kl_beta,
            "rate": progress.rate,
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
        _point(directory, LATEST, target.name)
        spared = _pointed(directory, BEST)
        for old in _named(directory)[recipe.trainer.checkpoints.keep :]:
            if old.name != spared:
                shutil.rmtree(old)
    ranks.barrier()
    return target


def newest(directory: Path, recipe: Recipe) -> tuple[Path, Progress] | None:
    """The newest whole checkpoint, verified; none when there is none. For rank 0.

    One that is damaged is passed over, with the reason in the log. Raises RecipeError when the checkpoint belongs to
    another run, model, or number of ranks.
    """
    for path in _named(directory):
        if sound(path):
            return path, _progress(path, recipe)
    return None


def mark_best(directory: Path, name: str) -> None:
    """Name the best checkpoint so far: it outlives the newest k, until another is named. For rank 0.

    Raises ValueError when there is no checkpoint of that name.
    """
    if name not in {path.name for path in _named(directory)}:
        raise ValueError(f"{directory} has no checkpoint {name!r}")
    _point(directory, BEST, name)


def best(directory: Path, recipe: Recipe) -> tuple[Path, Progress] | None:
    """The checkpoint that `mark_best` named, verified; none when there is none, or it is damaged (the log says how).
    For rank 0. Raises RecipeError as `newest` does.

    Its progress is that of its own time: whoever goes back to it takes a lineage that is newer than every other, and
    saves a checkpoint at once, or the next start would go on from the one that was to be undone.
    """
    name = _pointed(directory, BEST)
    path = next((path for path in _named(directory) if path.name == name), None)
    return (path, _progress(path, recipe)) if path is not None and sound(path) else None


def before(directory: Path, recipe: Recipe, step: int) -> tuple[Path, Progress] | None:
    """Where to go back to from a fault that began at `step`: the best checkpoint, where it is of an earlier step, else
    the newest of an earlier step. It becomes the best. None when there is none. For rank 0."""
    marked = best(directory, recipe)
    if marked is not None and marked[1].step < step:
        return marked
    for path in _named(directory):
        if int(path.name.partition("-")[2]) < step and sound(path):
            mark_best(directory, path.name)
            return path, _progress(path, recipe)
    return None


def name_of(directory: Path, step: int) -> str | None:
    """The newest checkpoint of a step."""
    return next((path.name for path in _named(directory) if path.name.endswith(f"-{step}")), None)


def _progress(path: Path, recipe: Recipe) -> Progress:
    found = state(path)
    for key, here in identity(recipe).items():
        if found["identity"][key] != here:
            raise RecipeError(f"{key}: {here!r}, but checkpoint {path} is of {found['identity'][key]!r}")
    orders = {key: found[key] for key in ("orders", "kl_beta", "rate") if key in found}
    return Progress(found["step"], found["lineage"], found["unacknowledged"], **orders)


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


def _point(directory: Path, pointer: str, name: str) -> None:
    aside = directory / f".{pointer}"
    aside.write_text(name)
    _sync(aside)
    aside.rename(directory / pointer)
    _sync(directory)


def _pointed(directory: Path, pointer: str) -> str:
    """The name that a pointer file holds; empty without one."""
    try:
        return (directory / pointer).read_text()
    except FileNotFoundError:
        return ""
