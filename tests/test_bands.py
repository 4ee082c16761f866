"""The collapse guard's judgement, on synthetic histories."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.orchestrator.bands import EVALUATED, PER_STEP, Judge
from services.recipe_watching import Band, Bands, Guard

NORMAL = {"reward": 1.0, "length": 30.0, "distinct": 0.8, "entropy": 0.9, "stopped": 0.95, "answers": 0.6, "kl": 0.01}


def noisy(rng: random.Random, step: int, sigma: float, **means: float) -> dict[str, float]:
    return {"step": step, **{key: mean * (1 + rng.gauss(0, sigma)) for key, mean in {**NORMAL, **means}.items()}}


def judged(rows, guard: Guard | None = None):
    judge = Judge(guard or Guard())
    return [alarm for row in rows for alarm in judge.look(row)], judge


@settings(max_examples=60, deadline=None, derandomize=True)  # a rate is stated, not a law
@given(seed=st.integers(0, 2**32), sigma=st.floats(0.0, 0.2))
def test_flat_noise_raises_no_alarm(seed, sigma):
    rng = random.Random(seed)
    alarms, judge = judged(noisy(rng, step, sigma) for step in range(1, 121))
    assert alarms == [] and judge.raised == []


@pytest.mark.parametrize(
    ("signal", "to"),
    [("length", 0.2), ("length", 4.0), ("distinct", 0.2), ("entropy", 0.1), ("entropy", 5.0), ("stopped", 0.1)]
    + [("answers", 0.2)],
)
@pytest.mark.parametrize("reward", [1.0, 2.0])
def test_a_signal_that_falls_out_while_the_reward_holds_is_caught_in_three_steps(signal, to, reward):
    rng = random.Random(1)
    rows = [noisy(rng, step, 0.05) for step in range(1, 41)]
    rows += [noisy(rng, step, 0.05, reward=reward, **{signal: NORMAL[signal] * to}) for step in range(41, 61)]
    alarms, judge = judged(rows)
    assert [(alarm.signal, alarm.since, alarm.step) for alarm in alarms] == [(signal, 41, 43)]
    assert judge.raised == alarms and str(alarms[0]).startswith(f"step 43: {signal} is ")


def test_a_reward_that_falls_too_is_no_collapse_but_a_limit_counts_by_itself():
    rng = random.Random(2)
    rows = [noisy(rng, step, 0.05) for step in range(1, 21)]
    rows += [noisy(rng, step, 0.05, reward=0.2, length=4.0, kl=9.0) for step in range(21, 41)]
    alarms, judge = judged(rows[:26])
    assert [(alarm.signal, alarm.is_limit, alarm.since) for alarm in alarms] == [("kl", True, 21)]
    # A reward that came to rest on what is left of the policy holds.
    assert [alarm.signal for row in rows[26:] for alarm in judge.look(row)] == ["length"]
    assert str(alarms[0]).endswith("(a limit by itself)") and "above 5 since step 21" in str(alarms[0])


def test_a_limit_counts_before_there_is_a_baseline():
    rows = [{"step": step, **NORMAL, "entropy": 0.001} for step in range(1, 5)]
    alarms, _ = judged(rows, Guard(bands=Bands(entropy=Band(at_least=0.01))))
    assert [(alarm.step, alarm.since) for alarm in alarms] == [(3, 1)]


def test_an_alarm_is_told_once_is_over_and_may_come_again():
    normal, short = {**NORMAL}, {**NORMAL, "length": 5.0}
    pattern = [normal] * 10 + [short] * 8 + [normal] * 6 + [short] * 3
    alarms, judge = judged({"step": step, **row} for step, row in enumerate(pattern, 1))
    assert [alarm.step for alarm in alarms] == [13, 27]
    assert [alarm.since for alarm in judge.raised] == [25]


def test_two_bad_steps_of_five_are_noise():
    pattern = [30.0] * 10 + [5.0, 30.0, 30.0, 5.0, 30.0] * 10
    alarms, _ = judged({"step": step, **NORMAL, "length": length} for step, length in enumerate(pattern, 1))
    assert alarms == []


def test_what_is_missing_is_neither_in_nor_out():
    rows = [{"step": step, **NORMAL} for step in range(1, 11)]
    rows += [{"step": 11 + 2 * n, **NORMAL, "length": 5.0} for n in range(3)]
    rows += [{"step": 12 + 2 * n, **NORMAL, "length": None} for n in range(3)]
    alarms, _ = judged(sorted(rows, key=lambda row: row["step"]))
    assert [alarm.step for alarm in alarms] == [15]


def test_certainty_that_no_longer_tells_right_from_wrong():
    rows = [{"step": step, **NORMAL} for step in range(1, 13)]
    evaluations = [
        {"step": step, "auc": auc} for step, auc in [(0, 0.8), (4, 0.78), (8, 0.5), (9, 0.75), (10, 0.5), (12, 0.45)]
    ]
    alarms, _ = judged(sorted([*rows, *evaluations], key=lambda row: row["step"]))
    assert [(alarm.signal, alarm.step, alarm.since) for alarm in alarms] == [("auc", 12, 10)]


def test_a_noisy_signal_has_a_wider_band_than_its_factor():
    rng = random.Random(4)
    rows = [{"step": step, **NORMAL, "length": rng.gauss(30, 12)} for step in range(1, 200)]
    edges = judged(rows)[1].series["length"].edges()
    assert edges[0] < 0.2 * 30


def test_signals_can_be_switched_off_and_every_signal_has_a_band():
    judge = Judge(Guard(bands=Bands(length=None, auc=None)))
    assert set(judge.series) == {*PER_STEP, "accuracy"} - {"length"}
    assert set(Bands.model_fields) == {*PER_STEP, *EVALUATED}


def test_ratio_is_to_the_baseline():
    _, judge = judged({"step": step, **NORMAL, "length": 60.0 if step == 11 else 30.0} for step in range(1, 12))
    assert judge.ratio("length") == 2.0 and judge.ratio("auc") is None
