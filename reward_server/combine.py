"""From the raw scores of one group to one reward and one advantage a completion.

The terms of a spec form *units*. With `normalize_then_sum` every term is a unit: it is normalised inside its group,
then weighted. The terms of one `bundle`, and with `sum_then_normalize` all terms, are one unit together: they are
weighted, summed raw, and the sum is normalised. The units are added.

Missing scores (outcome `timeout`, `error`, ...) never count as 0. A unit's statistics are taken over the completions
that have a score; a completion without one gets the neutral contribution 0 from that unit. In a raw sum the neutral
stand-in for a missing score is the mean of that reward in the group, so that it neither lifts nor lowers the
completion (with `normalize: none`, where there is no group to speak of, it is left out of the sum). A completion is
valid when at least one reward with a non-zero weight has a value for it.

Sums are exactly rounded (`math.fsum`), so the order of the completions changes no bit of the result.
"""

import math
from collections.abc import Sequence

from services.contract import CompletionScore, Score
from services.spec import Combine, Normalize, RewardSpec, RewardTerm

LIMIT = 3.0e38
"""Rewards and advantages are cut to this magnitude: beyond it they are no longer finite in float32."""


def _clip(value: float) -> float:
    return max(-LIMIT, min(LIMIT, value))


def _scale(values: Sequence[float]) -> float:
    """A power of two near the largest magnitude: dividing by it rounds nothing and keeps sums and squares in range."""
    largest = max(abs(value) for value in values)
    return math.ldexp(1.0, math.frexp(largest)[1] - 1) if largest else 1.0


def _group_std(values: Sequence[float], eps: float) -> list[float]:
    scale = _scale(values)
    scaled = [value / scale for value in values]
    mean = math.fsum(scaled) / len(scaled)
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in scaled) / (len(scaled) - 1))
    spread = std + eps / scale
    return [(value - mean) / spread if spread > 0 else 0.0 for value in scaled]


def _deviations(values: Sequence[float]) -> list[float]:
    scale = _scale(values)
    mean = math.fsum(value / scale for value in values) / len(values)
    return [_clip((value / scale - mean) * scale) for value in values]


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


def _raw_sum(
    terms: list[RewardTerm], columns: dict[str, list[float | None]], impute: bool, size: int
) -> list[float | None]:
    """Weighted sum a completion, none where every term is missing."""
    parts: list[list[float | None]] = []
    for term in terms:
        column = columns[term.key]
        present = [value for value in column if value is not None]
        if not present:
            continue
        scale = _scale(present)
        neutral = math.fsum(value / scale for value in present) / len(present) * scale if impute else 0.0
        parts.append([_clip(term.weight * (neutral if value is None else value)) for value in column])
    any_present = [any(columns[term.key][place] is not None for term in terms) for place in range(size)]
    return [math.fsum(part[place] or 0.0 for part in parts) if any_present[place] else None for place in range(size)]


def _units(terms: list[RewardTerm], combine: Combine) -> list[list[RewardTerm]]:
    if combine.order == "sum_then_normalize":
        return [terms]
    units: dict[tuple[str, str], list[RewardTerm]] = {}
    for term in terms:
        units.setdefault(("bundle", term.bundle) if term.bundle else ("term", term.key), []).append(term)
    return list(units.values())


def advantages(spec: RewardSpec, columns: dict[str, list[float | None]], size: int) -> list[float]:
    """One finite advantage for each of the `size` completions; `columns` holds the raw values by term key."""
    terms = [term for term in spec.rewards if term.weight != 0]
    combine = spec.combine
    contributions: list[list[float]] = []
    for unit in _units(terms, combine):
        raw_sum = combine.order == "sum_then_normalize" or unit[0].bundle is not None
        if raw_sum:
            column = normalize(
                _raw_sum(unit, columns, combine.normalize != "none", size), combine.normalize, combine.eps
            )
            weight = 1.0
        else:
            column = normalize(columns[unit[0].key], combine.normalize, combine.eps)
            weight = unit[0].weight
        contributions.append([_clip(weight * (value or 0.0)) for value in column])
    return [_clip(math.fsum(part[place] for part in contributions)) for place in range(size)]


def combine_scores(spec: RewardSpec, components: dict[str, list[Score]], size: int) -> list[CompletionScore]:
    """Join the scores of one group, by term key, into what the reward server answers.

    `reward` is the weighted sum of the raw values that are there (no normalisation); `advantage` is described above.
    """
    columns = {key: [score.value for score in scores] for key, scores in components.items()}
    found = advantages(spec, columns, size)
    results = []
    for place in range(size):
        raw = [
            _clip(term.weight * value)
            for term in spec.rewards
            if term.weight != 0 and (value := columns[term.key][place]) is not None
        ]
        results.append(
            CompletionScore(
                components={key: scores[place] for key, scores in components.items()},
                reward=_clip(math.fsum(raw)),
                advantage=found[place] if raw else 0.0,
                valid=bool(raw),
            )
        )
    return results
