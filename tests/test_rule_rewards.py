"""Verifiable rules: gsm8k, multiple_choice, several answers, json_schema, tag_count, reasoning_steps."""

import json
import time
from fractions import Fraction
from pathlib import Path

import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from reward_server.reward import Context
from reward_server.rewards import exact_match, gsm8k, json_schema, multiple_choice, reasoning_steps, tag_count
from reward_server.specs import SpecError, check_spec
from reward_server.workers import Limits, Turn, WorkerPool
from services.api import CompletionText, RewardGroup
from services.contract import Outcome, Reference, Task
from services.problem import Problem
from services.spec import RewardSpec, RewardTerm

pytestmark = pytest.mark.alone

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
in_one_loop = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pool():
    made = WorkerPool(1, Limits(quantum_seconds=1, full_seconds=2, grace_seconds=0.5, slow_wait_seconds=60))
    made.start()
    yield made
    await made.stop()


async def score(reward, texts, pool=None, params=None, **reference):
    task = Task(task_id="t", prompt="p", reference=Reference.model_validate(reference))
    group = RewardGroup(group_id="g", task=task, completions=[CompletionText(text=text) for text in texts])
    context = Context(pool, time.monotonic() + 120, Turn())
    return await reward.REWARD.score(group, reward.REWARD.params.model_validate(params or {}), context)


async def outcomes(reward, texts, pool=None, params=None, **reference):
    scores = await score(reward, texts, pool, params, **reference)
    value = {"correct": 1.0, "wrong": 0.0, "no_answer": 0.0}
    assert all(item.value == value.get(item.outcome) for item in scores)
    return [str(item.outcome) for item in scores]


# ---- gsm8k -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "gold", "flexible", "strict"),
    [
        ("#### 1080", "1,080", "correct", "correct"),
        ("48/2 = 24\n#### 72", "she sold 24\n#### 72", "correct", "correct"),
        ("72 in all\n#### 71", "72", "wrong", "wrong"),
        ("#### 71\nno wait\n#### 72", "72", "correct", "correct"),
        ("#### **$1,080.00**.", "1080", "correct", "correct"),
        ("#### 72 clips, not 73", "72", "correct", "correct"),
        ("#### Step 3: add\nso it is 72", "72", "correct", "no_answer"),
        ("####\n72", "72", "correct", "correct"),
        ("####", "72", "no_answer", "no_answer"),
        ("It costs $1,080.", "1080", "correct", "no_answer"),
        ("It costs \\$1{,}080 \\text{ dollars}", "1080", "correct", "no_answer"),
        ("so 3.0 apples", "3", "correct", "no_answer"),
        ("so 3.", "3", "correct", "no_answer"),
        ("that is .5", "0.50", "correct", "no_answer"),
        ("25%", "25", "correct", "no_answer"),
        ("0.25", "25%", "wrong", "no_answer"),
        ("3/4", "0.75", "correct", "no_answer"),
        ("5/2", "2", "wrong", "no_answer"),
        ("1/0", "0", "wrong", "no_answer"),
        ("it fell to -5", "-5", "correct", "no_answer"),
        ("it fell to \u22125", "-5", "correct", "no_answer"),
        ("minus: -$5", "-5", "correct", "no_answer"),
        ("minus: $-5", "-5", "correct", "no_answer"),
        ("8-5", "5", "correct", "no_answer"),
        ("2e3 metres", "2000", "correct", "no_answer"),
        ("5 eggs", "5", "correct", "no_answer"),
        ("1,2,3", "3", "correct", "no_answer"),
        ("1,2345", "12345", "wrong", "no_answer"),
        ("\u0667\u0662", "72", "correct", "no_answer"),
        ("seventy-two", "72", "no_answer", "no_answer"),
        ("", "72", "no_answer", "no_answer"),
        ("72", "seventy-two", "unparsable", "unparsable"),
        ("72", "1/0", "unparsable", "unparsable"),
    ],
)
async def test_gsm8k(text, gold, flexible, strict):
    assert await outcomes(gsm8k, [text], answer=gold) == [flexible]
    assert await outcomes(gsm8k, [text], params={"method": "strict"}, answer=gold) == [strict]


