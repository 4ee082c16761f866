"""The objective in float64, by loops over sequences and tokens: key by key, and algorithm by algorithm from the papers.

A loss is a scalar with a graph back to the sequences' `logprobs` (and `entropies`): its gradient is autograd's of these
loops.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Sequence:
    """One completion of n tokens, all float64 [n]; `old` none where the policy's own, detached, are meant."""

    logprobs: Tensor
    rollout: Tensor
    advantage: float
    old: Tensor | None = None
    reference: Tensor | None = None
    entropies: Tensor | None = None


def loss(sequences: list[Sequence], settings) -> Tensor:
    """By the keys of the recipe's trainer section."""
    total = torch.zeros((), dtype=torch.float64)
    tokens = sum(len(sequence.logprobs) for sequence in sequences)
    for sequence in sequences:
        length = len(sequence.logprobs)
        weight = {
            "per_sequence": 1 / len(sequences) / length,
            "token_mean": 1 / tokens,
            "constant": 1 / len(sequences) / (settings.aggregation_length or 1),
        }[settings.aggregation]
        for each in token_losses(sequence, settings):
            total = total + weight * each
    return total


def old_of(sequence: Sequence, settings) -> Tensor:
    if settings.old_logprobs == "rollout":
        return sequence.rollout
    return sequence.logprobs.detach() if sequence.old is None else sequence.old


def token_losses(sequence: Sequence, settings) -> list[Tensor]:
    old, found = old_of(sequence, settings), []
    log_ratios = [sequence.logprobs[t] - old[t] for t in range(len(old))]
    mean_log_ratio = sum(log_ratios) / len(log_ratios)
    gaps = [(old[t] - sequence.rollout[t]).item() for t in range(len(old))]
    for t, log_ratio in enumerate(log_ratios):
        r = torch.exp(mean_log_ratio if settings.policy_ratio == "sequence" else log_ratio)
        value = -importance(gaps, t, settings) * surrogate(r, sequence.logprobs[t], sequence.advantage, settings)
        if sequence.reference is not None:
            value = value + settings.kl_beta * kl(sequence.reference[t] - sequence.logprobs[t], settings.kl_estimator)
        if settings.entropy_bonus:
            value = value - settings.entropy_bonus * sequence.entropies[t]
        found.append(value)
    return found


def importance(gaps: list[float], t: int, settings) -> float:
    how = settings.importance
    if settings.old_logprobs == "rollout" or how is None:
        return 1.0
    weight = math.exp(gaps[t] if how.level == "token" else sum(gaps))
    if how.mode == "truncate":
        return min(weight, how.high)
    return weight if (how.low or 0.0) <= weight <= how.high else 0.0


def surrogate(r: Tensor, logprob: Tensor, advantage: float, settings) -> Tensor:
    held = min(max(r.item(), 1 - settings.clip_low), 1 + settings.clip_high)
    if settings.surrogate == "none":
        return r * advantage
    if settings.surrogate == "cispo":
        return held * advantage * logprob
    best = (
        r * advantage
        if r.item() * advantage <= held * advantage
        else torch.tensor(held * advantage, dtype=torch.float64)
    )
    if settings.dual_clip is not None and advantage < 0 and best.item() < settings.dual_clip * advantage:
        return torch.tensor(settings.dual_clip * advantage, dtype=torch.float64)
    return best


def kl(d: Tensor, estimator: str) -> Tensor:
    return {"k1": -d, "k2": d * d / 2, "k3": torch.exp(d) - d - 1}[estimator]


# ---- the papers: objectives J to be maximised, with pi = exp(logprobs), on what the old policy sampled --------------


def grpo(batch: list[Sequence], beta: float) -> Tensor:
    """DeepSeekMath, arXiv 2402.03300, eq. 3 and 4: eps 0.2."""
    total = torch.zeros((), dtype=torch.float64)
    for o in batch:
        inner = torch.zeros((), dtype=torch.float64)
        for t in range(len(o.logprobs)):
            r = o.logprobs[t].exp() / o.old[t].exp()
            odds = o.reference[t].exp() / o.logprobs[t].exp()
            divergence = odds - torch.log(odds) - 1
            inner = inner + torch.min(r * o.advantage, torch.clip(r, 0.8, 1.2) * o.advantage) - beta * divergence
        total = total + inner / len(o.logprobs)
    return total / len(batch)


def dr_grpo(batch: list[Sequence], length: int) -> Tensor:
    """arXiv 2503.20783: GRPO without 1/|o_i|; a constant length in its place, as its listing has it. No KL."""
    total = torch.zeros((), dtype=torch.float64)
    for o in batch:
        for t in range(len(o.logprobs)):
            r = torch.exp(o.logprobs[t] - o.old[t])
            total = total + torch.min(r * o.advantage, torch.clip(r, 0.8, 1.2) * o.advantage)
    return total / length / len(batch)


def dapo(batch: list[Sequence]) -> Tensor:
    """arXiv 2503.14476, eq. 8: eps_low 0.2, eps_high 0.28, over all tokens."""
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for o in batch:
        for t in range(len(o.logprobs)):
            r = torch.exp(o.logprobs[t] - o.old[t])
            total = total + torch.min(r * o.advantage, torch.clip(r, 0.8, 1.28) * o.advantage)
            tokens += 1
    return total / tokens


def gspo(batch: list[Sequence]) -> Tensor:
    """arXiv 2507.18071, eq. 5 and 7: s_i = (pi(y) / pi_old(y))^(1/|y|), clipped to 1 - 3e-4 .. 1 + 4e-4."""
    total = torch.zeros((), dtype=torch.float64)
    for o in batch:
        s = (o.logprobs.sum().exp() / o.old.sum().exp()) ** (1 / len(o.logprobs))
        total = total + torch.min(s * o.advantage, torch.clip(s, 1 - 3e-4, 1 + 4e-4) * o.advantage)
    return total / len(batch)


def rloo(batch: list[Sequence], beta: float) -> Tensor:
    """arXiv 2402.14740: A_i log pi(y_i) of whole completions; its KL, there part of the reward, as beta k2."""
    total = torch.zeros((), dtype=torch.float64)
    for o in batch:
        total = total + o.advantage * o.logprobs.sum()
        total = total - beta * ((o.logprobs - o.reference) ** 2 / 2).sum()
    return total / len(batch)


def reinforce_pp(batch: list[Sequence], beta: float) -> Tensor:
    """arXiv 2501.03262: PPO's clip with advantages normalised over the tokens of the batch; its KL as beta k2."""
    values = [o.advantage for o in batch for _ in o.logprobs]
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
    total = torch.zeros((), dtype=torch.float64)
    for o in batch:
        a = (o.advantage - mean) / deviation
        for t in range(len(o.logprobs)):
            r = torch.exp(o.logprobs[t] - o.old[t])
            total = total + torch.min(r * a, torch.clip(r, 0.8, 1.2) * a)
            total = total - beta * (o.logprobs[t] - o.reference[t]) ** 2 / 2
    return total / len(values)


def cispo(batch: list[Sequence]) -> Tensor:
    """MiniMax-M1, arXiv 2506.13585, eq. 4 and 5: no lower bound, IS weights up to 5."""
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for o in batch:
        for t in range(len(o.logprobs)):
            weight = torch.exp(o.logprobs[t] - o.old[t]).clamp(max=5.0).detach()
            total = total + weight * o.advantage * o.logprobs[t]
            tokens += 1
    return total / tokens
