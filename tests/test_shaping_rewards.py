"""Rewards about length (kimi_length, cosine_length, overlong), repetition by characters, and controls (random's coin,
constant, inverted): alone, and building on another term through a real spec."""

import asyncio
import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_server.evaluate import Means, score_groups
from reward_server.reward import Context
from reward_server.rewards import REWARDS, cosine_length, inverted, kimi_length, overlong, random, repetition
from reward_server.specs import SpecError, check_spec
from reward_server.workers import Turn, WorkerPool
from services.api import CompletionText, RewardGroup
from services.contract import Outcome, Reference, Score, Task
from services.spec import RewardSpec, RewardTerm


def group_of(completions, answer="yes") -> RewardGroup:
    task = Task(task_id="t", prompt="p", reference=Reference(answer=answer))
    made = [CompletionText(text=item) if isinstance(item, str) else item for item in completions]
    return RewardGroup(group_id="g", task=task, completions=made)


def tokens(count: int) -> CompletionText:
    return CompletionText(text="x", token_ids=[1] * count)


def right(value: float | None) -> Score:
    return Score.failed(Outcome.timeout, "too slow") if value is None else Score.of(value)


async def score(name, completions, said=None, **params):
    """`said`: what the other term gave each completion."""
    reward = REWARDS[name]
    made = reward.params(**params)
    context = Context(WorkerPool(1), time.monotonic() + 60, Turn())  # the pool is never started
    if said is not None:
        future: asyncio.Future = asyncio.get_running_loop().create_future()
        future.set_result([right(value) for value in said])
        (key,) = reward.depends(made)
        context.others = {key: future}
    return await reward.score(group_of(completions), made, context)


def values(scores):
    return [item.value for item in scores]


async def evaluate(spec, completions, answer="yes"):
    (group,) = await score_groups(spec, [group_of(completions, answer)], Means(WorkerPool(1)), time.monotonic() + 60)
    return group.scores


# ---- kimi_length -------------------------------------------------------------------------------------------------


async def test_kimi_length():
    found = await score("kimi_length", ["a" * 10, "a" * 20, "a" * 30, "a" * 10, "a" * 25], [1, 1, 1, 0, 0])
    assert values(found) == [0.5, 0.0, -0.5, 0.0, -0.25]
    assert values(await score("kimi_length", ["aa", "bb"], [1, 0])) == [0.0, 0.0]
    assert values(await score("kimi_length", ["a"], [1])) == [0.0]


@given(
    st.lists(st.tuples(st.integers(0, 10**6), st.booleans()), min_size=2, max_size=16).filter(
        lambda group: len({length for length, _ in group}) > 1
    )
)
def test_kimi_length_against_its_formula(group):
    lengths = np.array([length for length, _ in group], dtype=np.float64)
    lam = 0.5 - (lengths - lengths.min()) / (lengths.max() - lengths.min())
    wanted = [value if is_right else min(0.0, value) for value, (_, is_right) in zip(lam, group, strict=True)]
    shortest, longest = int(lengths.min()), int(lengths.max())
    found = [kimi_length.bonus(length, shortest, longest, is_right) for length, is_right in group]
    assert found == pytest.approx(wanted)
    assert all(-0.5 <= value <= 0.5 for value in found)


async def test_where_correctness_failed_the_completion_is_left_out_with_that_failure():
    found = await score("kimi_length", ["a" * 10, "a" * 20, "a" * 30], [1, None, 1])
    assert values(found) == [0.5, None, -0.5]
    assert (found[1].outcome, found[1].detail) == (Outcome.timeout, "math_verify: too slow")
    found = await score("cosine_length", ["a", "b"], [None, 1])
    assert found[0].outcome == Outcome.timeout and found[1].value is not None


async def test_lengths_in_tokens_need_token_ids():
    completions = [tokens(10), CompletionText(text="no ids"), tokens(20)]
    for name in ("kimi_length", "cosine_length"):
        first, unknown, last = await score(name, completions, [1, 1, 1], unit="tokens")
        assert unknown.outcome == Outcome.error and "token_ids" in unknown.detail
        assert first.value > last.value
    assert values(await score("kimi_length", completions, [1, 1, 1], unit="tokens"))[::2] == [0.5, -0.5]
    found = await score("kimi_length", [CompletionText(text="no ids")], [1], unit="tokens")
    assert found[0].outcome == Outcome.error


