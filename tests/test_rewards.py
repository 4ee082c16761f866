"""The rule-based rewards, their parameters, and the specs made of them."""

import functools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_server.evaluate import Means, score_groups
from reward_server.reward import Context
from reward_server.rewards import REWARDS, exact_match, format, length, patterns, repetition
from reward_server.rewards.random import RandomParams, draw
from reward_server.specs import SpecError, built_in, check_spec, named_spec
from reward_server.workers import Limits, Turn, WorkerPool
from services.api import CompletionText, RewardGroup
from services.contract import Outcome, Reference, Task
from services.problem import Problem
from services.spec import RewardSpec, RewardTerm


def group_of(texts, answer=None, source="default", **extra) -> RewardGroup:
    reference = None if answer is None else Reference(answer=answer)
    task = Task(task_id="t", prompt="p", source=source, reference=reference)
    completions = [CompletionText(text=text) if isinstance(text, str) else text for text in texts]
    return RewardGroup(group_id="g", task=task, completions=completions, **extra)


@pytest.fixture
async def workers():
    pool = WorkerPool(1, Limits(quantum_seconds=2), [patterns.WARM_UP])
    pool.start()
    yield pool
    await pool.stop()


async def score(reward, group, workers=None, **params):
    context = Context(workers, time.monotonic() + 60, Turn())
    return await reward.REWARD.score(group, reward.REWARD.params(**params), context)


def told(scores):
    return [(score.value, str(score.outcome)) for score in scores]


async def test_exact_match_of_whole_completions():
    group = group_of([" Paris\n", "paris", "Paris!"], "Paris")
    assert told(await score(exact_match, group)) == [(1.0, "correct"), (0.0, "wrong"), (0.0, "wrong")]
    assert told(await score(exact_match, group, case=False))[1] == (1.0, "correct")
    assert told(await score(exact_match, group, strip=False))[0] == (0.0, "wrong")


async def test_exact_match_of_what_a_pattern_cuts_out(workers):
    group = group_of(["answer 3, no: answer 42.", "answer 41", "the answer is forty-two"], "42")
    found = await score(exact_match, group, workers, regex=r"answer (\d+)")
    assert told(found) == [(1.0, "correct"), (0.0, "wrong"), (0.0, "no_answer")]
    assert [item.detail for item in found] == ["42", "41", ""]


async def test_format(workers):
    good = "<think>\nwhy\n</think>\n<answer>\n4\n</answer>"
    group = group_of([good, good + " and more", "4"])
    assert [item.value for item in await score(format, group, workers)] == [1.0, 0.0, 0.0]
    assert [item.value for item in await score(format, group, workers, match="search")] == [1.0, 1.0, 0.0]
    assert [item.value for item in await score(format, group, workers, regex=r"\d")] == [0.0, 0.0, 1.0]
    boxed = await score(format, group_of(["so \\boxed{4}.", "4"]), workers, shape="boxed")
    assert [item.value for item in boxed] == [1.0, 0.0]


async def test_a_pattern_that_never_ends_is_a_timeout_and_not_a_zero():
    pool = WorkerPool(1, Limits(quantum_seconds=0.2, full_seconds=0.4, grace_seconds=0.5), [patterns.WARM_UP])
    pool.start()
    try:
        slow, quick = await score(format, group_of(["a" * 60, "b"]), pool, regex="(a+)+b|b")
    finally:
        await pool.stop()
    assert (slow.value, slow.outcome) == (None, Outcome.timeout)
    assert quick.value == 1.0


@given(words=st.lists(st.sampled_from(["a", "b", "c"]), max_size=30), n=st.integers(1, 4))
def test_repetition_is_the_share_of_ngrams_said_before(words, n):
    ngrams = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
    repeated = sum(ngram in ngrams[:place] for place, ngram in enumerate(ngrams))
    wanted = -2.0 * repeated / len(ngrams) if ngrams else 0.0
    assert repetition.penalty(" ".join(words), n, -2.0) == pytest.approx(wanted)


async def test_repetition_ignores_case_and_needs_n_words():
    found = await score(repetition, group_of(["Say it say IT say it", "too short", "", "one two three four"]))
    assert [item.value for item in found] == [-0.5, 0.0, 0.0, 0.0]


async def test_length():
    group = group_of(["abcd", CompletionText(text="ab", token_ids=[1, 2, 3])])
    assert [item.value for item in await score(length, group, scale=2)] == [2.0, 1.0]
    assert [item.value for item in await score(length, group, scale=2, limit=1.5)] == [1.5, 1.0]
    unknown, counted = await score(length, group, unit="tokens", scale=1)
    assert unknown.outcome == Outcome.error and "token_ids" in unknown.detail
    assert counted.value == 3.0


@given(seed=st.integers(0, 2**40), group=st.text(max_size=20), index=st.integers(0, 10**6))
def test_random_is_a_function_of_seed_group_and_place(seed, group, index):
    value = draw(seed, group, index)
    assert 0 <= value < 1
    assert value == draw(seed, group, index)
    assert value != draw(seed + 1, group, index) and value != draw(seed, group, index + 1)


