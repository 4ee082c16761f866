"""The objective, token by token: pure functions of tensors, no model and no device in sight.

An update minimises J = sum over completion tokens t of w_t * l_t with

    l_t = -c_t * surrogate(r_t, A_t) + kl_beta * kl_t - entropy_bonus * H_t

- surrogate and r_t, the policy's ratio to the old policy: trainer/algorithms/surrogates.py and ratios.py, with the
  group's advantage A as GRPO uses it (Shao et al. 2024, arXiv 2402.03300, eq. 3);
- c_t, the truncated or masked importance weight from the rollout's policy to the trainer's (Yao et al. 2025, "Your
  efficient RL framework secretly brings you off-policy RL training"), a constant to the gradient;
- kl_t, an estimate of KL(policy || reference): trainer/algorithms/divergences.py;
- H_t, the policy's entropy where it chose token t;
- w_t, from `token_weights`: with the weights fixed over the whole update, J and its gradient do not depend on how the
  sequences are split into micro-batches and ranks.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from services.algorithms import Aggregation, Objective
from trainer.algorithms.divergences import ESTIMATORS, k3
from trainer.algorithms.ratios import importance_weight, policy_ratio
from trainer.algorithms.surrogates import SURROGATES


@dataclass(frozen=True)
class Terms:
    """What one token contributes, each of shape [T]. Only `loss` carries a gradient. `kl` is k3, whatever estimator
    the loss has."""

    loss: Tensor
    kl: Tensor
    clipped: Tensor
    importance: Tensor
    truncated: Tensor


def token_weights(lengths: np.ndarray, aggregation: Aggregation, constant: int | None = None) -> np.ndarray:
    """The weight of every token of a completion, for completions of `lengths` [N] tokens (all >= 1) -> float64 [N].

    `per_sequence`: mean over completions of the mean over their tokens, 1 / (N |o_i|) (GRPO, eq. 3). `token_mean`:
    1 / sum_i |o_i| (DAPO, arXiv 2503.14476, eq. 8). `constant`: 1 / (N constant) (Dr. GRPO, arXiv 2503.20783, which
    leaves |o_i| out; a constant of 1 sums over a completion's tokens, as RLOO does).
    """
    count = max(len(lengths), 1)
    if aggregation == "per_sequence":
        return 1.0 / (count * lengths.astype(np.float64))
    if aggregation == "token_mean":
        return np.full(len(lengths), 1.0 / max(int(lengths.sum()), 1))
    assert constant is not None
    return np.full(len(lengths), 1.0 / (count * constant))


def token_losses(
    logprobs: Tensor,
    rollout: Tensor,
    advantages: Tensor,
    segments: Tensor,
    settings: Objective,
    *,
    old: Tensor | None = None,
    reference: Tensor | None = None,
    entropies: Tensor | None = None,
) -> Terms:
    """l_t of every token of whole sequences; all inputs [T] float32 (or float64), `segments` int64.

    `old`: the proximal logprobs, of the policy before the step's first update; none in that update itself, where they
    are the policy's own, detached: r is 1 then and its gradient is that of logp. With `old_logprobs: rollout` the ratio
    itself corrects for the rollout's policy, and no importance weight is due. Without `reference` there is no KL term;
    `entropies` are needed where there is a bonus on them.
    """
    recomputed = settings.old_logprobs == "recomputed"
    proximal = rollout if not recomputed else logprobs.detach() if old is None else old
    r = policy_ratio(logprobs, proximal, segments, settings.policy_ratio)
    surrogate, clipped = SURROGATES[settings.surrogate](logprobs, r, advantages, settings)
    importance, truncated = torch.ones_like(rollout), torch.zeros_like(clipped)
    if recomputed and settings.importance is not None:
        importance, truncated = importance_weight(proximal, rollout, segments, settings.importance)
    loss = -importance * surrogate
    kl = torch.zeros_like(rollout)
    if reference is not None:
        kl = k3(logprobs.detach(), reference)
        loss = loss + settings.kl_beta * ESTIMATORS[settings.kl_estimator](logprobs, reference)
    if settings.entropy_bonus > 0:
        assert entropies is not None
        loss = loss - settings.entropy_bonus * entropies
    return Terms(loss, kl, clipped, importance, truncated)