@pytest.mark.parametrize("name", ["gsm8k_train", "gsm8k_test"])
@pytest.mark.parametrize("method", ["strict", "flexible"])
def test_every_gold_solution_of_gsm8k_verifies_itself_and_no_other_number(name, method):
    path = DATA / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"no {path.name} here")
    solutions = [json.loads(line)["answer"] for line in path.read_text().splitlines()]
    assert len(solutions) > 1000
    params = gsm8k.Gsm8kParams(method=method)
    for solution in solutions:
        plain = solution.rpartition("####")[2].strip()
        gold = Fraction(plain.replace(",", ""))
        assert gsm8k.value_of(gsm8k.answer(solution, "flexible")) == gsm8k.value_of(gsm8k.answer(plain, "flexible"))
        assert gsm8k.judge(solution, gold, params).outcome == Outcome.correct
        assert gsm8k.judge(solution, gold + 1, params).outcome == Outcome.wrong


def commas(digits: str) -> str:
    return f"{int(digits):,}"


RENDERED = [
    lambda sign, whole, part: f"{sign}{whole}.{part}",
    lambda sign, whole, part: f"{sign}{commas(whole)}.{part}",
    lambda sign, whole, part: f"{sign}${commas(whole)}.{part}00",
    lambda sign, whole, part: f"${sign}{whole}.{part}",
    lambda sign, whole, part: f"{sign}{whole}{part}e-{len(part)}",
    lambda sign, whole, part: f"{sign}{whole}{part}/1{'0' * len(part)}",
    lambda sign, whole, part: f"{sign.replace('-', chr(0x2212))}{whole}.{part} dollars.",
    lambda sign, whole, part: f"{sign}{whole}.{part}%",
]


@given(
    sign=st.sampled_from(["", "-"]),
    whole=st.integers(0, 10**12).map(str),
    part=st.integers(0, 10**6).map(str),
    first=st.sampled_from(RENDERED),
    second=st.sampled_from(RENDERED),
    lead=st.sampled_from(["#### ", "It is ", "x = ", "7 and 8, so (", "= "]),
)
def test_a_number_equals_itself_however_it_is_written(sign, whole, part, first, second, lead):
    gold = gsm8k.value_of(gsm8k.answer(first(sign, whole, part), "flexible"))
    assert gold == Fraction(f"{sign}{whole}.{part}")
    said = gsm8k.judge(lead + second(sign, whole, part), gold, gsm8k.Gsm8kParams())
    assert said.outcome == Outcome.correct
    other = gsm8k.judge(lead + second(sign, str(int(whole) + 1), part), gold, gsm8k.Gsm8kParams())
    assert other.outcome == Outcome.wrong


HOSTILE = [
    "9" * 100_000,
    "1," * 100_000,
    "1/" * 100_000,
    "-" * 100_000,
    "$" * 100_000,
    "####" * 50_000,
    "#### $" * 30_000,
    "." * 100_000,
    "1e999" * 30_000,
    "\u0669" * 100_000,
    "\\boxed{" * 30_000,
    "\\boxed{" + "{a}" * 60_000,
    "answer is " * 30_000,
    "answer:" + " " * 190_000,
    "the answer is A or " * 10_000,
    "(A" * 100_000,
    "A B " * 50_000,
]


async def test_hostile_texts_are_read_in_time():
    started = time.monotonic()
    texts = [text + "!" for text in HOSTILE] + ["x" * 1_000_000 + " 72"]
    found = await outcomes(gsm8k, texts, params={"tail_characters": 200_000}, answer="72")
    assert found[-1] == "correct" and set(found[:-1]) <= {"wrong", "no_answer"}
    texts[-1] = "x" * 1_000_000 + " (C)"
    found = await outcomes(multiple_choice, texts, params={"tail_characters": 200_000}, answer="C")
    assert found[-1] == "correct" and set(found[:-1]) <= {"wrong", "no_answer"}
    assert time.monotonic() - started < 60


