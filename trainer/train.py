"""The training process: start or restore, then, step by step, pull, train, publish, log, checkpoint, acknowledge.

Rank 0 alone speaks to Redis and writes the run's records; it sends each step's batch to the other ranks as raw bytes.
"""

import json
import logging
import os
import random
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from services import commands, traces, trail
from services.algorithms import contradiction, cut_sampling
from services.commands import AnyOrder, RollBack, Stop
from services.contract import Adapter, Version
from services.queue import Entry
from services.recipe import Recipe, RecipeError
from services.redis import connect_sync
from services.status import serving_status
from services.steps import STOPPED, traces_of_training
from services.weights import broadcast
from services.weights.publish import Publisher
from trainer import checkpoint, lora, metrics, policy
from trainer import engine as engines
from trainer import reference as references
from trainer import start as starts
from trainer.batch import Sequences, sequences
from trainer.checkpoint import Progress
from trainer.feed import Feed, Paused, graceful
from trainer.obey import adjusted, obey
from trainer.ranks import Ranks, join
from trainer.reference import Reference
from trainer.step import StepResult, train_step
from trainer.waits import Waits

log = logging.getLogger(__name__)

STOP, BATCH, ORDERS, WAIT = b"", b"b", b"o", b"w"
"""What rank 0 sends to the others starts with one of these; STOP and WAIT are all of it. WAIT comes again and
again while the run is paused: no collective may last longer than the process group's timeout."""


def main(recipe: Recipe, redis_url: str, resume: bool = False, resume_from: Path | None = None) -> int:
    """Run the trainer to its last step, or to a signal, with a checkpoint of the last step done. Returns 0; 143 where a
    signal stopped it (of several ranks 0: their launcher says it), so that whoever watches it knows it is not done.

    One process, or one of the ranks that `rlif train` starts. With `resume` it goes on from the newest checkpoint in
    `run.dir`, in a new lineage; when there is none, from the model folder `resume_from` (its weights, and a fresh
    optimizer) where one is given, else from the start. Raises RecipeError (what is asked for cannot run),
    StartupError (the metrics port is taken), DeadlineExceeded (no groups, no redis), Fenced (another trainer took
    over), NotFinite (the loss broke).
    """
    engines.check(recipe)
    _refuse_used_folder(recipe, resume or resume_from is not None)
    doubts = [cut_sampling(recipe.rollout.sampling)]
    if recipe.spec is not None:
        doubts.append(contradiction(recipe.trainer.algorithm, recipe.spec.combine))
    for doubt in filter(None, doubts):
        log.warning(doubt)
    with join(recipe.trainer) as ranks, ExitStack() as stack:
        waits = Waits()
        if ranks.first and recipe.tracking.metrics_port is not None:
            stack.enter_context(serving_status("trainer", recipe.tracking.metrics_port, waits.states))
        feed = Feed(redis_url, recipe, waits) if ranks.first else None
        if feed is not None:
            stack.callback(feed.close)
        stack.enter_context(graceful(feed))
        return _train(recipe, redis_url, resume, resume_from, ranks, feed, waits)


def _train(
    recipe: Recipe,
    redis_url: str,
    resume: bool,
    resume_from: Path | None,
    ranks: Ranks,
    feed: Feed | None,
    waits: Waits,
) -> int:
    run_dir, trainer = recipe.run.dir, recipe.trainer
    _seed(recipe)
    start = starts.find(recipe, resume, resume_from, ranks)
    model = recipe.model.model_copy(update={"path": start.model, "revision": None}) if start.model else recipe.model
    trained = policy.load(model, trainer.gradient_checkpointing)
    adapter = lora.published(trained.model, model) if model.lora is not None else None
    engine = engines.start(trained, recipe, ranks)
    reference = references.start(recipe, ranks, trained, model)
    progress = starts.restore(engine, reference, recipe, start, ranks, feed)
    first = progress.step
    waits.over("model")

    publisher, records, files = None, None, run_dir / "model"
    if ranks.first:
        policy.save_files(recipe.model, files)
        publisher = broadcast.publisher(recipe, connect_sync(redis_url), ranks.device)
        records = metrics.StepLog(recipe, first)
        (run_dir / STOPPED).unlink(missing_ok=True)
    if recipe.has_orders and progress.step == 0:
        # The first weights may turn out to be the best, or the only ones from before a collapse.
        _checkpoint(engine, reference, recipe, progress, ranks, feed)
    seconds = {"publish": _publish(publisher, trained, adapter, progress, files, recipe, feed)}

    durable, stopped = progress.step, False
    while not stopped:
        began = time.perf_counter()
        orders, batch, entries = _next(feed, progress, trained.vocab_size, ranks)
        for order in orders:
            progress.orders += 1
            if isinstance(order, RollBack):
                back, effect = starts.roll_back(engine, reference, recipe, order, progress, ranks, feed)
                if back is not progress:
                    progress, first, durable = back, back.step, back.step
                    _checkpoint(engine, reference, recipe, progress, ranks, feed)
                    _publish(publisher, trained, adapter, progress, files, recipe, feed)
            else:
                effect = obey(order, recipe, progress, records)
            if isinstance(order, Stop):
                _checkpoint(engine, reference, recipe, progress, ranks, feed)
                durable, stopped = progress.step, True
                if feed is not None:
                    (run_dir / STOPPED).write_text(order.reason + "\n")
            if feed is not None:
                feed.note_obeyed(order, progress, effect)
            if stopped:
                break
        if orders:
            continue
        if batch is None:
            break
        seconds["wait"] = time.perf_counter() - began

        named: dict[str, Any] = {"step": progress.step + 1, "group_ids": [entry.group.group_id for entry in entries]}
        with traces.span("train step", "consumer", links=[entry.trace for entry in entries], **named):
            settings = adjusted(trainer, progress)
            result = train_step(engine, reference, batch, progress.step, settings, ranks, recipe.run.seed)
            progress.step += 1
            progress.unacknowledged += [entry.entry_id for entry in entries]
            seconds["publish"] = _publish(publisher, trained, adapter, progress, files, recipe, feed)
        if feed is not None and records is not None:
            _note(feed, records, progress, first, entries, result, seconds)
        seconds = {}

        if progress.step % trainer.checkpoints.every == 0 or progress.step == trainer.steps:
            seconds["checkpoint"] = _checkpoint(engine, reference, recipe, progress, ranks, feed)
            durable = progress.step

    if durable < progress.step:
        _checkpoint(engine, reference, recipe, progress, ranks, feed)
    if publisher is not None:
        publisher.close()
    if feed is not None and records is not None:
        done = progress.step >= trainer.steps and not stopped
        feed.report("done" if done else "stopped", progress.step, progress.lineage)
        records.close()
        log.info("%s at step %d of %d", "done" if done else "stopped", progress.step, trainer.steps)
    interrupted = progress.step < trainer.steps and not stopped
    return 128 + signal.SIGTERM if interrupted and ranks.size == 1 else 0


