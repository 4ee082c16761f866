"""From the raw scores of one group to one reward and one advantage a completion.

Raw values are clipped, then gated (a gate looks at the raw value of another term). The terms of a spec form *units*.
With `normalize_then_sum` every term is a unit: it is normalised inside its group, then weighted. The terms of one
`bundle`, and with `sum_then_normalize` all terms, are one unit together: they are weighted, summed raw, and the sum is
normalised. The units are added. A term's weight is its own times what its schedule says at the trainer's version.

Missing scores (outcome `timeout`, `error`, ...; or behind a shut gate) never count as 0. A unit's statistics are
taken over the completions that have a score; a completion without one gets the neutral contribution 0 from that unit.
In a raw sum the neutral stand-in for a missing score is the mean of that reward in the group, so that it neither
lifts nor lowers the completion (with `normalize: none`, where there is no group to speak of, it is left out of the
sum). A completion is valid when at least one reward with a non-zero weight has a value for it. Its `reward`, which is
no more than the weighted sum, has no such stand-in: it is none when a part of it, or what its gate looks at, failed.

Sums are exactly rounded (`math.fsum`), so the order of the completions changes no bit of the result.
"""

import math

from reward_server.normalize import bounded, normalize, scale_of
from services.contract import CompletionScore, Outcome, Score
from services.spec import Combine, RewardSpec, RewardTerm

Column = list[float | None]
FAILURES = frozenset({Outcome.unparsable, Outcome.timeout, Outcome.error})
"""`skipped` is none: the reward was not asked, or has nothing to say."""


def counted(spec: RewardSpec, raw: dict[str, Column]) -> dict[str, Column]:
    """The values that count, by term key: raw ones after clip and gate."""
    return {term.key: _counted(term, raw) for term in spec.rewards}


def _counted(term: RewardTerm, raw: dict[str, Column]) -> Column:
    column = raw[term.key]
    if term.clip is not None:
        low, high = term.clip
        column = [None if value is None else min(high, max(low, value)) for value in column]
    if term.gate is not None:
        other = raw[term.gate.reward]
        column = [
            value if term.gate.is_open(there) else term.gate.otherwise
            for value, there in zip(column, other, strict=True)
        ]
    return column


def unanimous(spec: RewardSpec, raw: dict[str, Column]) -> str:
    """Why the group is not to be trained on, or nothing: `skip_unanimous`."""
    key = spec.combine.skip_unanimous
    present = [] if key is None else [value for value in raw[key] if value is not None]
    if not present or min(present) != max(present):
        return ""
    return f"unanimous: {key} is {present[0]:g} for all completions"


def _raw_sum(terms: list[tuple[RewardTerm, float]], columns: dict[str, Column], impute: bool, size: int) -> Column:
    """Weighted sum a completion, none where every term is missing."""
    parts: list[list[float | None]] = []
    for term, weight in terms:
        column = columns[term.key]
        present = [value for value in column if value is not None]
        if not present:
            continue
        scale = scale_of(present)
        neutral = math.fsum(value / scale for value in present) / len(present) * scale if impute else 0.0
        parts.append([bounded(weight * (neutral if value is None else value)) for value in column])
    any_present = [any(columns[term.key][place] is not None for term, _ in terms) for place in range(size)]
    return [math.fsum(part[place] or 0.0 for part in parts) if any_present[place] else None for place in range(size)]


def _units(terms: list[tuple[RewardTerm, float]], combine: Combine) -> list[list[tuple[RewardTerm, float]]]:
    if combine.order == "sum_then_normalize":
        return [terms]
    units: dict[tuple[str, str], list[tuple[RewardTerm, float]]] = {}
    for term, weight in terms:
        name = ("bundle", term.bundle) if term.bundle else ("term", term.key)
        units.setdefault(name, []).append((term, weight))
    return list(units.values())


def _weighted(spec: RewardSpec, version: int) -> list[tuple[RewardTerm, float]]:
    """The terms that are trained on at the trainer's version, with their weights."""
    pairs = [(term, bounded(term.weight_at(version))) for term in spec.rewards]
    return [(term, weight) for term, weight in pairs if weight != 0]


def advantages(spec: RewardSpec, columns: dict[str, Column], size: int, version: int = 0) -> list[float]:
    """One finite advantage for each of the `size` completions; `columns` holds the counted values by term key."""
    combine = spec.combine
    contributions: list[list[float]] = []
    for unit in _units(_weighted(spec, version), combine):
        term, weight = unit[0] if unit else (None, 1.0)
        if term is None or combine.order == "sum_then_normalize" or term.bundle is not None:
            raw_sum = _raw_sum(unit, columns, combine.normalize != "none", size)
            column, weight = normalize(raw_sum, combine.normalize, combine.eps), 1.0
        else:
            column = normalize(columns[term.key], combine.normalize, combine.eps)
        contributions.append([bounded(weight * (value or 0.0)) for value in column])
    totals = [bounded(math.fsum(part[place] for part in contributions)) for place in range(size)]
    if combine.clip is None:
        return totals
    return [min(combine.clip, max(-combine.clip, total)) for total in totals]


def combine_scores(
    spec: RewardSpec, components: dict[str, list[Score]], size: int, version: int = 0
) -> list[CompletionScore]:
    """Join the scores of one group, by term key, into what the reward server answers.

    `version` is the trainer's, for schedules. `reward` is the weighted sum of the values that count (no
    normalisation), none when one of them failed; `advantage` is described above. In a unanimous group that is to be
    skipped nothing is valid.
    """
    raw = {key: [score.value for score in scores] for key, scores in components.items()}
    columns = counted(spec, raw)
    found = advantages(spec, columns, size, version)
    is_skipped = bool(unanimous(spec, raw))
    weighted = _weighted(spec, version)
    needed = {key for term, _ in weighted for key in (term.key, term.gate and term.gate.reward) if key}
    results = []
    for place in range(size):
        parts = [
            bounded(weight * value)
            for term, weight in weighted
            if not is_skipped and (value := columns[term.key][place]) is not None
        ]
        has_failed = any(components[key][place].outcome in FAILURES for key in needed)
        results.append(
            CompletionScore(
                components={key: scores[place] for key, scores in components.items()},
                reward=bounded(math.fsum(parts)) if parts and not has_failed else None,
                advantage=found[place] if parts else 0.0,
                valid=bool(parts),
            )
        )
    return results
