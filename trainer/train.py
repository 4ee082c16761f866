"""The training process: start or restore, then, step by step, pull, train, publish, log, checkpoint, acknowledge.

Rank 0 alone speaks to Redis and writes the run's records; it sends each step's batch to the other ranks as raw bytes.
"""

import json
import logging
import os
import random
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from services import traces, trail
from services.contract import Version
from services.queue import Entry
from services.recipe import Recipe, RecipeError
from services.redis import connect_sync
from services.status import serving_status
from services.steps import StepsError, read_steps, traces_of_training
from services.weights.publish import Publisher
from trainer import checkpoint, metrics, policy
from trainer import engine as engines
from trainer.batch import Sequences, sequences
from trainer.checkpoint import Progress
from trainer.feed import Feed, graceful
from trainer.ranks import Ranks, join
from trainer.step import StepResult, train_step
from trainer.waits import Waits

log = logging.getLogger(__name__)

STOP = b""
"""Sent instead of a batch when the run is to end."""


def main(recipe: Recipe, redis_url: str, resume: bool = False) -> int:
    """Run the trainer to its last step, or to a SIGTERM: 0 then, with a checkpoint of the last step done.

    One process, or one of the ranks that `rlif train` starts. With `resume` it goes on from the newest checkpoint in
    `run.dir`, in a new lineage; from the start when there is none. Raises RecipeError (what is asked for cannot run),
    StartupError (the metrics port is taken), DeadlineExceeded (no groups, no redis), Fenced (another trainer took
    over), NotFinite (the loss broke).
    """
    engines.check(recipe)
    _refuse_used_folder(recipe, resume)
    with join(recipe.trainer) as ranks, ExitStack() as stack:
        waits = Waits()
        if ranks.first and recipe.tracking.metrics_port is not None:
            stack.enter_context(serving_status("trainer", recipe.tracking.metrics_port, waits.states))
        feed = Feed(redis_url, recipe, waits) if ranks.first else None
        if feed is not None:
            stack.callback(feed.close)
        stack.enter_context(graceful(feed))
        return _train(recipe, redis_url, resume, ranks, feed, waits)


def _train(recipe: Recipe, redis_url: str, resume: bool, ranks: Ranks, feed: Feed | None, waits: Waits) -> int:
    run_dir, trainer = recipe.run.dir, recipe.trainer
    _seed(recipe)
    trained = policy.load(recipe.model, trainer.gradient_checkpointing)
    engine = engines.start(trained, recipe, ranks)
    reference = engines.start_frozen(policy.reference(recipe.model), recipe, ranks) if trainer.kl_beta > 0 else None
    progress = _restore(engine, recipe, resume, ranks, feed)
    start = progress.step
    waits.over("model")

    publisher, records, files = None, None, run_dir / "model"
    if ranks.first:
        policy.save_files(recipe.model, files)
        publisher = Publisher(connect_sync(redis_url), recipe.run.name, recipe.weights_dir, recipe.weights.keep)
        records = metrics.StepLog(run_dir, trainer.steps, start, recipe.tracking.tensorboard)
    seconds = {"publish": _publish(publisher, trained, progress, files, trainer.zero_stage == 3)}

    durable = progress.step
    while progress.step < trainer.steps:
        began = time.perf_counter()
        batch, entries = _next_batch(feed, progress, trained.vocab_size, ranks)
        if batch is None:
            break
        seconds["wait"] = time.perf_counter() - began

        named: dict[str, Any] = {"step": progress.step + 1, "group_ids": [entry.group.group_id for entry in entries]}
        with traces.span("train step", "consumer", links=[entry.trace for entry in entries], **named):
            result = train_step(engine, reference, batch, progress.step, trainer, ranks)
            progress.step += 1
            progress.unacknowledged += [entry.entry_id for entry in entries]
            seconds["publish"] = _publish(publisher, trained, progress, files, trainer.zero_stage == 3)
        if feed is not None and records is not None:
            _note(feed, records, progress, start, entries, result, seconds)
        seconds = {}

        if progress.step % trainer.checkpoints.every == 0 or progress.step == trainer.steps:
            seconds["checkpoint"] = _checkpoint(engine, recipe, progress, ranks, feed)
            durable = progress.step

    if durable < progress.step:
        _checkpoint(engine, recipe, progress, ranks, feed)
    if feed is not None and records is not None:
        done = progress.step >= trainer.steps
        feed.report("done" if done else "stopped", progress.step, progress.lineage)
        records.close()
        log.info("%s at step %d of %d", "done" if done else "stopped", progress.step, trainer.steps)
    return 0


def _refuse_used_folder(recipe: Recipe, resume: bool) -> None:
    if not resume and (found := traces_of_training(recipe.run.dir)):
        raise RecipeError(
            f"run.dir: {recipe.run.dir} holds a trained run already ({found}); go on with --resume, or choose "
            "another folder"
        )
    recipe.run.dir.mkdir(parents=True, exist_ok=True)


