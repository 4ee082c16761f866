"""Hidden states -> logprob and entropy per token, a slice of the vocabulary at a time: [T, V] logits never exist.

The forward pass keeps T sums. The backward pass makes each slice's logits once more from them, and writes that slice's
rows of the weight's gradient once, over all tokens.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

TILE_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}
"""Logits held at a time, by device: 4 MiB in float32 stay in a CPU's cache; a GPU wants large products."""


class Head(nn.Module):
    """`forward(hidden [T, H], targets [T], temperatures [T])` -> float32 (logprobs, entropies) [T], both in nats and
    with gradients, of the distribution softmax(logits / temperature) over the first `vocab_size` rows of `linear`."""

    def __init__(self, linear: nn.Linear, vocab_size: int, tile_elements: int | None = None) -> None:
        super().__init__()
        # In a list, so that the layer stays a child of the language model alone.
        self.linear = [linear]
        self.vocab_size = vocab_size
        self.tile_elements = tile_elements

    def forward(self, hidden: Tensor, targets: Tensor, temperatures: Tensor) -> tuple[Tensor, Tensor]:
        linear = self.linear[0]
        elements = self.tile_elements or TILE_ELEMENTS.get(hidden.device.type, TILE_ELEMENTS["cuda"])
        columns = max(1, min(self.vocab_size, elements // max(1, len(hidden))))
        return _Head.apply(hidden, linear.weight, linear.bias, targets, temperatures, self.vocab_size, columns)


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperatures: Tensor,
        vocab_size: int,
        columns: int,
    ) -> tuple[Tensor, Tensor]:
        top = torch.full((len(hidden),), float("-inf"), device=hidden.device)
        total, moment, chosen = torch.zeros_like(top), torch.zeros_like(top), torch.zeros_like(top)
        for start in range(0, vocab_size, columns):
            stop = min(start + columns, vocab_size)
            logits = _logits(hidden, weight, bias, temperatures, start, stop)
            inside = (targets >= start) & (targets < stop)
            at = (targets - start).clamp(0, stop - start - 1)
            chosen = torch.where(inside, logits.gather(1, at[:, None])[:, 0], chosen)
            # exp() relative to the largest logit so far; what was summed before is brought to the new one.
            larger = torch.maximum(top, logits.amax(1))
            shrink = (top - larger).exp()
            odds = (logits - larger[:, None]).exp_()
            total = total * shrink + odds.sum(1)
            moment = moment * shrink + torch.linalg.vecdot(odds, logits)
            top = larger
        normaliser = top + total.log()
        entropies = normaliser - moment / total
        ctx.save_for_backward(hidden, weight, bias, targets, temperatures, normaliser, entropies)
        ctx.vocab_size, ctx.columns = vocab_size, columns
        # An entropy that no loss uses costs nothing in the backward pass.
        ctx.set_materialize_grads(False)
        return chosen - normaliser, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_logprob: Tensor | None, by_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        """With p = softmax(z): d logprob / dz = onehot - p, d entropy / dz = -p (log p + entropy)."""
        hidden, weight, bias, targets, temperatures, normaliser, entropies = ctx.saved_tensors
        hidden_wanted, weight_wanted, bias_wanted = ctx.needs_input_grad[:3]
        dtype = _product_dtype(hidden)
        rows_in = hidden.to(dtype)
        of_hidden = torch.zeros_like(hidden, dtype=torch.float32) if hidden_wanted else None
        of_weight = torch.zeros_like(weight) if weight_wanted else None
        of_bias = torch.zeros_like(bias) if bias_wanted else None
        for start in range(0, ctx.vocab_size, ctx.columns):
            stop = min(start + ctx.columns, ctx.vocab_size)
            logits = _logits(hidden, weight, bias, temperatures, start, stop)
            logprobs = logits.sub_(normaliser[:, None])
            gradient = torch.zeros_like(logprobs)
            if by_entropy is not None:
                gradient += (logprobs + entropies[:, None]).mul_(-by_entropy[:, None])
            if by_logprob is not None:
                gradient -= by_logprob[:, None]
            gradient *= logprobs.exp_()
            if by_logprob is not None:
                inside = (targets >= start) & (targets < stop)
                at = (targets - start).clamp(0, stop - start - 1)[:, None]
                gradient.scatter_(1, at, gradient.gather(1, at) + (by_logprob * inside)[:, None])
            gradient = gradient.div_(temperatures[:, None]).to(dtype)
            if of_hidden is not None:
                of_hidden += gradient @ weight[start:stop].to(dtype)
            if of_weight is not None:
                of_weight[start:stop] = gradient.T @ rows_in
            if of_bias is not None:
                of_bias[start:stop] = gradient.sum(0)
        of_hidden = None if of_hidden is None else of_hidden.to(hidden.dtype)
        return of_hidden, of_weight, of_bias, None, None, None, None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperatures: Tensor, start: int, stop: int) -> Tensor:
    """float32 [T, stop - start], a tensor of its own."""
    dtype = _product_dtype(hidden)
    part = None if bias is None else bias[start:stop].to(dtype)
    logits = F.linear(hidden.to(dtype), weight[start:stop].to(dtype), part)
    return logits.float().div_(temperatures[:, None])


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """Matrix products in bfloat16 are many times slower than in float32 on most CPUs, and less exact."""
    return torch.float32 if hidden.device.type == "cpu" else hidden.dtype
