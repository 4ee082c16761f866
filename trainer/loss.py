"""The objective, token by token: pure functions of tensors, no model and no device in sight.

A step minimises J = sum over completion tokens t of w_t * l_t with

    l_t = -c_t * min(r_t * A, clip(r_t, 1 - clip_low, 1 + clip_high) * A) + beta * k3_t

- r_t = exp(logp_t - old_t), the PPO ratio and its clipped surrogate (Schulman et al. 2017, arXiv 1707.06347, eq. 7),
  with the group's advantage A as GRPO uses it (Shao et al. 2024, arXiv 2402.03300, eq. 3);
- c_t, the truncated importance weight from the rollout's policy to the trainer's (Yao et al. 2025, "Your efficient RL
  framework secretly brings you off-policy RL training"), a constant to the gradient;
- k3_t, Schulman's estimator of KL(policy || reference) ("Approximating KL divergence", 2020);
- w_t, from `token_weights`: with the weights fixed over the whole step, J and its gradient do not depend on how the
  tokens are split into micro-batches and ranks.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Aggregation = Literal["per_sequence", "token_mean"]

LOG_RATIO_BOUND = 20.0
"""exp() of larger differences of logprobs overflows the sums it goes into; e^20 is far outside any clip or cap."""


@dataclass(frozen=True)
class Terms:
    """What one token contributes, each of shape [T]. Only `loss` carries a gradient."""

    loss: Tensor
    kl: Tensor
    clipped: Tensor
    importance: Tensor
    truncated: Tensor


def token_weights(lengths: np.ndarray, aggregation: Aggregation) -> np.ndarray:
    """The weight of every token of a completion, for completions of `lengths` [N] tokens (all >= 1) -> float64 [N].

    `per_sequence`: mean over completions of the mean over their tokens, 1 / (N |o_i|). `token_mean`: 1 / sum_i |o_i|.
    """
    if aggregation == "per_sequence":
        return 1.0 / (len(lengths) * lengths.astype(np.float64)) if len(lengths) else np.zeros(0)
    return np.full(len(lengths), 1.0 / max(int(lengths.sum()), 1))


def ratio(logprobs: Tensor, other: Tensor) -> Tensor:
    """exp(logprobs - other), with the difference held within +-20."""
    return (logprobs - other).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """exp(d) - d - 1 with d = reference - logprobs: >= 0, unbiased for KL(policy || reference) under the policy."""
    difference = (reference - logprobs).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return difference.exp() - difference - 1


def clipped_surrogate(
    logprobs: Tensor, old: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """min(r A, clip(r) A), to be maximised, and where the clip holds (where the gradient is cut)."""
    r = ratio(logprobs, old)
    free = r * advantages
    held = r.clamp(1 - clip_low, 1 + clip_high) * advantages
    return torch.minimum(free, held), held < free


def importance_weight(old: Tensor, rollout: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """min(exp(old - rollout), cap), without gradient, and where it was cut."""
    weight = ratio(old.detach(), rollout)
    return weight.clamp(max=cap), weight > cap


def token_losses(
    logprobs: Tensor,
    rollout: Tensor,
    advantages: Tensor,
    reference: Tensor | None,
    *,
    old_logprobs: Literal["recomputed", "rollout"],
    clip_low: float,
    clip_high: float,
    importance_cap: float | None,
    kl_beta: float,
) -> Terms:
    """l_t of every token; all inputs [T] float32 (or float64), `reference` none when there is no KL term.

    A batch gets a single optimizer step, so the `recomputed` old logprobs are the policy's own, detached: r is 1 and
    its gradient is that of logp. Against the `rollout`'s logprobs the ratio itself corrects, and no importance weight
    is due.
    """
    recomputed = old_logprobs == "recomputed"
    old = logprobs.detach() if recomputed else rollout
    surrogate, clipped = clipped_surrogate(logprobs, old, advantages, clip_low, clip_high)
    if recomputed and importance_cap is not None:
        importance, truncated = importance_weight(old, rollout, importance_cap)
    else:
        importance, truncated = torch.ones_like(rollout), torch.zeros_like(clipped)
    loss = -importance * surrogate
    if reference is None:
        return Terms(loss, torch.zeros_like(rollout), clipped, importance, truncated)
    kl = k3(logprobs, reference)
    return Terms(loss + kl_beta * kl, kl.detach(), clipped, importance, truncated)
