"""Comparing outputs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_server.sandbox.compare import same_output

WORDS = st.lists(st.text(st.characters(codec="ascii", categories=["L", "N", "P"]), min_size=1, max_size=6), max_size=8)
SPACE = st.text(" \t\n\r", min_size=1, max_size=3)


@given(WORDS, st.lists(SPACE, min_size=9, max_size=9))
def test_white_space_does_not_matter(words, spaces):
    said = "".join(space + word for word, space in zip(words, spaces, strict=False)) + spaces[-1]
    assert same_output(said, " ".join(words)) and same_output(said, "\n".join(words), tolerance=0.1)


@given(WORDS, WORDS.filter(bool))
def test_a_prefix_or_more_than_was_wanted_does_not_pass(words, more):
    whole = " ".join(words + more)
    for tolerance in (None, 0.5):
        assert not same_output(" ".join(words), whole, tolerance)
        assert not same_output(whole, " ".join(words), tolerance)


@given(WORDS, WORDS)
def test_outputs_agree_exactly_when_their_words_do(a, b):
    assert same_output(" ".join(a), "\n".join(b)) == (a == b)


@given(st.floats(-1e9, 1e9), st.floats(-1e9, 1e9), st.sampled_from([0, 1e-6, 1e-3, 0.1]))
def test_numbers_within_the_tolerance_agree(a, b, tolerance):
    assert same_output(repr(a), repr(b), tolerance) == (abs(a - b) <= tolerance * max(1, abs(b)))


@pytest.mark.parametrize("said", ["nan", "inf", "1_0", "0x10", "ten", "1e999", ""])
def test_only_finite_numbers_are_compared_as_numbers(said):
    assert not same_output(said, "10", 1.0)
    assert same_output(said, said, 1.0)


def test_without_a_tolerance_numbers_are_words():
    assert not same_output("1.0", "1")
    assert same_output("1.0", "1", 0.0)
