"""Per-token statistics of next-token distributions in one pass over the vocabulary.

A tile of logits is made, reduced and forgotten: [T, V] never exists. Logits are accumulated and reduced in float32;
sums across tiles, and everything after them, are float64.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from reward_server.scorer import fused
from reward_server.scorer.head import Head
from reward_server.scorer.metrics import PLAIN, Wanted
from reward_server.scorer.shards import Shards
from reward_server.scorer.sums import Sums

DOT_ROWS = 1024
"""Rows that are widened to float64 at a time."""


@dataclass(frozen=True)
class Tile:
    """How many rows and vocabulary entries one tile of logits covers (torch operators; the fused pass has its own)."""

    rows: int
    entries: int


CPU_TILE, CUDA_TILE = Tile(256, 1024), Tile(4096, 8192)


@dataclass(frozen=True)
class Reference:
    """What a reference model makes of the same rows: hidden states [T, H'] and its own head, of the same vocabulary."""

    hidden: torch.Tensor
    head: Head


@dataclass(frozen=True)
class Statistics:
    """float64 [T] each, of the distributions p_t = softmax(z_t / temperature_t), natural logarithms.

    lse: logsumexp of the logits; mean_logit: their mean over the vocabulary. None when not asked for: entropy
    -sum p log p (>= 0); varentropy, the variance of log p under p (>= 0, to about 1e-6 of the mean square of
    log p - max log p); chosen_logprob, the log-probability of the chosen token; top_logprobs [T, K], the largest
    log-probabilities in descending order, K the smaller of what was asked and the vocabulary; kl_to_reference,
    KL(p || p of the reference model), >= 0.
    """

    lse: torch.Tensor
    mean_logit: torch.Tensor
    vocab_size: int
    entropy: torch.Tensor | None = None
    varentropy: torch.Tensor | None = None
    chosen_logprob: torch.Tensor | None = None
    top_logprobs: torch.Tensor | None = None
    kl_to_reference: torch.Tensor | None = None

    def rows(self, part: slice) -> "Statistics":
        return self._each(lambda values: values[part])

    def cpu(self) -> "Statistics":
        return self._each(torch.Tensor.cpu)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Statistics":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {
            name: change(value) for name, value in values.items() if isinstance(value, torch.Tensor)
        }
        return replace(self, **changed)


@torch.inference_mode()
def tiled_statistics(
    hidden: torch.Tensor,
    head: Head,
    chosen: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    wanted: Wanted = PLAIN,
    reference: Reference | None = None,
    tile: Tile | None = None,
    use_fused: bool | None = None,
    shards: Shards | None = None,
) -> Statistics:
    """Statistics of the next-token distributions that `hidden` gives through `head`.

    hidden [T, H] in the head's dtype; chosen int64 [T]; temperature: one number or float [T], divides the logits (the
    reference's, too). `wanted.kl_to_reference` needs `reference`. `use_fused`: none picks the fused CPU pass where it
    can run (not with a reference), false never does, true insists (ValueError when it cannot). `tile` sizes the torch
    operators. `shards`: `head` holds a part of the vocabulary, and the others theirs (not with a reference). Memory
    beyond the result: one tile, and O(T).
    """
    if hidden.dim() != 2 or hidden.shape[1] != head.weight.shape[1]:
        raise ValueError(f"hidden: [T, {head.weight.shape[1]}] needed, got {list(hidden.shape)}")
    temperatures = torch.as_tensor(temperature, dtype=torch.float64, device=hidden.device).expand(hidden.shape[0])
    if not bool((temperatures > 0).all()):
        raise ValueError(f"temperature: must be positive (got {temperatures.min().item()})")
    reference = reference if wanted.kl_to_reference else None
    if wanted.kl_to_reference:
        _check_reference(hidden, head, reference)
    can_fuse = head.bias is None and head.softcap is None and head.scale > 0 and fused.available(hidden, head.weight)
    can_fuse = can_fuse and reference is None
    if use_fused and not can_fuse:
        raise ValueError("use_fused: the fused pass cannot run here; see reward_server.scorer.fused.available")
    mean_logit = kl = None
    if can_fuse and use_fused is not False:
        sums = fused.sums(hidden, head.weight, (head.scale / temperatures).float(), wanted)
    else:
        tile = tile or (CUDA_TILE if hidden.is_cuda else CPU_TILE)
        sums, mean_logit, kl = _torch_sums(hidden, head, temperatures, wanted, reference, tile)
    if mean_logit is None:
        mean_logit = head.scale * (_dots(hidden, head.mean_weight) + head.mean_bias) / temperatures
    chosen_logit = None if chosen is None else _chosen_logits(hidden, head, chosen, shards) / temperatures
    if shards is not None:
        sums, mean_logit, chosen_logit = shards.merge(sums, mean_logit, head.vocab_size, chosen_logit, wanted.top_k)
    lse = sums.lse
    entropy = varentropy = chosen_logprob = None
    if wanted.entropy and sums.slope is not None:
        entropy = (sums.total.log() - sums.slope / sums.total).clamp(min=0)
    if sums.square is not None and sums.slope is not None:
        varentropy = (sums.square / sums.total - (sums.slope / sums.total).square()).clamp(min=0)
    if chosen_logit is not None:
        chosen_logprob = (chosen_logit - lse).clamp(max=0)
    return Statistics(
        lse=lse,
        mean_logit=mean_logit,
        vocab_size=head.vocab_size if shards is None else shards.vocab_size,
        entropy=entropy,
        varentropy=varentropy,
        chosen_logprob=chosen_logprob,
        top_logprobs=None if sums.largest is None else (sums.largest - lse[:, None]).clamp(max=0),
        kl_to_reference=kl,
    )


