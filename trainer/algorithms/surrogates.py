"""What is maximised per token, given the policy's ratio r and the advantage A, all [T].

Each returns (surrogate, where its gradient or its weight was held back).
"""

import torch
from torch import Tensor

from services.algorithms import Objective


def clip(logprobs: Tensor, r: Tensor, advantages: Tensor, settings: Objective) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    """min(r A, clip(r, 1 - clip_low, 1 + clip_high) A): PPO's (Schulman et al. 2017, arXiv 1707.06347, eq. 7), with
    the two ends apart as in DAPO (arXiv 2503.14476, eq. 8).

    With `dual_clip` c, where A < 0: the larger of that and c A (Ye et al. 2020, arXiv 1912.09729, section "Dual-clip").
    """
    free = r * advantages
    cut = r.clamp(1 - settings.clip_low, 1 + settings.clip_high) * advantages
    surrogate, held = torch.minimum(free, cut), cut < free
    if settings.dual_clip is None:
        return surrogate, held
    floor = settings.dual_clip * advantages
    below = (advantages < 0) & (surrogate < floor)
    return torch.where(below, floor, surrogate), held | below


def cispo(logprobs: Tensor, r: Tensor, advantages: Tensor, settings: Objective) -> tuple[Tensor, Tensor]:
    """sg(clip(r, 1 - clip_low, 1 + clip_high)) A logprob (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5): the weight is
    held, the token keeps its gradient."""
    weight = r.detach().clamp(1 - settings.clip_low, 1 + settings.clip_high)
    return weight * advantages * logprobs, weight != r.detach()


def none(logprobs: Tensor, r: Tensor, advantages: Tensor, settings: Objective) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    """r A: at r = 1 its gradient is REINFORCE's, A grad logprob."""
    return r * advantages, torch.zeros_like(r, dtype=torch.bool)


SURROGATES = {"clip": clip, "cispo": cispo, "none": none}
