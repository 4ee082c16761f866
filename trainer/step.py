"""One step on one batch: the optimizer updates of all its minibatches and epochs. Every rank runs it, each on its own
micro-batches."""

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from services.recipe import Trainer
from trainer import engine as engines
from trainer.algorithms.divergences import k3
from trainer.algorithms.ratios import ratio
from trainer.batch import MicroBatch, Sequences
from trainer.loss import Terms, token_losses
from trainer.minibatches import Part, order, parts
from trainer.ranks import Ranks
from trainer.reference import Reference


class NotFinite(ArithmeticError):
    """Loss or gradient is NaN or infinite: the weights are not to be used."""


@dataclass(frozen=True)
class StepResult:
    """Means and shares are over the completion tokens trained on, of all ranks, each counted in every epoch; `loss` and
    `grad_norm` are means over the updates. `seconds` by phase, of this rank."""

    loss: float
    kl: float
    entropy: float
    clip_fraction: float
    clip_cov_fraction: float
    ratio_mean: float
    ratio_max: float
    importance_mean: float
    importance_truncated: float
    logprob_gap_mean: float
    logprob_gap_max: float
    rollout_kl: float
    grad_norm: float
    lr: float
    updates: int
    tokens: int
    completion_tokens: int
    completions: int
    micro_batches: int
    forwarded: float
    seconds: dict[str, float]


SUMS = tuple("tokens loss kl entropy clipped cut ratio importance truncated gap rollout_kl forwarded".split())
MAXIMA = ("ratio", "gap")


def train_step(
    engine: Any,
    reference: Reference | None,
    batch: Sequences,
    step: int,
    settings: Trainer,
    ranks: Ranks,
    seed: int = 0,
) -> StepResult:
    """Step number `step` (from 0) on `batch`, which must be the same on every rank.

    Each update is that of its minibatch's whole objective, whatever the ranks and micro-batches: token weights are
    global, DeepSpeed's mean over ranks is undone by the factor `ranks.size`, and its division by accumulation steps is
    off. What is drawn (minibatches, their order, clip-cov's tokens) depends on `seed` and `step` alone. Raises
    NotFinite; the weights may be spoilt then.
    """
    started = time.perf_counter()
    rng = np.random.default_rng([seed, step])
    minibatches = parts(batch, settings, ranks, rng)
    every = [part for minibatch in minibatches for part in minibatch]
    packed = time.perf_counter()

    if reference is not None:
        with reference.at_hand():
            for part in every:
                part.reference = reference.logprobs(part.micro.to(ranks.device))
    if settings.updates > 1 and settings.old_logprobs == "recomputed":
        _remember_old_logprobs(engine, every, ranks)
    rate = engines.learning_rate(step, settings)
    engines.set_learning_rate(engine, rate)
    chosen = order(len(minibatches), settings.epochs_per_batch, rng)
    updates = [_update(engine, minibatches[number], step, settings, ranks) for number in chosen]
    if reference is not None:
        reference.follow(engine.module)
    done = time.perf_counter()

    total = {name: sum(update.sums[name] for update in updates) for name in SUMS}
    largest = {name: max(update.maxima[name] for update in updates) for name in MAXIMA}
    optimizer = sum(update.optimizer_seconds for update in updates)
    tokens = int(batch.lengths.sum())
    count = max(total["tokens"], 1.0)
    return StepResult(
        loss=total["loss"] / len(updates),
        kl=total["kl"] / count,
        entropy=total["entropy"] / count,
        clip_fraction=total["clipped"] / count,
        clip_cov_fraction=total["cut"] / count,
        ratio_mean=total["ratio"] / count,
        ratio_max=largest["ratio"],
        importance_mean=total["importance"] / count,
        importance_truncated=total["truncated"] / count,
        logprob_gap_mean=total["gap"] / count,
        logprob_gap_max=largest["gap"],
        rollout_kl=total["rollout_kl"] / count,
        grad_norm=sum(update.gradient_norm for update in updates) / len(updates),
        lr=rate,
        updates=len(updates),
        tokens=tokens,
        completion_tokens=int(batch.completions.sum()),
        completions=len(batch),
        micro_batches=len(every),
        forwarded=total["forwarded"] / max(tokens * settings.epochs_per_batch, 1),
        seconds={"pack": packed - started, "compute": done - packed - optimizer, "optimizer": optimizer},
    )


