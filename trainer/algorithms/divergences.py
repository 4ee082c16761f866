"""Estimators of KL(policy || reference) from one sampled token each (Schulman, "Approximating KL divergence", 2020).

With d = reference - logprobs, [T]. As a term of the loss what counts is the gradient, and its mean under the policy
itself; on tokens that another policy sampled none of the three keeps that mean (docs/algorithms.md).
"""

from torch import Tensor

from trainer.algorithms.ratios import LOG_RATIO_BOUND


def k1(logprobs: Tensor, reference: Tensor) -> Tensor:
    """-d: unbiased, of either sign. Its gradient, grad logprob, has mean 0: a loss of k1 holds nothing back."""
    return logprobs - reference


def k2(logprobs: Tensor, reference: Tensor) -> Tensor:
    """d^2 / 2. Its gradient, -d grad logprob, is that of KL(policy || reference) in the mean."""
    return (reference - logprobs).square() / 2


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """exp(d) - d - 1: unbiased, >= 0. Its gradient, (1 - exp(d)) grad logprob, is that of KL(reference || policy)."""
    # From above alone: where the policy has run far away from the reference (d << 0), the pull back must stay.
    difference = (reference - logprobs).clamp(max=LOG_RATIO_BOUND)
    return difference.exp() - difference - 1


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}
