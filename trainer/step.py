"""One optimizer step on one batch: every rank runs it, each on its own micro-batches."""

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from services.recipe import Trainer
from trainer import engine as engines
from trainer.batch import MicroBatch, Sequences, budget, deal, micro_batch
from trainer.loss import Terms, ratio, token_losses
from trainer.ranks import Ranks


class NotFinite(ArithmeticError):
    """Loss or gradient is NaN or infinite: the weights are not to be used."""


@dataclass(frozen=True)
class StepResult:
    """Means are over the completion tokens trained on, of all ranks. `seconds` by phase, of this rank."""

    loss: float
    kl: float
    entropy: float
    clip_fraction: float
    ratio_mean: float
    ratio_max: float
    importance_mean: float
    importance_truncated: float
    logprob_gap_mean: float
    logprob_gap_max: float
    grad_norm: float
    lr: float
    tokens: int
    completion_tokens: int
    completions: int
    micro_batches: int
    forwarded: float
    seconds: dict[str, float]


SUMS = ("tokens", "loss", "kl", "entropy", "clipped", "ratio", "importance", "truncated", "gap", "forwarded")
MAXIMA = ("ratio", "gap")


def train_step(
    engine: Any, reference: nn.Module | None, batch: Sequences, step: int, settings: Trainer, ranks: Ranks
) -> StepResult:
    """Optimizer step number `step` (from 0) on `batch`, which must be the same on every rank.

    The update is that of the whole batch's objective, whatever the ranks and micro-batches: token weights are global,
    DeepSpeed's mean over ranks is undone by the factor `ranks.size`, and its division by accumulation steps is off.
    Raises NotFinite; the weights may be spoilt then.
    """
    started = time.perf_counter()
    plan = deal(batch, ranks.size, budget(settings.micro_batch_tokens, ranks.device))[ranks.rank]
    micro_batches = [micro_batch(batch, indices, settings.aggregation) for indices in plan]
    sums = torch.zeros(len(SUMS), dtype=torch.float64, device=ranks.device)
    maxima = torch.zeros(len(MAXIMA), dtype=torch.float64, device=ranks.device)
    packed = time.perf_counter()

    rate = engines.learning_rate(step, settings)
    engines.set_learning_rate(engine, rate)
    for number, micro in enumerate(micro_batches):
        micro = micro.to(ranks.device)
        engine.set_gradient_accumulation_boundary(number == len(micro_batches) - 1)
        logprobs, entropies = engine(micro.packed, micro.positions, micro.targets, micro.temperatures)
        terms = token_losses(
            logprobs,
            micro.rollout,
            micro.advantages,
            _reference_logprobs(reference, micro),
            old_logprobs=settings.old_logprobs,
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            importance_cap=settings.importance_cap,
            kl_beta=settings.kl_beta,
        )
        loss = (micro.weights * terms.loss).sum() * ranks.size
        engine.backward(loss, scale_wrt_gas=False)
        _measure(sums, maxima, micro, terms, logprobs.detach(), entropies)
    if ranks.size > 1:
        dist.all_reduce(sums)
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
    total, largest = dict(zip(SUMS, sums.tolist(), strict=True)), dict(zip(MAXIMA, maxima.tolist(), strict=True))
    if not math.isfinite(total["loss"]):
        raise NotFinite(f"the loss of step {step} is {total['loss']}")
    computed = time.perf_counter()

    norm = engines.gradient_norm(engine) if settings.zero_stage == 0 else None
    engine.step()
    norm = engines.gradient_norm(engine) if norm is None else norm
    if norm is None or not math.isfinite(norm):
        raise NotFinite(f"the gradient's norm at step {step} is {norm}")
    stepped = time.perf_counter()

    tokens = int(batch.lengths.sum())
    count = max(total["tokens"], 1.0)
    return StepResult(
        loss=total["loss"],
        kl=total["kl"] / count,
        entropy=total["entropy"] / count,
        clip_fraction=total["clipped"] / count,
        ratio_mean=total["ratio"] / count,
        ratio_max=largest["ratio"],
        importance_mean=total["importance"] / count,
        importance_truncated=total["truncated"] / count,
        logprob_gap_mean=total["gap"] / count,
        logprob_gap_max=largest["gap"],
        grad_norm=norm,
        lr=rate,
        tokens=tokens,
        completion_tokens=int(batch.completions.sum()),
        completions=len(batch),
        micro_batches=len(micro_batches),
        forwarded=total["forwarded"] / max(tokens, 1),
        seconds={"pack": packed - started, "compute": computed - packed, "optimizer": stepped - computed},
    )


@torch.no_grad()
def _reference_logprobs(reference: nn.Module | None, micro: MicroBatch) -> Tensor | None:
    if reference is None:
        return None
    return reference(micro.packed, micro.positions, micro.targets, micro.temperatures)[0]


@torch.no_grad()
def _measure(
    sums: Tensor, maxima: Tensor, micro: MicroBatch, terms: Terms, logprobs: Tensor, entropies: Tensor
) -> None:
    real = (micro.weights > 0).double()
    ratios, gaps = ratio(logprobs, micro.rollout) * real, (logprobs - micro.rollout).abs() * real
    loss = micro.weights.double() * terms.loss.detach()
    forwarded = real.max() * len(micro.packed)
    columns = (terms.kl * real, entropies * real, terms.clipped * real, ratios)
    more = (terms.importance * real, terms.truncated * real, gaps)
    sums += torch.stack([real.sum(), loss.sum(), *(x.sum() for x in columns), *(x.sum() for x in more), forwarded])
    maxima.copy_(torch.maximum(maxima, torch.stack([ratios.max(), gaps.max()])))
