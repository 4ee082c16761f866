"""Checkpoints of everything a run needs to go on: weights, optimizer and random states, the run's progress.

`<run>/checkpoints/<lineage>-<step>/` holds `state.json` and, for each rank that wrote it, a folder of safetensors
(`rank-0`, ...) with a `tensors.json` that has every tensor's file and checksum. A tensor is `kind/start/parameter`: the
elements from `start` on of the flattened parameter, of one kind (trainer.fragments), so that any number of ranks and
any ZeRO stage reads it. A checkpoint is written aside, synced, and renamed: a folder with a proper name is whole,
unless its disk spoilt it, which the checksums tell. `latest` and `best` are files that name one.
"""

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from services.recipe import Recipe, RecipeError
from services.weights.disk import sync
from trainer import fragments, pieces
from trainer.ranks import Ranks
from trainer.reference import Reference

log = logging.getLogger(__name__)

FORMAT = 2
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
        "model.lora": None if recipe.model.lora is None else recipe.model.lora.model_dump(),
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
    pieces.write(aside / f"rank-{ranks.rank}", _tensors(engine, ranks, reference))
    ranks.barrier()
    if ranks.first:
        contents = {
            "format": FORMAT,
            "ranks": ranks.size,
            "shapes": fragments.shapes(engine),
            "step": progress.step,
            "lineage": progress.lineage,
            "unacknowledged": progress.unacknowledged,
            "orders": progress.orders,
            "kl_beta": progress.kl_beta,
            "rate": progress.rate,
            "identity": identity(recipe),
            "files": {path.name: _fingerprint(path) for path in sorted(aside.iterdir()) if path.is_file()},
        }
        (aside / STATE).write_text(json.dumps(contents))
        for path in [*(path for path in aside.iterdir() if path.is_file()), aside]:
            sync(path)
        if target.exists():
            # Left by a trainer of this lineage that redis has forgotten; what is being saved is at least as new.
            shutil.rmtree(target)
        aside.rename(target)
        sync(directory)
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
    another run or model, or is of a format that is not read here.
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
    path = best_folder(directory)
    return (path, _progress(path, recipe)) if path is not None else None


def best_folder(directory: Path) -> Path | None:
    """`best`, of whatever run and model. Raises RecipeError: it is of a format that is not read here."""
    name = _pointed(directory, BEST)
    path = next((path for path in _named(directory) if path.name == name), None)
    return path if path is not None and sound(path) else None


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
    """Whether every byte of a checkpoint is what was written; the log says what is not. Raises RecipeError: it is of a
    format that is not read here."""
    try:
        saved = state(path)
        if saved.get("format") != FORMAT:
            raise RecipeError(f"checkpoint {path} is of format {saved.get('format', 1)}; this version reads {FORMAT}")
        for folder in rank_folders(path):
            pieces.verify(folder)
        for name, (size, checksum) in saved["files"].items():
            found = _fingerprint(path / name)
            if found != (size, checksum):
                raise ValueError(f"{name} has {found[0]} bytes with checksum {found[1]}, not {size} with {checksum}")
    except RecipeError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.error("checkpoint %s is damaged and passed over: %s", path, error)
        return False
    return True


def state(path: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint."""
    return json.loads((path / STATE).read_text())


def rank_folders(path: Path) -> list[Path]:
    return [path / f"rank-{rank}" for rank in range(state(path)["ranks"])]


def load(engine: Any, path: Path, ranks: Ranks) -> None:
    """Called by every rank: puts engine and random states back to where they were, also those of a run that goes on.

    Ranks that were not there when it was saved keep their random states.
    """
    saved = pieces.Pieces(rank_folders(path))
    fragments.restore(engine, saved.of)
    with torch.no_grad():
        for name, buffer in pieces.buffers(engine.module).items():
            buffer.copy_(saved.one(pieces.BUFFER, name))
    random = set(saved.names("random"))
    if f"{ranks.rank}.cpu" in random:
        torch.set_rng_state(saved.one("random", f"{ranks.rank}.cpu"))
    if f"{ranks.rank}.cuda" in random and ranks.device.type == "cuda":
        torch.cuda.set_rng_state(saved.one("random", f"{ranks.rank}.cuda"), ranks.device)


def _tensors(engine: Any, ranks: Ranks, reference: Reference | None) -> Iterator[tuple[str, int, str, Tensor]]:
    """What this rank writes."""
    for fragment in fragments.owned(engine, ranks.rank, ranks.size):
        for kind, tensor in fragments.states(engine, fragment):
            yield kind, fragment.start, fragment.name, tensor
    if ranks.first:
        for name, buffer in pieces.buffers(engine.module).items():
            yield pieces.BUFFER, 0, name, buffer
    if reference is not None:
        yield from reference.parts(ranks)
    yield "random", 0, f"{ranks.rank}.cpu", torch.get_rng_state()
    if ranks.device.type == "cuda":
        yield "random", 0, f"{ranks.rank}.cuda", torch.cuda.get_rng_state(ranks.device)


def _named(directory: Path) -> list[Path]:
    """Checkpoint folders, newest first: by lineage, then by step."""
    found = []
    for path in directory.iterdir() if directory.is_dir() else []:
        lineage, _, step = path.name.partition("-")
        if path.is_dir() and lineage.isdigit() and step.isdigit():
            found.append((int(lineage), int(step), path))
    return [path for _, _, path in sorted(found, reverse=True)]


def _fingerprint(path: Path) -> tuple[int, str]:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return path.stat().st_size, digest.hexdigest()


def _point(directory: Path, pointer: str, name: str) -> None:
    aside = directory / f".{pointer}"
    aside.write_text(name)
    sync(aside)
    aside.rename(directory / pointer)
    sync(directory)


def _pointed(directory: Path, pointer: str) -> str:
    """The name that a pointer file holds; empty without one."""
    try:
        return (directory / pointer).read_text()
    except FileNotFoundError:
        return ""