async def test_what_counts_as_right_can_be_set():
    assert values(await score("kimi_length", ["a", "bbb"], [0.5, 0.5], correct="code")) == [0.0, -0.5]
    found = await score("kimi_length", ["a", "bbb"], [0.5, 0.5], correct="code", correct_from=0.5)
    assert values(found) == [0.5, -0.5]


# ---- cosine_length -----------------------------------------------------------------------------------------------


def cosine_oracle(length, is_right, low_wrong, high_wrong, low_right, high_right, max_len):
    """As open-r1 writes it, in float64."""
    cosine = np.cos(np.float64(length) / np.float64(max_len) * np.pi)
    low, high = (low_right, high_right) if is_right else (high_wrong, low_wrong)
    return float(low + 0.5 * (np.float64(high) - np.float64(low)) * (1.0 + cosine))


finite = st.floats(-100, 100)


@given(finite, finite, finite, finite, st.integers(1, 20_000), st.booleans(), st.data())
def test_cosine_length_against_its_oracle(low_wrong, high_wrong, low_right, high_right, max_len, is_right, data):
    params = cosine_length.CosineLengthParams(
        min_value_wrong=low_wrong,
        max_value_wrong=high_wrong,
        min_value_correct=low_right,
        max_value_correct=high_right,
        max_len=max_len,
    )
    length = data.draw(st.integers(0, max_len))
    wanted = cosine_oracle(length, is_right, low_wrong, high_wrong, low_right, high_right, max_len)
    found = cosine_length.value(length, is_right, params)
    assert found == pytest.approx(wanted, abs=1e-9)
    ends = (low_right, high_right) if is_right else (low_wrong, high_wrong)
    assert min(ends) - 1e-9 <= found <= max(ends) + 1e-9
    assert cosine_length.value(max_len * 3 // 2 + 1, is_right, params) == pytest.approx(
        cosine_oracle(max_len, is_right, low_wrong, high_wrong, low_right, high_right, max_len), abs=1e-9
    )


async def test_the_ends_of_the_cosine_with_its_defaults():
    texts = ["", "x" * 500, "x" * 1000, "x" * 2000]
    assert values(await score("cosine_length", texts, [1] * 4)) == pytest.approx([1.0, 0.75, 0.5, 0.5])
    assert values(await score("cosine_length", texts, [0] * 4)) == pytest.approx([0.0, -0.25, -0.5, -0.5])


# ---- overlong ----------------------------------------------------------------------------------------------------


def overlong_oracle(n, limit, cache):
    """DAPO's equation 13, case by case."""
    if n <= limit - cache:
        return 0.0
    if n <= limit:
        return ((limit - cache) - n) / cache
    return -1.0


@given(st.integers(1, 10_000), st.integers(1, 10_000), st.integers(0, 30_000))
def test_overlong_against_equation_13(cache, more, n):
    params = overlong.OverlongParams(max_length=cache + more - 1, cache=cache)
    assert overlong.penalty(n, params) == pytest.approx(overlong_oracle(n, params.max_length, cache))


async def test_overlong_counts_tokens_and_says_so_when_it_cannot():
    completions = [tokens(80), tokens(90), tokens(100), tokens(101), CompletionText(text="x" * 200)]
    found = await score("overlong", completions, max_length=100, cache=20)
    assert values(found) == [0.0, -0.5, -1.0, -1.0, None]
    assert math.copysign(1, found[0].value) == 1
    assert found[4].outcome == Outcome.error and "token_ids" in found[4].detail
    with pytest.raises(ValueError, match="greater than max_length"):
        overlong.OverlongParams(max_length=10, cache=20)


# ---- repetition, random, constant, inverted -----------------------------------------------------------------------


async def test_repetition_by_characters_for_scripts_without_blanks():
    text = "\u597d\u597d\u597d\u597d"
    assert values(await score("repetition", [text])) == [0.0]
    assert values(await score("repetition", [text], unit="characters")) == [-0.5]
    assert repetition.penalty("ab ab", 2, -1.0, "characters") == pytest.approx(-1 / 3)
    assert values(await score("repetition", ["a " * 400_000, "a" * 900_000])) == [pytest.approx(-1, abs=1e-4), 0.0]


