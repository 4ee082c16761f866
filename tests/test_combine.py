"""Combine rules against a float64 oracle written the slow obvious way, and their properties."""

import math
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward_server.combine import advantages, combine_scores
from reward_server.normalize import LIMIT, normalize
from reward_server.presets import PRESETS
from services.contract import Outcome, Score
from services.spec import Combine, RewardSpec, RewardTerm

HOWS = ["group_std", "group_mean", "leave_one_out", "rank", "none"]
finite = st.floats(allow_nan=False, allow_infinity=False)
modest = st.floats(-100, 100).map(lambda value: round(value, 3))
column = st.lists(st.none() | modest, min_size=1, max_size=12)


def spec_of(*terms: tuple[str, float], **combine) -> RewardSpec:
    rewards = [RewardTerm(name=name, weight=weight) for name, weight in terms]
    return RewardSpec(rewards=rewards, combine=Combine(**combine))


def oracle(values, how, eps):
    here = [value for value in values if value is not None]
    done = []
    for value in values:
        if value is None:
            done.append(None)
        elif how == "none":
            done.append(value)
        elif len(here) == 1:
            done.append(0.0)
        elif how == "group_mean":
            done.append(value - statistics.mean(here))
        elif how == "group_std":
            spread = statistics.stdev(here)
            done.append((value - statistics.mean(here)) / (spread + eps) if spread else 0.0)
        elif how == "leave_one_out":
            others = list(here)
            others.remove(value)
            done.append(value - statistics.mean(others))
        else:
            below = sum(other < value for other in here)
            above = sum(other > value for other in here)
            done.append((below - above) / (len(here) - 1))
    return done


