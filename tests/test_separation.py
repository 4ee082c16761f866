"""Separation, votes and bootstrap intervals: slow oracles, scipy, and the paper's own figures."""

import itertools
import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from services.intervals import interval
from services.separation import (
    auc,
    best_of_n,
    borda_vote,
    borda_weights,
    group_auc,
    in_group_auc,
    mann_whitney_r,
    without_length,
)

numbers = st.integers(-3, 3).map(float)  # few, so that there are ties
side = st.lists(numbers, min_size=1, max_size=9)


def case(values=numbers, least: int = 1):
    """Groups of (value, length, right) triples."""
    triple = st.tuples(values, st.integers(1, 9).map(float), st.booleans())
    return st.lists(st.lists(triple, min_size=1, max_size=7), min_size=least, max_size=5)


def columns(groups: list[list[tuple]]) -> list[list[tuple]]:
    """Per field: a sequence for each group."""
    return [[tuple(item[field] for item in group) for group in groups] for field in range(3)]


def share_of_pairs(right, wrong) -> float | None:
    pairs = [(a > b) + (a == b) / 2 for a in right for b in wrong]
    return sum(pairs) / len(pairs) if pairs else None


# ---- pooled ----------------------------------------------------------------------------------------------------


@given(side, side)
def test_auc_is_the_share_of_pairs(right, wrong):
    assert auc(right, wrong) == pytest.approx(share_of_pairs(right, wrong))


def test_both_sides_are_needed():
    assert auc([], [1.0]) is None and auc([1.0], []) is None
    assert mann_whitney_r([], [1.0]) is None and mann_whitney_r([1.0], []) is None


@given(side, side)
def test_mann_whitney_is_scipys(right, wrong):
    r, p = mann_whitney_r(right, wrong)
    if len({*right, *wrong}) == 1:
        assert (r, p) == (0.0, 0.5)
        return
    options = {"method": "asymptotic", "use_continuity": False}
    expected = stats.mannwhitneyu(right, wrong, alternative="greater", **options).pvalue
    assert p == pytest.approx(expected, rel=1e-9)
    assert r == pytest.approx(stats.norm.isf(expected) / math.sqrt(len(right) + len(wrong)), abs=1e-9)
    assert mann_whitney_r(wrong, right).r == pytest.approx(-r)


@pytest.mark.parametrize(("r", "p"), [(0.00, 0.52), (0.35, 1.7e-15), (0.45, 8.2e-24), (0.27, 7.9e-10)])
def test_the_papers_r_is_z_over_root_n(r, p):
    """Figure 8's pairs for MATH-500 (arXiv 2505.19590): this r and this p belong together at N = 500."""
    assert round(stats.norm.isf(p) / math.sqrt(500), 2) == r


def test_large_samples_give_tiny_p():
    found = mann_whitney_r(np.arange(250) + 160.0, np.arange(250) + 0.5)
    assert found.r == pytest.approx(0.73, abs=0.03) and 0 < found.p < 1e-50


# ---- inside groups ---------------------------------------------------------------------------------------------


@given(case())
def test_in_group_auc_is_the_mean_over_mixed_groups(groups):
    values, _, right = columns(groups)
    areas = [share_of_pairs([v for v, _, r in group if r], [v for v, _, r in group if not r]) for group in groups]
    assert [group_auc(*both) for both in zip(values, right, strict=True)] == areas
    mixed = [area for area in areas if area is not None]
    assert in_group_auc(values, right) == (pytest.approx(statistics.fmean(mixed)) if mixed else None)


@given(case(), st.lists(st.integers(-100, 100), min_size=5, max_size=5))
def test_how_hard_a_task_is_does_not_count_inside_groups(groups, shifts):
    values, _, right = columns(groups)
    shifted = [[value + shift for value in group] for group, shift in zip(values, shifts, strict=False)]
    assert in_group_auc(shifted, right) == in_group_auc(values, right)


@given(case(), numbers, st.lists(numbers, min_size=5, max_size=5))
def test_a_line_in_length_leaves_nothing(groups, slope, levels):
    _, lengths, _ = columns(groups)
    values = [[level + slope * length for length in group] for group, level in zip(lengths, levels, strict=False)]
    for group in without_length(values, lengths):
        assert group == pytest.approx(0, abs=1e-9)


