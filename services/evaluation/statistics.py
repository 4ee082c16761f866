"""pass@k, and tests of differences: between two models on the same items, between two arms of several runs.

What is drawn is drawn by a seed: the same values give the same p.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 10_000
MOST_EXACT = 20_000
"""Rearrangements that are enumerated; of more, `RESAMPLES` are drawn."""
CELLS = 2**22
"""Numbers drawn at once, to bound memory."""


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that of k answers drawn from n, c of them right, at least one is right: 1 - C(n - c, k) / C(n, k), the
    unbiased estimator of Chen et al. (arXiv 2107.03374, eq. 1)."""
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n (got n {n}, c {c}, k {k})")
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def mcnemar(ours: ArrayLike, theirs: ArrayLike) -> float:
    """Two-sided p of McNemar's exact test on paired 0/1 values: of the items where the two differ, either side is
    as likely (a binomial test with 1/2). 1 where they differ nowhere."""
    ours, theirs = np.asarray(ours, bool), np.asarray(theirs, bool)
    only_ours, only_theirs = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    n, least = only_ours + only_theirs, min(only_ours, only_theirs)
    tail = ways = 1  # whole numbers up to the division: no rounding, however many items
    for i in range(least):
        ways = ways * (n - i) // (i + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**n)


def sign_flips(differences: ArrayLike, seed: int = 0) -> float:
    """Two-sided p of the paired permutation test: under no difference, each item's could as well have the other sign.

    Exact for few items; else from `RESAMPLES` draws, the observed one counted among them.
    """
    given = np.asarray(differences, np.float64)
    given = given[given != 0]
    if not len(given):
        return 1.0
    observed = abs(given.sum()) * (1 - 1e-12)
    if 2 ** len(given) <= MOST_EXACT:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=len(given))))
        return float((np.abs(signs @ given) >= observed).mean())
    random, rows, reached = np.random.default_rng(seed), max(1, CELLS // len(given)), 0
    for start in range(0, RESAMPLES, rows):
        signs = random.choice((-1.0, 1.0), (min(rows, RESAMPLES - start), len(given)))
        reached += int((np.abs(signs @ given) >= observed).sum())
    return (reached + 1) / (RESAMPLES + 1)


def permutation(ours: Sequence[float], theirs: Sequence[float], seed: int = 0) -> float:
    """Two-sided p of a permutation test of the difference of means of two independent samples (runs with several
    seeds): under no difference any split of the pooled values is as likely. Exact for few values; else drawn.

    It cannot fall below 1 / C(n + m, n), or twice that with sides of equal size: with three runs a side that is 0.1.
    """
    pooled, n = np.array([*ours, *theirs], np.float64), len(ours)
    if not n or n == len(pooled):
        raise ValueError("both sides need a value")
    total = pooled.sum()

    def difference(left: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.abs(left / n - (total - left) / (len(pooled) - n))

    observed = difference(pooled[:n].sum()) - 1e-12 * max(1.0, float(np.abs(pooled).max()))
    if math.comb(len(pooled), n) <= MOST_EXACT:
        sums = np.array([pooled[list(chosen)].sum() for chosen in itertools.combinations(range(len(pooled)), n)])
        return float((difference(sums) >= observed).mean())
    random = np.random.default_rng(seed)
    sums = np.array([random.permutation(pooled)[:n].sum() for _ in range(RESAMPLES)])
    return (int((difference(sums) >= observed).sum()) + 1) / (RESAMPLES + 1)