def close(found, wanted):
    assert [value is None for value in found] == [value is None for value in wanted]
    pairs = [(a, b) for a, b in zip(found, wanted, strict=True) if a is not None]
    assert [a for a, _ in pairs] == pytest.approx([b for _, b in pairs], rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("how", HOWS)
@given(values=column, eps=st.sampled_from([0.0, 1e-6, 1e-4, 1.0]))
def test_normalize_is_the_oracle(how, values, eps):
    close(normalize(values, how, eps), oracle(values, how, eps))


@pytest.mark.parametrize("how", [how for how in HOWS if how != "none"])
@given(values=column)
def test_missing_enters_no_statistic_and_the_rest_sums_to_nothing(how, values):
    here = [value for value in values if value is not None]
    found = normalize(values, how)
    assert [value for value in found if value is not None] == normalize(here, how)
    assert math.fsum(value for value in found if value is not None) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("how", [how for how in HOWS if how != "none"])
@given(value=finite, size=st.integers(1, 20), eps=st.sampled_from([0.0, 1e-4]))
def test_equal_values_and_a_group_of_one_are_exactly_zero(how, value, size, eps):
    assert normalize([value] * size, how, eps) == [0.0] * size


@pytest.mark.parametrize("order", ["normalize_then_sum", "sum_then_normalize"])
@pytest.mark.parametrize("how", HOWS)
@settings(max_examples=50)
@given(data=st.data(), size=st.integers(1, 8), weights=st.lists(finite, min_size=2, max_size=2))
def test_advantages_are_finite_and_follow_the_completions_bit_by_bit(how, order, data, size, weights):
    values = st.lists(st.none() | finite, min_size=size, max_size=size)
    columns = {"a": data.draw(values), "b": data.draw(values)}
    places = data.draw(st.permutations(range(size)))
    spec = spec_of(("a", weights[0]), ("b", weights[1]), order=order, normalize=how)
    found = advantages(spec, columns, size)
    assert all(abs(value) <= LIMIT for value in found)
    moved = advantages(spec, {name: [column[place] for place in places] for name, column in columns.items()}, size)
    assert moved == [found[place] for place in places]
    scores = {name: [scored(value) for value in column] for name, column in columns.items()}
    assert all(item.reward is None or math.isfinite(item.reward) for item in combine_scores(spec, scores, size))


@settings(max_examples=50)
@given(data=st.data(), size=st.integers(2, 8), how=st.sampled_from(HOWS), weight=modest.filter(bool))
def test_weights_apply_after_normalisation(data, size, how, weight):
    values = st.lists(st.none() | modest, min_size=size, max_size=size)
    columns = {"a": data.draw(values), "b": data.draw(values), "idle": data.draw(values)}
    spec = spec_of(("a", 1.0), ("b", weight), ("idle", 0.0), normalize=how)
    parts = [oracle(columns["a"], how, 1e-4), oracle(columns["b"], how, 1e-4)]
    wanted = [(a or 0.0) + weight * (b or 0.0) for a, b in zip(*parts, strict=True)]
    close(advantages(spec, columns, size), wanted)


@settings(max_examples=50)
@given(data=st.data(), size=st.integers(2, 8), how=st.sampled_from(HOWS))
def test_sum_then_normalize_is_normalised_over_the_weighted_sum(data, size, how):
    values = st.lists(modest, min_size=size, max_size=size)
    columns = {"a": data.draw(values), "b": data.draw(values)}
    spec = spec_of(("a", 2.0), ("b", -0.5), order="sum_then_normalize", normalize=how)
    total = [2.0 * a - 0.5 * b for a, b in zip(columns["a"], columns["b"], strict=True)]
    if 0 < max(total) - min(total) < 1e-9:  # equal but for rounding: the two ways of adding may disagree on the order
        return
    if how == "rank":
        total = [round(value, 6) for value in total]
    close(advantages(spec, columns, size), oracle(total, how, 1e-4))


def test_open_r1_mix_adds_the_normalised_raw_sum_of_external_rewards_one_to_one():
    certainty, correct, shape = [12.0, 14.0, 9.5, 11.0], [1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0]
    found = advantages(
        PRESETS["open_r1_mix"], {"self_certainty": certainty, "math_verify": correct, "format": shape}, 4
    )
    external = [a + b for a, b in zip(correct, shape, strict=True)]
    parts = oracle(certainty, "group_std", 1e-4), oracle(external, "group_std", 1e-4)
    close(found, [a + b for a, b in zip(*parts, strict=True)])


def test_a_missing_score_is_neutral_in_a_raw_sum():
    spec = spec_of(("a", 1.0), ("b", 1.0), order="sum_then_normalize", normalize="group_mean")
    found = advantages(spec, {"a": [1.0, 1.0, 1.0], "b": [4.0, None, 0.0]}, 3)
    assert found == [2.0, 0.0, -2.0]
    plain = spec_of(("a", 1.0), ("b", 1.0), order="sum_then_normalize", normalize="none")
    assert advantages(plain, {"a": [1.0, 1.0, None], "b": [4.0, None, None]}, 3) == [5.0, 1.0, 0.0]


def scored(value: float | None) -> Score:
    return Score.failed(Outcome.timeout, "late") if value is None else Score.of(value)


def test_what_a_completion_is_told():
    spec = spec_of(("a", 2.0), ("b", 1.0), ("idle", 0.0), normalize="group_mean")
    components = {
        "a": [scored(1.0), scored(3.0), scored(None)],
        "b": [scored(0.5), scored(None), scored(None)],
        "idle": [scored(7.0), scored(7.0), scored(7.0)],
    }
    first, second, third = combine_scores(spec, components, 3)
    assert (first.reward, first.advantage, first.valid) == (2.5, -2.0, True)
    assert (second.reward, second.advantage, second.valid) == (None, 2.0, True)
    assert (third.reward, third.advantage, third.valid) == (None, 0.0, False)
    assert third.components["a"].outcome == Outcome.timeout and third.components["idle"].value == 7.0


def test_weights_of_zero_alone_train_nothing():
    spec = spec_of(("a", 0.0), order="sum_then_normalize")
    (only,) = combine_scores(spec, {"a": [scored(5.0)]}, 1)
    assert (only.reward, only.advantage, only.valid) == (None, 0.0, False)


def test_extreme_values_stay_finite_and_ordered():
    extreme = [-1.7e308, 5e-324, 1.7e308]
    for how in ["group_std", "group_mean", "leave_one_out", "rank"]:
        low, middle, high = advantages(spec_of(("a", 1.0), normalize=how), {"a": extreme}, 3)
        assert -LIMIT <= low < middle < high <= LIMIT
    assert advantages(spec_of(("a", 1e308), normalize="none"), {"a": [1e308]}, 1) == [LIMIT]
