"""Per-token statistics of next-token distributions in one pass over the vocabulary, and the metrics made of them.

A tile of logits is made, reduced and forgotten: [T, V] never exists. Logits are accumulated and reduced in float32;
sums across tiles, and everything after them, are float64.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch

from reward_server.scorer import fused
from reward_server.scorer.head import Head

Preset = Literal["paper", "open_r1", "verl"]
PRESETS: tuple[Preset, ...] = ("paper", "open_r1", "verl")

DOT_ROWS = 1024
"""Rows that are widened to float64 at a time."""


@dataclass(frozen=True)
class Tile:
    """How many rows and vocabulary entries one tile of logits covers (torch operators; the fused pass has its own)."""

    rows: int
    entries: int


CPU_TILE, CUDA_TILE = Tile(256, 1024), Tile(4096, 8192)


@dataclass(frozen=True)
class Statistics:
    """float64 [T] each, of the distributions softmax(z_t / temperature_t), natural logarithms.

    lse: logsumexp of the logits; mean_logit: their mean over the vocabulary; entropy: -sum p log p (>= 0; none when not
    asked for); chosen_logprob: log-probability of the chosen token (none without chosen tokens).
    """

    lse: torch.Tensor
    mean_logit: torch.Tensor
    vocab_size: int
    entropy: torch.Tensor | None = None
    chosen_logprob: torch.Tensor | None = None

    def rows(self, part: slice) -> "Statistics":
        def cut(values: torch.Tensor | None) -> torch.Tensor | None:
            return None if values is None else values[part]

        return Statistics(
            self.lse[part], self.mean_logit[part], self.vocab_size, cut(self.entropy), cut(self.chosen_logprob)
        )

    def cpu(self) -> "Statistics":
        def move(values: torch.Tensor | None) -> torch.Tensor | None:
            return None if values is None else values.cpu()

        return Statistics(
            self.lse.cpu(), self.mean_logit.cpu(), self.vocab_size, move(self.entropy), move(self.chosen_logprob)
        )


# ---- metrics ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metric:
    """A number per token, and how a completion's tokens become one number.

    `has_presets`: the definition depends on the preset; the `open_r1` preset then reads unshifted rows.
    """

    per_token: Callable[[Statistics, Preset], torch.Tensor]
    reduce: Literal["mean", "sum"]
    description: str
    needs_entropy: bool = False
    has_presets: bool = False


def _self_certainty(statistics: Statistics, preset: Preset) -> torch.Tensor:
    gap = statistics.lse - statistics.mean_logit
    return (gap - math.log(statistics.vocab_size)).clamp(min=0) if preset == "paper" else gap


def _entropy(statistics: Statistics, _: Preset) -> torch.Tensor:
    assert statistics.entropy is not None
    return statistics.entropy


def _logprob(statistics: Statistics, _: Preset) -> torch.Tensor:
    assert statistics.chosen_logprob is not None
    return statistics.chosen_logprob


METRICS: dict[str, Metric] = {
    "self_certainty": Metric(
        _self_certainty, "mean", "mean KL(uniform || p), natural log; 0 only for a uniform p", has_presets=True
    ),
    "token_entropy": Metric(_entropy, "mean", "mean entropy of p, natural log, >= 0", needs_entropy=True),
    "mean_logprob": Metric(_logprob, "mean", "mean log-probability of the completion's tokens"),
    "sequence_logprob": Metric(_logprob, "sum", "log-probability of the whole completion"),
}


# ---- the pass --------------------------------------------------------------------------------------------------


@torch.inference_mode()
def tiled_statistics(
    hidden: torch.Tensor,
    head: Head,
    chosen: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    entropy: bool = True,
    tile: Tile | None = None,
    use_fused: bool | None = None,
) -> Statistics:
    """Statistics of the next-token distributions that `hidden` gives through `head`.

    hidden [T, H] in the head's dtype; chosen int64 [T]; temperature: one number or float [T], divides the logits.
    `use_fused`: none picks the fused CPU pass where it can run, false never does, true insists (ValueError when it
    cannot). `tile` sizes the torch operators. Memory beyond the result: one tile, and O(T).
    """
    if hidden.dim() != 2 or hidden.shape[1] != head.weight.shape[1]:
        raise ValueError(f"hidden: [T, {head.weight.shape[1]}] needed, got {list(hidden.shape)}")
    temperatures = torch.as_tensor(temperature, dtype=torch.float64, device=hidden.device).expand(hidden.shape[0])
    if not bool((temperatures > 0).all()):
        raise ValueError(f"temperature: must be positive (got {temperatures.min().item()})")
    can_fuse = head.bias is None and head.softcap is None and head.scale > 0 and fused.available(hidden, head.weight)
    if use_fused and not can_fuse:
        raise ValueError("use_fused: the fused pass cannot run here; see reward_server.scorer.fused.available")
    mean_logit = None
    if can_fuse and use_fused is not False:
        top, total, slope = fused.sums(hidden, head.weight, (head.scale / temperatures).float())
    else:
        tile = tile or (CUDA_TILE if hidden.is_cuda else CPU_TILE)
        top, total, slope, mean_logit = _sums(hidden, head, temperatures, entropy, tile)
    if mean_logit is None:
        mean_logit = head.scale * (_dots(hidden, head.mean_weight) + head.mean_bias) / temperatures
    lse = top + total.log()
    chosen_logprob = None
    if chosen is not None:
        chosen_logprob = (_chosen_logits(hidden, head, chosen) / temperatures - lse).clamp(max=0)
    return Statistics(
        lse=lse,
        mean_logit=mean_logit,
        vocab_size=head.vocab_size,
        entropy=(total.log() - slope / total).clamp(min=0) if entropy else None,
        chosen_logprob=chosen_logprob,
    )


def _sums(
    hidden: torch.Tensor, head: Head, temperatures: torch.Tensor, entropy: bool, tile: Tile
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`top`, `total`, `slope` as in fused.cpp, with torch operators; and, under a softcap, the mean logit."""
    rows, vocab_size = hidden.shape[0], head.vocab_size
    top = torch.full((rows,), -math.inf, dtype=torch.float64, device=hidden.device)
    total, slope, plain = torch.zeros_like(top), torch.zeros_like(top), torch.zeros_like(top)
    inverse = (1.0 / temperatures).float()
    half_on_cpu = hidden.dtype == torch.bfloat16 and not hidden.is_cuda
    with _bfloat16_products() if half_on_cpu else nullcontext():
        for first in range(0, vocab_size, tile.entries):
            entries = slice(first, min(first + tile.entries, vocab_size))
            weight = head.weight[entries]
            weight = weight if hidden.is_cuda else weight.float()
            for start in range(0, rows, tile.rows):
                part = slice(start, min(start + tile.rows, rows))
                logits = _product(hidden[part], weight)
                if head.bias is not None:
                    logits += head.bias[entries].float()
                if head.scale != 1.0:
                    logits *= head.scale
                if head.softcap is not None:
                    logits = logits.div_(head.softcap).tanh_().mul_(head.softcap)
                logits *= inverse[part, None]
                high = logits.amax(1)
                logits -= high[:, None]
                if head.softcap is not None:
                    plain[part] += logits.sum(1).double() + high.double() * logits.shape[1]
                powers = logits.exp()
                here, here_total = high.double(), powers.sum(1).double()
                to = torch.maximum(top[part], here)
                mine, theirs = (top[part] - to).exp(), (here - to).exp()
                if entropy:
                    here_slope = torch.linalg.vecdot(powers, logits).double() + here_total * (here - to)
                    shift = torch.where(total[part] > 0, top[part] - to, 0.0)
                    slope[part] = mine * (slope[part] + total[part] * shift) + theirs * here_slope
                total[part] = mine * total[part] + theirs * here_total
                top[part] = to
    return top, total, slope, plain / vocab_size if head.softcap is not None else None


def _product(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """hidden @ weight.T, accumulated and returned in float32."""
    if hidden.dtype == torch.float32 or not hidden.is_cuda:
        return torch.mm(hidden.float(), weight.T)
    return torch.mm(hidden, weight.T, out_dtype=torch.float32)


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


def _chosen_logits(hidden: torch.Tensor, head: Head, chosen: torch.Tensor) -> torch.Tensor:
    """float64 [T]: each row's logit of its own chosen token, before the temperature."""
    parts = zip(hidden.split(DOT_ROWS), chosen.split(DOT_ROWS), strict=True)
    logits = torch.cat([torch.linalg.vecdot(rows.double(), head.weight[ids].double()) for rows, ids in parts])
    if head.bias is not None:
        logits = logits + head.bias[chosen].double()
    logits = logits * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