def test_random_is_uniform():
    values = sorted(draw(RandomParams().seed, f"group {number // 8}", number % 8) for number in range(4000))
    largest_gap = max(abs(value - (place + 0.5) / 4000) for place, value in enumerate(values))
    assert largest_gap < 0.026  # Kolmogorov-Smirnov at about p = 0.01


# ---- specs -------------------------------------------------------------------------------------------------------


def test_every_reward_and_preset_is_a_spec_with_good_defaults():
    alone = {
        name
        for name, reward in REWARDS.items()
        if reward.depends is None and not any(field.is_required() for field in reward.params.model_fields.values())
    }
    assert alone <= set(built_in())
    assert {"intuitor", "grpo", "intuitor_plus_accuracy", "open_r1_mix"} < set(built_in())
    for name in built_in():
        check_spec(named_spec(name))


DEEP: dict = functools.reduce(lambda inner, _: {"a": inner}, range(5000), {})
"""JSON goes deeper than repr does."""


@pytest.mark.parametrize(
    ("term", "field", "says"),
    [
        ({"name": "nonsense"}, "rewards[1].name", "math_verify"),
        ({"name": "self_certainty"}, "rewards[1].name", "without"),
        ({"name": "length", "params": {"scale": -1}}, "rewards[1].params.scale", "greater than 0"),
        ({"name": "length", "params": {"scael": 1}}, "rewards[1].params.scael", "unit, scale, limit"),
        ({"name": "length", "params": {"scale": DEEP}}, "rewards[1].params.scale", "number (got {'a': {'a'"),
        ({"name": "length", "params": {"scale": "x"}}, "rewards[1].params.scale", "number"),
        ({"name": "length", "params": {"scale": float("nan")}}, "rewards[1].params.scale", "finite"),
        ({"name": "exact_match", "params": {"regex": "("}}, "rewards[1].params.regex", "regular expression"),
        ({"name": "exact_match", "params": {"regex": r"\d"}}, "rewards[1].params.regex", "one group"),
        ({"name": "format", "params": {"regex": "a{99999999999}"}}, "rewards[1].params.regex", "too large"),
        ({"name": "format", "params": {"regex": "(" * 1500 + ")" * 1500}}, "rewards[1].params.regex", "too deeply"),
        ({"name": "repetition", "params": {"n": 0}}, "rewards[1].params.n", "greater than or equal to 1"),
    ],
)
def test_what_cannot_be_computed_is_named(term, field, says):
    spec = RewardSpec(rewards=[RewardTerm(name="random"), RewardTerm(**term)])
    with pytest.raises(SpecError) as refusal:
        check_spec(spec, have=frozenset())
    assert refusal.value.field == field and says in refusal.value.reason


def test_unknown_spec_name_lists_the_known():
    with pytest.raises(SpecError, match="intuitor_plus_accuracy"):
        named_spec("nonsense")


# ---- groups ------------------------------------------------------------------------------------------------------


async def evaluate(spec, groups):
    pool = WorkerPool(1)  # never started: rules alone
    return await score_groups(spec, groups, Means(pool), time.monotonic() + 60)


async def test_routes_skip_and_labels_keep_apart():
    spec = RewardSpec(
        rewards=[
            RewardTerm(name="exact_match", sources=["quiz"]),
            RewardTerm(name="random", label="coin", params={"seed": 1}),
            RewardTerm(name="random", label="dice", params={"seed": 2}, weight=0),
        ]
    )
    quiz, chat = group_of(["4", "5"], "4", source="quiz"), group_of(["hello"], source="chat")
    first, second = await evaluate(spec, [quiz, chat])
    assert first.spec_id == spec.spec_id and first.scorer_weight_version is None
    assert [item.components["exact_match"].outcome for item in first.scores] == ["correct", "wrong"]
    skipped = second.scores[0]
    assert skipped.components["exact_match"].outcome == Outcome.skipped
    assert "chat" in skipped.components["exact_match"].detail
    assert skipped.valid and skipped.reward == skipped.components["coin"].value == draw(1, "g", 0)
    assert skipped.components["dice"].value == draw(2, "g", 0)


@pytest.mark.parametrize("answer", [None, "", "  "])
async def test_a_missing_reference_is_refused_where_it_is_needed(answer):
    spec = RewardSpec(rewards=[RewardTerm(name="exact_match", sources=["quiz"])])
    groups = [group_of(["4"], "4", source="quiz"), group_of(["4"], answer, source="quiz")]
    with pytest.raises(Problem) as refusal:
        await evaluate(spec, groups)
    assert (refusal.value.status, refusal.value.field) == (422, "groups[1].task.reference.answer")
    (group,) = await evaluate(spec, [group_of(["4"], answer, source="chat")])
    assert not group.scores[0].valid


async def test_a_reward_that_breaks_is_an_error_and_the_others_go_on(monkeypatch):
    async def broken(*_):
        raise RuntimeError("out of order")

    monkeypatch.setitem(REWARDS, "length", REWARDS["length"].__class__(**{**vars(REWARDS["length"]), "score": broken}))
    spec = RewardSpec(rewards=[RewardTerm(name="length"), RewardTerm(name="random")])
    (group,) = await evaluate(spec, [group_of(["4"])])
    assert group.scores[0].components["length"].outcome == Outcome.error
    assert "out of order" in group.scores[0].components["length"].detail
    assert group.scores[0].valid