@given(case(st.floats(-5, 5)))
def test_what_length_leaves_is_least_squares(groups):
    """Against numpy's solver on the whole design: a column of ones for each group and one of lengths."""
    values, lengths, _ = columns(groups)
    rows = [(place, v, n) for place, group in enumerate(groups) for v, n, _ in group]
    design = np.array([[float(place == other) for other in range(len(groups))] + [n] for place, _, n in rows])
    y = np.array([v for _, v, _ in rows])
    left = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
    assert np.concatenate(without_length(values, lengths)) == pytest.approx(left, abs=1e-7)


def test_separation_beyond_length():
    rng = np.random.default_rng(0)
    lengths = [rng.integers(5, 30, 8).astype(float) for _ in range(200)]
    right = [rng.random(8) < 0.5 for _ in range(200)]
    by_length = [0.1 * group for group in lengths]
    by_both = [0.1 * group + is_right for group, is_right in zip(lengths, right, strict=True)]
    assert in_group_auc(without_length(by_length, lengths), right) == pytest.approx(0.5, abs=0.05)
    assert in_group_auc(without_length(by_both, lengths), right) > 0.95
    assert without_length([], []) == []
    assert without_length([[1.0, 2.0]], [[3.0, 3.0]])[0].tolist() == [-0.5, 0.5]


# ---- picking ---------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(numbers, st.booleans()), min_size=1, max_size=8))
def test_best_of_n_draws_among_equals(group):
    most = max(value for value, _ in group)
    assert best_of_n(*zip(*group, strict=True)) == pytest.approx(
        statistics.fmean(r for value, r in group if value == most)
    )


def test_best_of_none():
    assert best_of_n([], []) is None


@given(side, st.sampled_from([0.0, 0.5, 1.0, 2.0]))
def test_borda_weights_by_definition(certainties, power):
    """Kang et al.: v(r) = (N - r + 1) ** p."""
    ranks = stats.rankdata([-value for value in certainties])
    expected = [(len(certainties) - rank + 1) ** power for rank in ranks]
    assert borda_weights(certainties, power) == pytest.approx(expected)


@given(st.lists(st.tuples(st.none() | st.sampled_from("abc"), numbers), max_size=8), st.sampled_from([0.0, 1.0, 2.0]))
@settings(max_examples=200)
def test_borda_vote_adds_them_up(votes, power):
    given_, voters = [v[0] for v in votes], [v for v in votes if v[0] is not None]
    weights = borda_weights([value for _, value in voters], power)
    sums = {a: sum(w for (b, _), w in zip(voters, weights, strict=True) if a == b) for a, _ in voters}
    won = borda_vote(given_, [value for _, value in votes], power)
    assert set(won) == {a for a, total in sums.items() if total == pytest.approx(max(sums.values()))}
    assert won == sorted(won, key=given_.index)


def test_borda_vote_lets_certainty_outvote_heads():
    answers, certainties = ["a", "a", "b", None], [1.0, 2.0, 3.0, 9.0]
    assert borda_vote(answers, certainties, 0) == ["a"]  # the majority
    assert borda_vote(answers, certainties, 1) == ["a", "b"]  # 1 + 2 against 3
    assert borda_vote(answers, certainties, 2) == ["b"]
    assert borda_vote([None], [1.0], 1) == []


# ---- bootstrap -------------------------------------------------------------------------------------------------


def test_the_interval_is_the_bootstraps_own():
    """Of three values every resample can be listed: the percentiles of all 27 means."""
    values = [0.0, 1.0, 5.0]
    means = [statistics.fmean(drawn) for drawn in itertools.product(values, repeat=3)]
    found = interval(values, level=0.8)
    assert found.mean == 2.0
    assert found.low == pytest.approx(np.percentile(means, 10), abs=0.35)
    assert found.high == pytest.approx(np.percentile(means, 90), abs=0.35)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng, covered = np.random.default_rng(1), 0
    for trial in range(200):
        found = interval(rng.random(64) < 0.3, seed=trial)
        covered += found.low <= 0.3 <= found.high
    assert 0.88 <= covered / 200 <= 0.99


def test_intervals_narrow_and_repeat():
    rng = np.random.default_rng(2)
    few, many = interval(rng.random(20)), interval(rng.random(2000))
    assert few.high - few.low > 5 * (many.high - many.low) > 0
    values = rng.random(20)
    assert interval(values) == interval(values) != interval(values, seed=1)
    assert interval([]) is None and interval([1.0]) is None
    assert interval([-1.0, 2.0, 3.0, -4.0]).is_noise and not interval([1.0, 2.0, 3.0, 4.0]).is_noise
