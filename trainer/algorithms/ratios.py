"""How much likelier one policy makes what another sampled: by token, or by sequence.

Tensors are flat, [T] tokens of whole sequences; `segments` int64 [T] numbers the sequence of each token from 0.
"""

import torch
from torch import Tensor

from services.algorithms import Importance, Level

LOG_RATIO_BOUND = 20.0
"""exp() of larger differences of logprobs overflows the sums it goes into; e^20 is far outside any clip or cap."""


def bounded(difference: Tensor) -> Tensor:
    return difference.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def ratio(logprobs: Tensor, other: Tensor) -> Tensor:
    """exp(logprobs - other), with the difference held within +-20."""
    return bounded(logprobs - other).exp()


def sequence_sum(values: Tensor, segments: Tensor) -> Tensor:
    """The sum over each token's sequence, at every one of its tokens: [T] -> [T]."""
    return torch.zeros_like(values).index_add(0, segments, values)[segments]


def policy_ratio(logprobs: Tensor, old: Tensor, segments: Tensor, level: Level) -> Tensor:
    """`token`: r_t = exp(logprobs_t - old_t). `sequence`: GSPO's s_i, the geometric mean of a sequence's r_t
    (arXiv 2507.18071, eq. 7), at every one of its tokens, with the gradient of all of them."""
    if level == "token":
        return ratio(logprobs, old)
    lengths = sequence_sum(torch.ones_like(logprobs), segments)
    return bounded(sequence_sum(logprobs - old, segments) / lengths).exp()


def importance_weight(old: Tensor, rollout: Tensor, segments: Tensor, settings: Importance) -> tuple[Tensor, Tensor]:
    """exp(old - rollout), of a token or multiplied over its sequence, truncated or masked -> (weight, where it was cut
    or dropped). A constant: it has no gradient."""
    difference = (old - rollout).detach()
    if settings.level == "sequence":
        difference = sequence_sum(difference, segments)
    weight = bounded(difference).exp()
    if settings.mode == "truncate":
        return weight.clamp(max=settings.high), weight > settings.high
    dropped = weight > settings.high
    if settings.low is not None:
        dropped |= weight < settings.low
    return weight.masked_fill(dropped, 0.0), dropped