async def test_a_number_too_long_to_read_is_another_number_than_a_short_one():
    assert await outcomes(gsm8k, ["9" * 5000, "0." + "3" * 5000], answer="9") == ["wrong", "wrong"]


async def test_only_the_end_of_a_long_completion_is_read():
    text = "#### 72 " + "and on " * 100
    assert await outcomes(gsm8k, [text], answer="72") == ["correct"]
    assert await outcomes(gsm8k, [text], params={"tail_characters": 100}, answer="72") == ["no_answer"]
    text = "\\boxed{B} " + "and on " * 100
    assert await outcomes(multiple_choice, [text], params={"tail_characters": 100}, answer="B") == ["no_answer"]


# ---- multiple_choice ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found", "anchored"),
    [
        ("\\boxed{B}", "B", "B"),
        ("\\boxed{(b)}", "B", "B"),
        ("$\\boxed{\\text{B}}$", "B", "B"),
        ("\\boxed{\\textbf{(B) }Paris}", "B", "B"),
        ("\\boxed{A}, no, \\boxed{B}", "B", "B"),
        ("The answer is A. \\boxed{B}", "B", "B"),
        ("\\boxed{A, C}", "A, C", "A, C"),
        ("\\boxed{A or B}", "A, B", "A, B"),
        ("\\boxed{42} so the answer is B", "B", "B"),
        ("The correct answer is (B).", "B", "B"),
        ("the answer is: b", "B", "B"),
        ("Answer: **B**", "B", "B"),
        ("Final answer: $B$", "B", "B"),
        ("Answer: option B", "B", "B"),
        ("The correct option is B because A is wrong", "B", "B"),
        ("the answer is A or B", "A, B", "A, B"),
        ("the answer is (A) and (B)", "A, B", "A, B"),
        ("The answer is A, option: B", "B", "B"),
        ("The answer is A. Wait. The answer is B", "B", "B"),
        ("the answer is a dog", "", ""),
        ("I pick (b)", "B", ""),
        ("It must be B", "B", ""),
        ("B", "B", ""),
        ("A dog barks", "", ""),
        ("B, or so. A dog barks.", "B", ""),
        ("vitamin B12 and ABBA", "", ""),
        ("E", "", ""),
        ("I do not know", "", ""),
        ("", "", ""),
    ],
)
def test_the_letter_a_completion_settles_on(text, found, anchored):
    options = multiple_choice.Options("ABCD", None)
    assert ", ".join(sorted(multiple_choice.picked(text, options, False))) == found
    assert ", ".join(sorted(multiple_choice.picked(text, options, True))) == anchored


async def test_multiple_choice_against_a_letter():
    texts = ["\\boxed{B}", "\\boxed{C}", "\\boxed{B, C}", "pass"]
    assert await outcomes(multiple_choice, texts, answer="B") == ["correct", "wrong", "wrong", "no_answer"]
    assert await outcomes(multiple_choice, texts, answer="(b) Paris") == ["correct", "wrong", "wrong", "no_answer"]
    assert await outcomes(multiple_choice, ["\\boxed{E}"], params={"choices": 5}, answer="E") == ["correct"]
    assert await outcomes(multiple_choice, ["\\boxed{B}"], answer="E") == ["unparsable"]
    assert await outcomes(multiple_choice, ["\\boxed{B}"], answer="A or B") == ["unparsable"]
    (hedged,) = await score(multiple_choice, ["\\boxed{B, C}"], answer="B")
    assert hedged.detail == "B, C"


