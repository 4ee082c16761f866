"""pass@k and the tests of differences, against enumeration and scipy."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from services.evaluation.statistics import mcnemar, pass_at_k, permutation, sign_flips

BITS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40)
VALUES = st.lists(st.integers(-8, 8).map(lambda n: n / 4), min_size=1, max_size=9)


# ---- pass@k ----------------------------------------------------------------------------------------------------


@given(st.integers(1, 9), st.data())
def test_pass_at_k_is_the_share_of_draws_with_a_right_answer(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(float(Fraction(sum(map(any, draws)), len(draws))), abs=1e-12)


def test_pass_at_k_of_many_samples():
    assert pass_at_k(200, 7, 100) == pytest.approx(1 - math.comb(193, 100) / math.comb(200, 100), rel=1e-12)
    assert pass_at_k(10**6, 1, 1) == pytest.approx(1e-6, rel=1e-6)


@pytest.mark.parametrize(("n", "c", "k"), [(3, 4, 1), (3, -1, 1), (3, 1, 4), (3, 1, 0)])
def test_pass_at_k_refuses_what_cannot_be(n, c, k):
    with pytest.raises(ValueError, match="pass@k needs"):
        pass_at_k(n, c, k)


# ---- differences -----------------------------------------------------------------------------------------------


@given(BITS)
def test_mcnemar_is_a_binomial_test_of_the_items_that_differ(pairs):
    ours, theirs = zip(*pairs, strict=True)
    only = [a for a, b in pairs if a != b]
    wanted = stats.binomtest(sum(only), len(only)).pvalue if only else 1.0
    assert mcnemar(ours, theirs) == pytest.approx(wanted)
    assert mcnemar(theirs, ours) == mcnemar(ours, theirs)


def test_mcnemar_of_thousands_of_items():
    ours = [1.0] * 6000 + [0.0] * 4000
    theirs = [0.0] * 6000 + [1.0] * 4000
    assert mcnemar(ours, theirs) == pytest.approx(stats.binomtest(6000, 10000).pvalue, rel=1e-6)


@given(VALUES)
def test_sign_flips_enumerate_every_sign(differences):
    signed = [sum(d * s for d, s in zip(differences, signs, strict=True)) for signs in
              itertools.product((1, -1), repeat=len(differences))]  # fmt: skip
    wanted = sum(abs(total) >= abs(sum(differences)) - 1e-9 for total in signed) / len(signed)
    assert sign_flips(differences) == pytest.approx(wanted)


def test_sign_flips_of_many_items_are_drawn_and_come_close():
    random = np.random.default_rng(1)
    differences = random.normal(0.15, 1, 200)
    wanted = stats.ttest_1samp(differences, 0).pvalue
    assert sign_flips(differences) == sign_flips(differences) == pytest.approx(wanted, abs=0.02)
    assert sign_flips(np.ones(200)) == pytest.approx(1 / 10_001)


@settings(max_examples=30)
@given(VALUES.filter(lambda values: len(values) <= 4), VALUES.filter(lambda values: len(values) <= 4))
def test_permutation_is_scipys(ours, theirs):
    def difference(a, b):
        return abs(np.mean(a) - np.mean(b))

    options = {"permutation_type": "independent", "alternative": "greater", "n_resamples": np.inf}
    if len(ours) > 1 and len(theirs) > 1:
        wanted = stats.permutation_test((ours, theirs), difference, **options).pvalue
        assert permutation(ours, theirs) == pytest.approx(wanted)
    assert permutation(ours, theirs) == pytest.approx(permutation(theirs, ours))


def test_three_runs_a_side_cannot_say_more_than_a_tenth():
    assert permutation([1, 2, 3], [7, 8, 9]) == pytest.approx(0.1)
    assert permutation([0.1 + 0.2], [0.3, 0.3]) == 1.0
    assert permutation(range(20), range(20, 40)) == pytest.approx(1 / 10_001)
    with pytest.raises(ValueError, match="both sides"):
        permutation([], [1.0])
