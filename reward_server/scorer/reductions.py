"""How the values of a completion's tokens become one number, beyond their mean."""

import math
from collections.abc import Callable

import numpy as np

LOWEST_SHARE = 0.1
"""Of the windows, for `bottom_10`."""


def mean_of_highest(values: np.ndarray, share: float) -> float:
    """The mean of the highest `share` of the values (0 < share <= 1; at least one value)."""
    count = math.ceil(share * len(values))
    return float(np.partition(values, len(values) - count)[len(values) - count :].mean())


def window_means(values: np.ndarray, window: int) -> np.ndarray:
    """Means of every `window` consecutive values; of fewer values than that, the one mean of them all."""
    width = min(window, len(values))
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    return (sums[width:] - sums[:-width]) / width


def lowest_group(values: np.ndarray, window: int) -> float:
    """The mean of the window in which it is lowest."""
    return float(window_means(values, window).min())


def bottom_10(values: np.ndarray, window: int) -> float:
    """The mean of the lowest tenth of the window means (rounded down, at least one)."""
    means = np.sort(window_means(values, window))
    return float(means[: max(1, int(LOWEST_SHARE * len(means)))].mean())


def tail(values: np.ndarray, window: int) -> float:
    """The mean of the last `window` values, of all where there are fewer."""
    return float(values[-window:].mean())


AGGREGATES: dict[str, Callable[[np.ndarray, int], float]] = {
    "mean": lambda values, _window: float(values.mean()),
    "lowest_group": lowest_group,
    "bottom_10": bottom_10,
    "tail": tail,
}
"""DeepConf's (arXiv 2508.15260), of at least one value; its groups are windows that slide by one token."""