def _refuse_used_folder(recipe: Recipe, resume: bool) -> None:
    if not resume and (found := traces_of_training(recipe.run.dir)):
        raise RecipeError(
            f"run.dir: {recipe.run.dir} holds a trained run already ({found}); go on with --resume, or choose "
            "another folder"
        )
    recipe.run.dir.mkdir(parents=True, exist_ok=True)


def _seed(recipe: Recipe) -> None:
    """A step draws its random numbers from generators of its own; a model's own code might use the global ones."""
    random.seed(recipe.run.seed)
    np.random.seed(recipe.run.seed)
    torch.manual_seed(recipe.run.seed)
    if recipe.run.deterministic:
        # Read by cuBLAS when it starts; without it its results depend on timing.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _next(
    feed: Feed | None, progress: Progress, vocab_size: int, ranks: Ranks
) -> tuple[list[AnyOrder], Sequences | None, list[Entry]]:
    """The same on every rank: orders to obey, or a batch, or neither at the end. The batch's entries on rank 0."""
    while True:
        payload, entries = _offer(feed, progress, vocab_size) if feed is not None else (None, [])
        data = ranks.broadcast(payload)
        kind, rest = data[:1], data[1:]
        if kind == ORDERS:
            return [commands.parse(body) for body in json.loads(rest)], None, []
        if kind != WAIT:
            return [], (Sequences.unpack(rest) if kind == BATCH else None), entries


def _offer(feed: Feed, progress: Progress, vocab_size: int) -> tuple[bytes, list[Entry]]:
    """What rank 0 tells the others comes next, and a batch's entries."""
    feed.report("waiting", progress.step, progress.lineage)
    orders, pulled = feed.orders(progress), None
    if not orders and progress.step >= feed.recipe.trainer.steps:
        orders = feed.last_orders(progress) if feed.recipe.has_orders else []
    elif not orders:
        try:
            pulled = feed.pull(progress)
        except Paused:
            return WAIT, []
        orders = feed.orders(progress) if pulled == [] else []
    if pulled:
        feed.report("training", progress.step, progress.lineage)
        # Begun before anything looks into the groups: one that makes the trainer crash is found by counting.
        feed.begin(pulled)
        return BATCH + sequences([entry.group for entry in pulled], vocab_size).pack(), pulled
    bodies = [order.model_dump_json() for order in orders]
    return ORDERS + json.dumps(bodies).encode() if bodies else STOP, []


def _publish(
    publisher: Publisher | None,
    trained: policy.Policy,
    adapter: Adapter | None,
    progress: Progress,
    files: Path,
    recipe: Recipe,
    feed: Feed | None,
) -> float:
    """Seconds it took. With partitioned weights every rank takes part in gathering them."""
    began = time.perf_counter()
    gather = recipe.trainer.zero_stage == 3
    tensors = policy.adapters(trained, gather) if adapter else policy.tensors(trained, gather, recipe.model.lora)
    if publisher is not None and feed is not None:
        version = Version(lineage=progress.lineage, version=progress.step)
        with traces.span("publish weights", weight_version=str(version)):
            feed.published = publisher.publish(version, tensors, files, adapter)
    elif gather:
        for _ in tensors:
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
    records.samples(progress.step, groups)
    feed.tell(line)
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


def _checkpoint(
    engine: Any, reference: Reference | None, recipe: Recipe, progress: Progress, ranks: Ranks, feed: Feed | None
) -> float:
    """Durable first, acknowledged then: a crash in between is mended by the ids in the checkpoint."""
    began = time.perf_counter()
    checkpoint.save(engine, recipe.run.dir / "checkpoints", progress, recipe, ranks, reference)
    if feed is not None:
        feed.ack(progress.unacknowledged, progress.lineage)
    progress.unacknowledged = []
    return time.perf_counter() - began
