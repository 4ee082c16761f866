"""Where a run begins, goes on, and goes back to: a checkpoint, a model folder, or the recipe's own model."""

import json
import logging
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from services.commands import RollBack
from services.recipe import Recipe, RecipeError
from trainer import checkpoint, export
from trainer.checkpoint import Progress
from trainer.feed import Feed
from trainer.pieces import Pieces
from trainer.ranks import Ranks
from trainer.reference import Reference

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """From `checkpoint`, or from the weights of the folder `model`, or (both empty) from the recipe's model, where
    `progress` says. Its lineage is the last one known of; `trained`: the groups (ids) of its steps, `trained_later`:
    those of the steps after it that this run has made once."""

    checkpoint: str = ""
    model: str = ""
    progress: Progress = field(default_factory=lambda: Progress(lineage=-1))
    trained: list[str] = field(default_factory=list)
    trained_later: list[str] = field(default_factory=list)


def find(recipe: Recipe, resume: bool, resume_from: Path | None, ranks: Ranks) -> Start:
    """Rank 0 looks; every rank gets the same."""
    payload = None
    if ranks.first:
        run_dir = recipe.run.dir
        go_on = resume or resume_from is not None
        found = checkpoint.newest(run_dir / "checkpoints", recipe) if go_on else None
        if found is not None:
            path, progress = found
            start = Start(str(path), "", progress, export.trained_groups(run_dir, progress.step))
        elif resume_from is not None:
            if recipe.model.lora is not None:
                raise RecipeError(
                    f"--resume-from: adapters (model.lora) are added to model.path by every server; to train them on "
                    f"{resume_from}, begin a run of another name with model.path={resume_from}"
                )
            progress = export.begin_from(resume_from, recipe)
            start = Start("", str(resume_from), progress, export.trained_before(resume_from) if progress.step else [])
        else:
            start = Start()
        if go_on:
            start = replace(start, trained_later=export.trained_later(run_dir, start.progress.step))
        payload = json.dumps(asdict(start)).encode()
    tree = json.loads(ranks.broadcast(payload))
    return Start(**{**tree, "progress": Progress(**tree["progress"])})


def restore(
    engine: Any, reference: Reference | None, recipe: Recipe, start: Start, ranks: Ranks, feed: Feed | None
) -> Progress:
    """The state to go on from, in a lineage that no trainer of this run has had."""
    payload = None
    if feed is not None:
        lineage = feed.claim(
            start.progress.lineage + 1, start.progress.unacknowledged, start.trained, start.trained_later
        )
        payload = str(lineage).encode()
    lineage = int(ranks.broadcast(payload))
    if start.checkpoint:
        _load(engine, reference, Path(start.checkpoint), ranks)
    log.info("lineage %d starts from %s", lineage, start.checkpoint or start.model or recipe.model.path)
    progress = replace(start.progress, lineage=lineage, unacknowledged=[])
    if feed is not None:
        feed.note_restored(progress)
    return progress


def roll_back(
    engine: Any,
    reference: Reference | None,
    recipe: Recipe,
    order: RollBack,
    progress: Progress,
    ranks: Ranks,
    feed: Feed | None,
) -> tuple[Progress, str]:
    """A checkpoint from before the fault, in a new lineage, and what came of it in words; what orders changed stays
    changed. Where there is no such checkpoint, the run is as it was."""
    payload = None
    if feed is not None:
        run_dir = recipe.run.dir
        found = checkpoint.before(run_dir / "checkpoints", recipe, order.before)
        start = {"path": "", "step": progress.step, "lineage": progress.lineage}
        if found is not None:
            path, then = found
            trained, undone = export.trained_groups(run_dir, then.step), export.trained_later(run_dir, then.step)
            lineage = feed.go_back(progress.lineage + 1, trained, undone)
            start = {"path": str(path), "step": then.step, "lineage": lineage}
        payload = json.dumps(start).encode()
    start = json.loads(ranks.broadcast(payload))
    if not start["path"]:
        return progress, f"no checkpoint from before step {order.before} is left"
    _load(engine, reference, Path(start["path"]), ranks)
    log.warning("lineage %d goes back to %s: %s", start["lineage"], start["path"], order.reason)
    back = Progress(start["step"], start["lineage"], [], progress.orders, progress.kl_beta)
    back.rate = progress.rate * order.rate_factor
    return back, f"from step {progress.step} back to {back.step}, learning rate x {back.rate:g}"


def _load(engine: Any, reference: Reference | None, path: Path, ranks: Ranks) -> None:
    checkpoint.load(engine, path, ranks)
    if reference is not None:
        reference.load(Pieces(checkpoint.rank_folders(path)), path)
