"""What the trainer does to advantages before the loss: over the tokens of a whole batch, so in numpy, before it is
dealt out to ranks and micro-batches."""

import numpy as np

from services.algorithms import ClipCov

WHITEN_EPS = 1e-8


def whiten(advantages: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Advantages [N] of completions of `lengths` [N] tokens, less their mean, over their standard deviation, both over
    all tokens (REINFORCE++, arXiv 2501.03262: normalised over D_batch) -> float32 [N]; zeros where all are equal."""
    if len(advantages) == 0:
        return advantages
    values = advantages.astype(np.float64)
    centred = values - np.average(values, weights=lengths)
    deviation = np.sqrt(np.average(centred**2, weights=lengths))
    return (centred / (deviation + WHITEN_EPS)).astype(np.float32)


def clip_cov(logprobs: np.ndarray, advantages: np.ndarray, settings: ClipCov, rng: np.random.Generator) -> np.ndarray:
    """Which tokens get no policy gradient (Cui et al. 2025, arXiv 2505.22617, Clip-Cov) -> bool [T].

    `share` of all tokens, at least one, drawn from those whose (logprob - mean) (advantage - mean) lies between `low`
    and `high`; all of these when they are fewer. `logprobs` and `advantages` [T].
    """
    cut = np.zeros(len(logprobs), bool)
    if len(logprobs) == 0:
        return cut
    one, other = logprobs.astype(np.float64), advantages.astype(np.float64)
    covariance = (one - one.mean()) * (other - other.mean())
    candidates = np.flatnonzero((covariance > settings.low) & (covariance < settings.high))
    count = min(len(candidates), max(1, int(settings.share * len(logprobs))))
    cut[rng.choice(candidates, count, replace=False)] = True
    return cut
