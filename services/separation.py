"""Does a number tell right completions from wrong ones? And the answers it would pick.

Functions of plain arrays, in float64. A group is the completions of one task: a number for each (self-certainty, say),
and whether it is right. Means over groups count every group once.
"""

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Answer = TypeVar("Answer", bound=Hashable)


class Separation(NamedTuple):
    """`r`: effect size from -1 to 1, above 0 where right values are higher; `p`: of no difference, one-sided."""

    r: float
    p: float


def _mean_ranks(values: Floats) -> tuple[Floats, NDArray[np.int64]]:
    """(rank of each value, 1 the lowest, equal ones sharing the mean of theirs; how often each distinct one occurs)."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places], counts


def _wins(right: Floats, wrong: Floats) -> float:
    """The Mann-Whitney U of `right`: pairs in which it is above `wrong`, equal ones counting half. A sort's cost."""
    ranks, _ = _mean_ranks(np.concatenate([right, wrong]))
    return float(ranks[: len(right)].sum()) - len(right) * (len(right) + 1) / 2


def auc(right: ArrayLike, wrong: ArrayLike) -> float | None:
    """How often a right answer's value is above a wrong one's, ties counting half (the Mann-Whitney statistic over the
    number of pairs); none where either is missing."""
    right, wrong = np.asarray(right, np.float64), np.asarray(wrong, np.float64)
    if not len(right) or not len(wrong):
        return None
    return _wins(right, wrong) / (len(right) * len(wrong))


def mann_whitney_r(right: ArrayLike, wrong: ArrayLike) -> Separation | None:
    """r = Z / sqrt(N), Z the normal approximation of U with the correction for ties, N the number of values; none where
    either side is missing. (The rank-biserial correlation is another r: 2 auc - 1.)

    Intuitor's figure 8 (arXiv 2505.19590) gives an r and a p for 500 answers each: all four pairs fit Z / sqrt(500) and
    a one-sided p, and none but that.
    """
    right, wrong = np.asarray(right, np.float64), np.asarray(wrong, np.float64)
    if not len(right) or not len(wrong):
        return None
    count, pairs = len(right) + len(wrong), len(right) * len(wrong)
    _, ties = _mean_ranks(np.concatenate([right, wrong]))
    variance = pairs / 12 * (count + 1 - float((ties.astype(np.float64) ** 3 - ties).sum()) / (count * (count - 1)))
    if variance <= 0:  # all values are equal
        return Separation(0.0, 0.5)
    z = (_wins(right, wrong) - pairs / 2) / math.sqrt(variance)
    return Separation(z / math.sqrt(count), math.erfc(z / math.sqrt(2)) / 2)


# ---- inside groups ---------------------------------------------------------------------------------------------


def group_auc(values: ArrayLike, right: ArrayLike) -> float | None:
    """`auc` of one group, `right` parallel to `values`; none where all are right or all are wrong."""
    values, is_right = np.asarray(values, np.float64), np.asarray(right, bool)
    return auc(values[is_right], values[~is_right])


def in_group_auc(values: Sequence[ArrayLike], right: Sequence[ArrayLike]) -> float | None:
    """Mean over the groups that have both right and wrong completions; none where no group has.

    An advantage is relative to its own group, so this is what a reward can teach. The AUC over all completions at once
    also counts what the values know of the difficulty of the tasks.
    """
    found = [group_auc(*group) for group in zip(values, right, strict=True)]
    kept = [area for area in found if area is not None]
    return math.fsum(kept) / len(kept) if kept else None


def without_length(values: Sequence[ArrayLike], lengths: Sequence[ArrayLike]) -> list[Floats]:
    """What length does not explain of the values: each less its group's mean, and less what a straight line through
    all groups, centred, says of its length (ordinary least squares: one slope, a mean of its own for every group).

    `in_group_auc` of it tells whether a value separates beyond length. Regressed and not matched, because of eight
    completions hardly any two, a right and a wrong one, are of the same length; one slope for all groups, because one
    fitted to eight values explains a seventh of pure noise. Only a linear effect is taken out, and where length and
    being right go together it takes that part of the separation with it.
    """
    ys, xs = ([_centred(group) for group in groups] for groups in (values, lengths))
    square = math.fsum(float(x @ x) for x in xs)
    slope = math.fsum(float(x @ y) for x, y in zip(xs, ys, strict=True)) / square if square else 0.0
    return [y - slope * x for x, y in zip(xs, ys, strict=True)]


def _centred(values: ArrayLike) -> Floats:
    values = np.asarray(values, np.float64)
    return values - values.mean() if len(values) else values


# ---- picking ---------------------------------------------------------------------------------------------------


def best_of_n(values: ArrayLike, right: ArrayLike) -> float | None:
    """Chance that the completion of the highest value is right, one drawn among equals; none without completions."""
    values, right = np.asarray(values, np.float64), np.asarray(right, np.float64)
    return float(right[values == values.max()].mean()) if len(values) else None


def borda_weights(certainties: ArrayLike, power: float) -> Floats:
    """(n - rank + 1) ** power, rank 1 the most certain of n, equal ones sharing the mean of their ranks: the weight of
    a vote in Kang et al., arXiv 2502.18581. With `power` 0 every vote counts the same."""
    return _mean_ranks(np.asarray(certainties, np.float64))[0] ** power


def borda_vote(answers: Sequence[Answer | None], certainties: ArrayLike, power: float) -> list[Answer]:
    """The answers with the greatest sum of `borda_weights`: one, or several in order of appearance. None is no answer
    and no vote: ranks are among those who vote. With `power` 0 it is the majority vote."""
    votes = [
        (answer, value)
        for answer, value in zip(answers, np.asarray(certainties, np.float64), strict=True)
        if answer is not None
    ]
    cast: dict[Answer, list[float]] = {}
    for (answer, _), weight in zip(votes, borda_weights([value for _, value in votes], power), strict=True):
        cast.setdefault(answer, []).append(float(weight))
    sums = {answer: math.fsum(weights) for answer, weights in cast.items()}
    most = max(sums.values(), default=0.0)
    return [answer for answer, total in sums.items() if total == most]