@torch.no_grad()
def _remember_old_logprobs(engine: Any, every: list[Part], ranks: Ranks) -> None:
    engine.eval()
    for part in every:
        part.old = _forward(engine, part.micro.to(ranks.device))[0]
    engine.train()


def _forward(engine: Any, micro: MicroBatch) -> tuple[Tensor, Tensor]:
    return engine(micro.packed, micro.positions, micro.targets, micro.temperatures)


@dataclass(frozen=True)
class _Update:
    sums: dict[str, float]
    maxima: dict[str, float]
    gradient_norm: float
    optimizer_seconds: float


def _update(engine: Any, minibatch: list[Part], step: int, settings: Trainer, ranks: Ranks) -> _Update:
    sums = torch.zeros(len(SUMS), dtype=torch.float64, device=ranks.device)
    maxima = torch.zeros(len(MAXIMA), dtype=torch.float64, device=ranks.device)
    for number, part in enumerate(minibatch):
        micro = part.micro.to(ranks.device)
        engine.set_gradient_accumulation_boundary(number == len(minibatch) - 1)
        logprobs, entropies = _forward(engine, micro)
        terms = token_losses(
            logprobs,
            micro.rollout,
            micro.advantages,
            micro.segments,
            settings,
            old=part.old,
            reference=part.reference,
            entropies=entropies,
        )
        loss = (micro.weights * terms.loss).sum() * ranks.size
        engine.backward(loss, scale_wrt_gas=False)
        _measure(sums, maxima, micro, part, terms, logprobs.detach(), entropies.detach())
    if ranks.size > 1:
        dist.all_reduce(sums)
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
    total = dict(zip(SUMS, sums.tolist(), strict=True))
    if not math.isfinite(total["loss"]):
        raise NotFinite(f"the loss of step {step} is {total['loss']}")

    computed = time.perf_counter()
    norm = engines.gradient_norm(engine) if settings.zero_stage == 0 else None
    engine.step()
    norm = engines.gradient_norm(engine) if norm is None else norm
    if norm is None or not math.isfinite(norm):
        raise NotFinite(f"the gradient's norm at step {step} is {norm}")
    return _Update(total, dict(zip(MAXIMA, maxima.tolist(), strict=True)), norm, time.perf_counter() - computed)


@torch.no_grad()
def _measure(
    sums: Tensor, maxima: Tensor, micro: MicroBatch, part: Part, terms: Terms, logprobs: Tensor, entropies: Tensor
) -> None:
    real = (micro.weights > 0).double()
    # The trainer's numbers against the rollout's for the same weights, as far as they were computed for the same.
    proximal = logprobs if part.old is None else part.old
    ratios, gaps = ratio(logprobs, micro.rollout) * real, (proximal - micro.rollout).abs() * real
    columns = {
        "tokens": real,
        "loss": micro.weights.double() * terms.loss.detach(),
        "kl": terms.kl * real,
        "entropy": entropies * real,
        "clipped": terms.clipped * real,
        "cut": real.new_tensor(part.cut),
        "ratio": ratios,
        "importance": terms.importance * real,
        "truncated": terms.truncated * real,
        "gap": gaps,
        "rollout_kl": k3(micro.rollout, proximal) * real,
        "forwarded": real.max() * len(micro.packed),
    }
    sums += torch.stack([columns[name].sum() for name in SUMS])
    maxima.copy_(torch.maximum(maxima, torch.stack([ratios.max(), gaps.max()])))