def _check_reference(hidden: torch.Tensor, head: Head, reference: Reference | None) -> None:
    if reference is None:
        raise ValueError("reference: kl_to_reference needs one")
    if reference.head.vocab_size != head.vocab_size:
        raise ValueError(f"reference: its vocabulary has {reference.head.vocab_size} entries, not {head.vocab_size}")
    if reference.hidden.dtype != hidden.dtype or reference.hidden.shape[0] != hidden.shape[0]:
        raise ValueError(f"reference: {hidden.shape[0]} rows of {hidden.dtype} needed")


def _torch_sums(
    hidden: torch.Tensor,
    head: Head,
    temperatures: torch.Tensor,
    wanted: Wanted,
    reference: Reference | None,
    tile: Tile,
) -> tuple[Sums, torch.Tensor | None, torch.Tensor | None]:
    """The sums; the mean logit under a softcap, which is no dot product; the KL divergence from the reference."""
    rows, device, vocab_size = hidden.shape[0], hidden.device, head.vocab_size
    sums = Sums.start(rows, device, wanted, reference is not None, min(wanted.top_k, vocab_size))
    theirs = Sums.start(rows, device, PLAIN)
    plain = torch.zeros(rows, dtype=torch.float64, device=device)
    inverse = (1.0 / temperatures).float()
    half_on_cpu = hidden.dtype == torch.bfloat16 and not hidden.is_cuda
    with _bfloat16_products() if half_on_cpu else nullcontext():
        for first in range(0, vocab_size, tile.entries):
            entries = slice(first, min(first + tile.entries, vocab_size))
            weight = _tile_of(head, entries)
            their_weight = None if reference is None else _tile_of(reference.head, entries)
            for start in range(0, rows, tile.rows):
                part = slice(start, min(start + tile.rows, rows))
                logits = _logits(hidden[part], head, weight, entries)
                logits *= inverse[part, None]
                if head.softcap is not None:
                    plain[part] += logits.sum(1, dtype=torch.float64)
                their_logits = None
                if reference is not None and their_weight is not None:
                    their_logits = _logits(reference.hidden[part], reference.head, their_weight, entries)
                    their_logits *= inverse[part, None]
                sums.add(part, logits, their_logits)
                if their_logits is not None:
                    theirs.add(part, their_logits)
    mean_logit = plain / vocab_size if head.softcap is not None else None
    if sums.cross is None:
        return sums, mean_logit, None
    return sums, mean_logit, (sums.cross / sums.total - (sums.lse - theirs.lse)).clamp(min=0)


def _tile_of(head: Head, entries: slice) -> torch.Tensor:
    weight = head.weight[entries]
    return weight if weight.is_cuda else weight.float()


def _logits(hidden: torch.Tensor, head: Head, weight: torch.Tensor, entries: slice) -> torch.Tensor:
    """float32 [rows, entries], accumulated in float32, before the temperature. `weight` are the entries' rows."""
    if hidden.dtype == torch.float32 or not hidden.is_cuda:
        logits = torch.mm(hidden.float(), weight.T)
    else:
        logits = torch.mm(hidden, weight.T, out_dtype=torch.float32)
    if head.bias is not None:
        logits += head.bias[entries].float()
    if head.scale != 1.0:
        logits *= head.scale
    if head.softcap is not None:
        logits = logits.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits


@contextmanager
def _bfloat16_products() -> Iterator[None]:
    """Let oneDNN multiply float32 operands as bfloat16 with float32 accumulation.

    The operands were widened from bfloat16, so nothing is rounded, and processors with bfloat16 units are ~4x faster.
    """
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def _dots(hidden: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    return torch.cat([part.double() @ vector for part in hidden.split(DOT_ROWS)])


def _chosen_logits(hidden: torch.Tensor, head: Head, chosen: torch.Tensor, shards: Shards | None) -> torch.Tensor:
    """float64 [T]: each row's logit of its own chosen token, before the temperature; 0 where another shard has it."""
    if shards is not None:
        local = chosen - shards.first
        is_here = (local >= 0) & (local < head.vocab_size)
        return _chosen_logits(hidden, head, local.clamp(0, head.vocab_size - 1), None) * is_here
    parts = zip(hidden.split(DOT_ROWS), chosen.split(DOT_ROWS), strict=True)
    logits = torch.cat([torch.linalg.vecdot(rows.double(), head.weight[ids].double()) for rows, ids in parts])
    if head.bias is not None:
        logits = logits + head.bias[chosen].double()
    logits = logits * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