async def test_multiple_choice_against_the_text_of_a_choice():
    choices = ["Rome", "Paris", "New  York", "rome."]
    texts = [
        "Paris.",
        "The answer is paris. It is big.",
        "\\boxed{\\text{Paris}}",
        "B",
        "\\boxed{Rome}",
        "\\boxed{Oslo}",
    ]
    for gold in ("Paris", "B", "b. Paris"):
        found = await outcomes(multiple_choice, texts, answer=gold, choices=choices)
        assert found == ["correct", "correct", "correct", "correct", "no_answer", "no_answer"]
    found = await outcomes(multiple_choice, ["Answer: new york"], answer="C", choices=choices)
    assert found == ["correct"]
    assert await outcomes(multiple_choice, ["B"], answer="Oslo", choices=choices) == ["unparsable"]
    with pytest.raises(Problem) as refusal:
        await score(multiple_choice, ["B"], answer="B", choices=["one"])
    assert (refusal.value.status, refusal.value.field) == (422, "groups[0].task.reference.choices")


@given(st.text(max_size=60), st.sampled_from("ABCD"))
def test_a_boxed_letter_at_the_end_is_the_answer(text, letter):
    options = multiple_choice.Options("ABCD", None)
    assert multiple_choice.picked(f"{text} \\boxed{{{letter}}}", options, True) == {letter}


# ---- exact_match -------------------------------------------------------------------------------------------------


async def test_exact_match_accepts_every_listed_answer():
    texts = ["New York", "NYC", "Albany"]
    assert await outcomes(exact_match, texts, answer="New York") == ["correct", "wrong", "wrong"]
    assert await outcomes(exact_match, texts, answer="New York", answers=["NYC"]) == ["correct", "correct", "wrong"]
    found = await outcomes(exact_match, ["nyc"], params={"case": False}, answer="New York", answers=["NYC"])
    assert found == ["correct"]
    with pytest.raises(Problem) as refusal:
        await score(exact_match, ["NYC"], answer="New York", answers="NYC")
    assert refusal.value.field == "groups[0].task.reference.answers"


# ---- json_schema -------------------------------------------------------------------------------------------------

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name"],
    "additionalProperties": False,
}
GOOD = '{"name": "Ada", "age": 36}'


@in_one_loop
async def test_json_against_a_schema(pool):
    texts = [GOOD, '{"age": 36}', '{"name": "Ada", "age": -1}', "not JSON", "", "{'name': 'Ada'}", '{"name": NaN}']
    wanted = ["correct", "wrong", "wrong", "wrong", "no_answer", "wrong", "wrong"]
    assert await outcomes(json_schema, texts, pool, {"json_schema": PERSON}) == wanted
    assert await outcomes(json_schema, texts, pool, json_schema=PERSON) == wanted
    scores = await score(json_schema, texts, pool, {"json_schema": PERSON, "partial": 0.25})
    assert [item.value for item in scores] == [1, 0.25, 0.25, 0, 0, 0, 0]
    assert "'name' is a required property" in scores[1].detail and "$.age" in scores[2].detail
    assert "not JSON" in scores[3].detail


@in_one_loop
async def test_where_the_json_is_looked_for(pool):
    fenced = f"First:\n```json\n{{}}\n```\nno, better:\n```\n{GOOD}\n```\nDone."
    inline = f"[see] the object {GOOD} and more"
    broken = '{"name": oops} ' + GOOD
    for where, wanted in [
        ("block", ["correct", "wrong", "wrong", "correct"]),
        ("whole", ["wrong", "wrong", "wrong", "correct"]),
        ("first", ["wrong", "correct", "correct", "correct"]),
    ]:
        params = {"json_schema": PERSON, "where": where}
        assert await outcomes(json_schema, [fenced, inline, broken, GOOD], pool, params) == wanted
    params = {"json_schema": PERSON, "where": "first"}
    assert await outcomes(json_schema, ["no brackets", "[see"], pool, params) == ["no_answer", "no_answer"]


