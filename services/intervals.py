"""Confidence intervals by the bootstrap, over tasks: the completions of one task are not independent, the tasks are."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 2000


class Interval(NamedTuple):
    """A mean and where it lies, from `low` to `high`."""

    mean: float
    low: float
    high: float

    @property
    def is_noise(self) -> bool:
        """Whether a difference of 0 is as good an explanation."""
        return self.low <= 0 <= self.high


def interval(values: ArrayLike, level: float = 0.95, seed: int = 0) -> Interval | None:
    """The mean of one value a task, and the percentile bootstrap's interval of it (Efron 1979); none for fewer than
    two, which have no spread to go by.

    The same values and seed give the same interval. For a difference on the same tasks, hand over the differences.
    """
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return None
    drawn = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    tail = 50 * (1 - level)
    low, high = np.percentile(values[drawn].mean(axis=1), [tail, 100 - tail])
    return Interval(float(values.mean()), float(low), float(high))