async def test_a_coin_is_the_same_draw_rounded():
    drawn = values(await score("random", ["x"] * 400, seed=3))
    coins = values(await score("random", ["x"] * 400, seed=3, coin=True))
    assert (
        coins == [float(value >= 0.5) for value in drawn] == [float(random.draw(3, "g", i) >= 0.5) for i in range(400)]
    )
    assert 150 < sum(coins) < 250


async def test_constant():
    assert values(await score("constant", ["a", "b"])) == [1.0, 1.0]
    assert values(await score("constant", ["a"], value=-0.5)) == [-0.5]


async def test_inverted_keeps_failures():
    found = await score("inverted", ["a", "b", "c"], [1, 0.25, None], of="x")
    assert values(found) == [0.0, 0.75, None] and found[2].outcome == Outcome.timeout
    assert values(await score("inverted", ["a"], [-0.25], of="x", low=-1, high=0)) == [-0.75]
    with pytest.raises(ValueError, match="greater than high"):
        inverted.InvertedParams(of="x", low=1, high=0)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=4), st.floats(-1e3, 1e3), st.floats(0, 1e3))
def test_twice_inverted_is_where_it_was(given_values, low, span):
    def turned(column):
        return values(asyncio.run(score("inverted", ["x"] * len(column), column, of="x", low=low, high=low + span)))

    assert turned(turned(given_values)) == pytest.approx(given_values, abs=1e-9)


# ---- through a spec ----------------------------------------------------------------------------------------------


async def test_a_spec_of_length_and_correctness():
    spec = RewardSpec(
        rewards=[
            RewardTerm(name="exact_match", weight=0, params={"regex": "^(yes|no)"}, label="right"),
            RewardTerm(name="kimi_length", params={"correct": "right"}),
            RewardTerm(name="inverted", weight=0, params={"of": "right"}),
        ]
    )
    pool = WorkerPool(1)
    pool.start()
    try:
        groups = [group_of(["yes", "yes, " * 5, "not"])]
        ((first, second, third),) = [
            item.scores for item in await score_groups(spec, groups, Means(pool), time.monotonic() + 60)
        ]
    finally:
        await pool.stop()
    assert [item.components["kimi_length"].value for item in (first, second, third)] == [0.5, -0.5, 0.0]
    assert [item.components["inverted"].value for item in (first, second, third)] == [0.0, 0.0, 1.0]
    assert (first.reward, second.reward, third.reward) == (0.5, -0.5, 0.0)
    assert first.advantage > third.advantage > second.advantage


@pytest.mark.parametrize(
    ("terms", "says"),
    [
        ([{"name": "kimi_length"}], "builds on the reward 'math_verify', which is not a term"),
        ([{"name": "cosine_length", "params": {"correct": "cosine_length"}}], "build on each other"),
        ([{"name": "inverted"}], "rewards[0].params.of"),
        (
            [
                {"name": "inverted", "label": "a", "params": {"of": "b"}},
                {"name": "inverted", "label": "b", "params": {"of": "a"}},
            ],
            "build on each other",
        ),
        ([{"name": "overlong", "params": {"max_length": 5, "cache": 6}}], "greater than max_length"),
    ],
)
def test_specs_that_do_not_fit_are_refused(terms, says):
    with pytest.raises(SpecError) as refusal:
        check_spec(RewardSpec(rewards=[RewardTerm(**term) for term in terms]))
    assert says in str(refusal.value)


async def test_a_constant_moves_nothing_once_normalised():
    spec = RewardSpec(rewards=[RewardTerm(name="length"), RewardTerm(name="constant", weight=5)])
    alone = RewardSpec(rewards=[RewardTerm(name="length")])
    with_it, without = await evaluate(spec, ["a", "bbb"]), await evaluate(alone, ["a", "bbb"])
    assert [item.advantage for item in with_it] == [item.advantage for item in without]
    assert [item.reward for item in with_it] == pytest.approx([item.reward + 5 for item in without])
