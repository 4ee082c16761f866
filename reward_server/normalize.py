"""Normalising one reward inside its group.

Sums are exactly rounded (`math.fsum`), so the order of the completions changes no bit of the result.
"""

import math
from collections.abc import Sequence

from services.spec import Normalize

LIMIT = 3.0e38
"""Rewards and advantages are cut to this magnitude: beyond it they are no longer finite in float32."""


def bounded(value: float) -> float:
    return max(-LIMIT, min(LIMIT, value))


def scale_of(values: Sequence[float]) -> float:
    """A power of two near the largest magnitude: dividing by it rounds nothing and keeps sums and squares in range."""
    largest = max(abs(value) for value in values)
    return math.ldexp(1.0, math.frexp(largest)[1] - 1) if largest else 1.0


def _group_std(values: Sequence[float], eps: float) -> list[float]:
    scale = scale_of(values)
    scaled = [value / scale for value in values]
    mean = math.fsum(scaled) / len(scaled)
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in scaled) / (len(scaled) - 1))
    spread = std + eps / scale
    return [(value - mean) / spread if spread > 0 else 0.0 for value in scaled]


def _deviations(values: Sequence[float]) -> list[float]:
    scale = scale_of(values)
    mean = math.fsum(value / scale for value in values) / len(values)
    return [bounded((value / scale - mean) * scale) for value in values]


def _ranks(values: Sequence[float]) -> list[float]:
    """-1 for the lowest, 1 for the highest, evenly spaced; equal values share the mean of their ranks."""
    ordered = sorted(values)
    first = {value: place for place, value in reversed(list(enumerate(ordered)))}
    last = {value: place for place, value in enumerate(ordered)}
    return [(first[value] + last[value]) / (len(values) - 1) - 1.0 for value in values]


def normalize(values: Sequence[float | None], how: Normalize, eps: float = 1e-4) -> list[float | None]:
    """Normalise one reward inside its group; None (missing) stays None and enters no statistic.

    With x the n present values: `group_std` (x - mean) / (std + eps), std with ddof 1; `group_mean` x - mean;
    `leave_one_out` x - mean of the others; `rank` evenly spaced from -1 to 1; `none` x. Except for `none`, a single
    value and values that are all equal give exactly 0. Results are finite.
    """
    present = [value for value in values if value is not None]
    if how == "none" or not present:
        return list(values)
    if min(present) == max(present):
        done = [0.0] * len(present)
    elif how == "group_std":
        done = _group_std(present, eps)
    elif how == "rank":
        done = _ranks(present)
    else:
        done = _deviations(present)
        if how == "leave_one_out":
            done = [value * (len(present) / (len(present) - 1)) for value in done]
    results = iter(done)
    return [None if value is None else next(results) for value in values]