def _seed(recipe: Recipe) -> None:
    """Nothing in a step draws random numbers; a model's own code might."""
    random.seed(recipe.run.seed)
    np.random.seed(recipe.run.seed)
    torch.manual_seed(recipe.run.seed)
    if recipe.run.deterministic:
        # Read by cuBLAS when it starts; without it its results depend on timing.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _restore(engine: Any, recipe: Recipe, resume: bool, ranks: Ranks, feed: Feed | None) -> Progress:
    """The newest checkpoint's state (or the base model's), in a lineage that no trainer of this run has had."""
    payload = None
    if feed is not None:
        found = checkpoint.newest(recipe.run.dir / "checkpoints", recipe) if resume else None
        path, progress = found or (None, Progress(lineage=-1))
        trained = _trained(recipe.run.dir, progress.step)
        lineage = feed.claim(progress.lineage + 1, progress.unacknowledged, trained)
        payload = json.dumps({"path": str(path or ""), "step": progress.step, "lineage": lineage}).encode()
    start = json.loads(ranks.broadcast(payload))
    if start["path"]:
        checkpoint.load(engine, Path(start["path"]), ranks)
    log.info("lineage %d starts from %s", start["lineage"], start["path"] or recipe.model.path)
    return Progress(step=start["step"], lineage=start["lineage"])


def _trained(run_dir: Path, step: int) -> list[str]:
    """The groups (ids) of the first `step` steps, from the audit trail."""
    if step == 0:
        return []
    try:
        rows = read_steps(run_dir / "steps.jsonl")
    except StepsError as error:
        log.warning("only redis knows which groups were trained: %s", error)
        return []
    return [group_id for row in rows if row["step"] <= step for group_id in row["group_ids"]]


def _next_batch(
    feed: Feed | None, progress: Progress, vocab_size: int, ranks: Ranks
) -> tuple[Sequences | None, list[Entry]]:
    """The same batch on every rank, none at the end; the entries it came from on rank 0."""
    payload, entries = None, []
    if feed is not None:
        feed.report("waiting", progress.step, progress.lineage)
        pulled = feed.pull()
        entries = pulled or []
        if entries:
            feed.report("training", progress.step, progress.lineage)
        # Begun before anything looks into the groups: one that makes the trainer crash is found by counting.
        feed.begin(entries)
        payload = STOP if pulled is None else sequences([entry.group for entry in entries], vocab_size).pack()
    data = ranks.broadcast(payload)
    return (None if data == STOP else Sequences.unpack(data)), entries


def _publish(
    publisher: Publisher | None, trained: policy.Policy, progress: Progress, files: Path, gather: bool
) -> float:
    """Seconds it took. With partitioned weights every rank takes part in gathering them."""
    began = time.perf_counter()
    if publisher is not None:
        version = Version(lineage=progress.lineage, version=progress.step)
        with traces.span("publish weights", weight_version=str(version)):
            publisher.publish(version, policy.tensors(trained, gather), files)
    elif gather:
        for _ in policy.tensors(trained, gather):
            pass
    return time.perf_counter() - began


def _note(
    feed: Feed,
    records: metrics.StepLog,
    progress: Progress,
    start: int,
    entries: list[Entry],
    result: StepResult,
    seconds: dict[str, float],
) -> None:
    """Before the checkpoint, or a step could survive without its line."""
    feed.finish(entries)
    for entry in entries:
        made = min(completion.weight_version for completion in entry.group.completions)
        ids = {"index": entry.group.index, "spec_id": entry.group.spec_id, "step": progress.step}
        trail.note("is trained", entry.group.group_id, weight_version=made, **ids)
    groups = [entry.group for entry in entries]
    line = metrics.record(progress.lineage, start, progress.step, groups, result, seconds)
    records.write(line)
    feed.tokens_per_second = line["tokens_per_second"]
    if result.completions == 0:
        log.warning("step %d: none of its completions has a valid reward; the gradient is 0", progress.step)
    log.info(
        "step %d: loss %.4f, kl %.5f, entropy %.3f, gradient %.3f, %d tokens in %.2f s",
        progress.step,
        result.loss,
        result.kl,
        result.entropy,
        result.grad_norm,
        result.tokens,
        line["seconds"]["total"],
    )


def _checkpoint(engine: Any, recipe: Recipe, progress: Progress, ranks: Ranks, feed: Feed | None) -> float:
    """Durable first, acknowledged then: a crash in between is mended by the ids in the checkpoint."""
    began = time.perf_counter()
    checkpoint.save(engine, recipe.run.dir / "checkpoints", progress, recipe, ranks)
    if feed is not None:
        feed.ack(progress.unacknowledged, progress.lineage)
    progress.unacknowledged = []
    return time.perf_counter() - began