@in_one_loop
async def test_schemas_that_cannot_be_used(pool):
    assert await outcomes(json_schema, [GOOD], pool, json_schema={"type": "persona"}) == ["unparsable"]
    (score_,) = await score(json_schema, [GOOD], pool, json_schema={"$ref": "http://127.0.0.1:9/s.json"})
    assert score_.outcome == Outcome.unparsable and "127.0.0.1:9" in score_.detail
    (score_,) = await score(json_schema, [GOOD], pool, json_schema={"$ref": "#/$defs/gone"})
    assert score_.outcome == Outcome.unparsable
    inside = {"$ref": "#/$defs/person", "$defs": {"person": PERSON}}
    assert await outcomes(json_schema, [GOOD], pool, json_schema=inside) == ["correct"]
    for broken in ({}, {"json_schema": "x"}, {"json_schema": {"const": "x" * 200_000}}):
        with pytest.raises(Problem) as refusal:
            await score(json_schema, [GOOD], pool, **broken)
        assert (refusal.value.status, refusal.value.field) == (422, "groups[0].task.reference.json_schema")


def test_a_spec_with_a_wrong_schema_is_refused():
    deep: dict = {}
    for _ in range(200):
        deep = {"not": deep}
    for schema, says in [({"type": "persona"}, "not a JSON schema"), (deep, "64 levels"), ({"enum": 3}, "JSON schema")]:
        with pytest.raises(SpecError, match=says):
            check_spec(RewardSpec(rewards=[RewardTerm(name="json_schema", params={"json_schema": schema})]))


@in_one_loop
async def test_hostile_json_fails_and_is_never_a_zero(pool):
    texts = ["[" * 100_000 + "]" * 100_000, "[" + "9" * 100_000 + "]", '{"name": "' + "a" * 40 + '!"}', GOOD]
    schema = {"type": "object", "properties": {"name": {"pattern": "^(a+)+$"}}}
    scores = await score(json_schema, texts, pool, {"json_schema": schema})
    assert [str(item.outcome) for item in scores] == ["error", "error", "timeout", "wrong"]
    assert [item.value for item in scores[:3]] == [None] * 3
    scores = await score(json_schema, ["{" * 300_000, "[" * 20_000], pool, {"json_schema": schema, "where": "first"})
    assert scores[0].outcome == Outcome.no_answer
    assert (scores[1].value is None) == (scores[1].outcome in (Outcome.error, Outcome.timeout))


# ---- tag_count, reasoning_steps -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        ("<think>\na\n</think>\n<answer>\nb\n</answer>", 1.0),
        ("<think>a</think>", 0.5),
        ("<think><think></think><answer></answer>", 0.75),
        ("<Think></Think>", 0.0),
        ("", 0.0),
    ],
)
async def test_tag_count(text, value):
    (found,) = await score(tag_count, [text])
    assert (found.value, found.outcome) == (value, Outcome.ok)


async def test_tag_count_of_other_tags():
    (found,) = await score(
        tag_count, ["<plan>x</plan> [done] [done]"], params={"tags": ["<plan>", "</plan>", "[done]"]}
    )
    assert found.value == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("Step 1: a\nStep 2: b", 2),
        ("1. a\n2) b\n  3. c", 3),
        ("- a\n* b\n\u2022 c\n-d\n--- \n**bold**", 3),
        ("First, a. Second, b. Next, c. Finally, d.", 4),
        ("The first, the second", 0),
        ("It weighs 3. Then 4.", 0),
        ("so Step 12: x", 1),
        ("", 0),
    ],
)
async def test_reasoning_steps(text, steps):
    (found,) = await score(reasoning_steps, [text], params={"target": 10})
    assert found.value == pytest.approx(steps / 10)
    (found,) = await score(reasoning_steps, [text])
    assert found.value == min(1.0, steps / 3)


async def test_reasoning_steps_of_hostile_texts_end():
    texts = [mark * 150_000 for mark in (" ", "\n", "- ", "\n-", "Step ", "1", "First,", "\t- ")]
    assert all(0 <= item.value <= 1 for item in await score(reasoning_steps, texts))
