"""IFEval's instruction checks one by one, and the reward made of them in real worker processes."""

import time

import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from reward_server.ifeval.following import check, forms
from reward_server.ifeval.registry import instructions
from reward_server.reward import Context
from reward_server.rewards import instruction_following
from reward_server.workers import Limits, Turn, WorkerPool
from services.api import CompletionText, RewardGroup
from services.contract import Outcome, Reference, Task
from services.problem import Problem

pytestmark = pytest.mark.alone

SENTENCES = "Dr. Smith paid $3.50 to Mr. Jones. Why? Nobody knows!"
SPANISH = "El perro corre por el parque todos los días con su dueño."
ENGLISH = "the dog runs through the park every day with its owner"

CASES = [
    ("keywords:existence", {"keywords": ["Rock", "roll"]}, "rocking, ROLLING", True),
    ("keywords:existence", {"keywords": ["rock", "roll"]}, "rock", False),
    ("keywords:existence", {"keywords": ["a.c"]}, "abc", False),
    ("keywords:existence", {"keywords": ["C++"]}, "I like c++.", True),
    ("keywords:frequency", {"keyword": "war", "frequency": 2, "relation": "at least"}, "War, and toward", True),
    ("keywords:frequency", {"keyword": "war", "frequency": 2, "relation": "less than"}, "War, and toward", False),
    ("keywords:frequency", {"keyword": "war", "frequency": 1, "relation": "less than"}, "peace", True),
    ("keywords:forbidden_words", {"forbidden_words": ["rock"]}, "a rocket", True),
    ("keywords:forbidden_words", {"forbidden_words": ["rock"]}, "Rock!", False),
    ("keywords:forbidden_words", {"forbidden_words": ["C++"]}, "C++ it is", False),
    ("keywords:letter_frequency", {"letter": "t", "let_frequency": 2, "let_relation": "less than"}, "To be", True),
    ("keywords:letter_frequency", {"letter": "T", "let_frequency": 2, "let_relation": "at least"}, "To it", True),
    ("keywords:letter_frequency", {"letter": "#", "let_frequency": 4, "let_relation": "at least"}, "#a #b #c", False),
    ("language:response_language", {"language": "es"}, SPANISH, True),
    ("language:response_language", {"language": "en"}, SPANISH, False),
    ("language:response_language", {"language": "en"}, "1 2 3", True),
    ("length_constraints:number_sentences", {"num_sentences": 3, "relation": "at least"}, SENTENCES, True),
    ("length_constraints:number_sentences", {"num_sentences": 4, "relation": "at least"}, SENTENCES, False),
    ("length_constraints:number_sentences", {"num_sentences": 4, "relation": "less than"}, SENTENCES, True),
    ("length_constraints:number_words", {"num_words": 5, "relation": "at least"}, "it's a well-known", True),
    ("length_constraints:number_words", {"num_words": 5, "relation": "less than"}, "it's a well-known", False),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "one\n***\ntwo", True),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "***\none\n***\ntwo\n***", True),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "one\n***\n***\ntwo", False),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "one\n\ntwo", False),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Weekend"},
        "One.\n\n'weekend, then",
        True,
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "weekend"},
        "One.\n\n\n\nWeekend",
        True,
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "weekend"},
        "One.\n\nWeekends are",
        False,
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 1, "nth_paragraph": 1, "first_word": "weekend"},
        "Weekend\n\ntwo",
        False,
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] of [a [b]", True),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] [over\nlines]", False),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\np. s. I forgot", True),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "PS: no", False),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "P.S. only", False),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "p.p.s too", True),
    ("detectable_content:postscript", {"postscript_marker": "N.B."}, "n.b. this", True),
    ("detectable_content:postscript", {"postscript_marker": "N.B."}, "nxbx this", False),
    ("detectable_format:number_bullet_lists", {"num_bullets": 3}, "so:\n* a\n  - b\n**bold**\n- c", True),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "so:\n* a\n* b\n* c", False),
    ("detectable_format:constrained_response", {}, "Well. My answer is maybe.", True),
    ("detectable_format:constrained_response", {}, "my answer is yes", False),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*one* and **two**", True),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 1}, "** ** and *\n*", False),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        "SECTION 1\na\nSECTION2 b",
        True,
    ),
    ("detectable_format:multiple_sections", {"section_spliter": "Section", "num_sections": 1}, "Section one", False),
    ("detectable_format:json_format", {}, '```json\n{"a": [1, null]}\n```', True),
    ("detectable_format:json_format", {}, '"a string is JSON, too"', True),
    ("detectable_format:json_format", {}, 'Here: {"a": 1}', False),
    ("detectable_format:json_format", {}, "[NaN]", False),
    ("detectable_format:title", {}, "text <<A title>> text", True),
    ("detectable_format:title", {}, ">>x<<>>", False),
    ("detectable_format:title", {}, "<< >>", False),
    ("detectable_format:title", {}, "<<over\nlines>>", False),
    ("combination:two_responses", {}, "one\n******\ntwo", True),
    ("combination:two_responses", {}, "one\n******\n one ", False),
    ("combination:two_responses", {}, "one\n******\n******\ntwo", False),
    ("combination:two_responses", {}, "a******b******c", False),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Write a Poem."}, " write a poem. Roses", True),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Write a Poem."}, "Sure! Write a poem.", False),
    ("startend:end_checker", {"end_phrase": "Any other questions?"}, '"So. any other questions?"\n', True),
    ("startend:end_checker", {"end_phrase": "Any other questions?"}, "Any other questions? No.", False),
    ("startend:quotation", {}, ' "all of it" ', True),
    ("startend:quotation", {}, '"', False),
    ("startend:quotation", {}, '"some" of it', False),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        "CO-OP, A b",
        True,
    ),
    ("change_case:capital_word_frequency", {"capital_frequency": 1, "capital_relation": "less than"}, "No 42 -", True),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "less than"}, "A, B", False),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "less than"}, "DON'T", True),
    ("change_case:english_capital", {}, ENGLISH.upper(), True),
    ("change_case:english_capital", {}, ENGLISH.capitalize(), False),
    ("change_case:english_capital", {}, SPANISH.upper(), False),
    ("change_case:english_lowercase", {}, ENGLISH, True),
    ("change_case:english_lowercase", {}, ENGLISH.capitalize(), False),
    ("change_case:english_lowercase", {}, SPANISH.lower(), False),
    ("punctuation:no_comma", {}, "no; none", True),
    ("punctuation:no_comma", {}, "one, two", False),
]


@pytest.mark.parametrize(("name", "kwargs", "text", "wanted"), CASES)
def test_each_instruction(name, kwargs, text, wanted):
    arguments = instructions()[name].arguments.model_validate(kwargs).model_dump()
    assert instructions()[name].follows(text, **arguments) is wanted


def test_all_25_types_are_here_and_both_answers_of_each_are_tested():
    assert len(instructions()) == 25
    assert {(name, wanted) for name, *_, wanted in CASES} == {(n, w) for n in instructions() for w in (True, False)}


def follows(name, text, loose=False, **arguments):
    return check({"text": text, "ids": [name], "arguments": [arguments], "loose": loose})["followed"][0]


def test_loose_takes_off_first_line_last_line_and_asterisks():
    assert set(forms("a\n*b*\nc")) == {"a\n*b*\nc", "*b*\nc", "a\n*b*", "*b*", "a\nb\nc", "b\nc", "a\nb", "b"}
    wrapped = 'Sure, here it is:\n**"all of it"**\nAnything else?'
    assert not follows("startend:quotation", wrapped)
    assert follows("startend:quotation", wrapped, loose=True)
    assert not follows("startend:quotation", 'a\nb\n"all of it"\nc\nd', loose=True)


@given(text=st.text(max_size=200), name=st.sampled_from(["startend:quotation", "punctuation:no_comma"]))
def test_loose_is_never_stricter(text, name):
    assert follows(name, text, loose=True) >= follows(name, text)


@pytest.mark.parametrize("loose", [True, False])
def test_nothing_follows_nothing(loose):
    assert not follows("punctuation:no_comma", " \n\t\n ", loose=loose)


@given(st.lists(st.sampled_from(["word", "x1", "naïve"]), max_size=40), st.integers(0, 45))
def test_words_are_counted(words, bound):
    text = "  ".join(f"{word}," for word in words)
    arguments = {"num_words": bound}
    assert instructions()["length_constraints:number_words"].follows(text, relation="at least", **arguments) == (
        len(words) >= bound
    )
    assert instructions()["length_constraints:number_words"].follows(text, relation="less than", **arguments) == (
        len(words) < bound
    )


def test_the_language_of_a_doubtful_text_is_the_same_every_time():
    texts = ["ok", "hello amigo", "no", "Die Welt is a stage"]
    said = [[follows("language:response_language", text, language="en") for text in texts] for _ in range(20)]
    assert all(again == said[0] for again in said)


# ---- the reward --------------------------------------------------------------------------------------------------


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pool():
    made = WorkerPool(1, Limits(quantum_seconds=1, full_seconds=2, grace_seconds=0.5, slow_wait_seconds=60))
    made.start()
    yield made
    await made.stop()


async def score(pool, texts, reference, **params):
    task = Task(task_id="t", prompt="p", reference=reference)
    group = RewardGroup(group_id="g", task=task, completions=[CompletionText(text=text) for text in texts])
    context = Context(pool, time.monotonic() + 120, Turn())
    return await instruction_following.score(group, instruction_following.REWARD.params(**params), context)


def reference(ids, kwargs) -> Reference:
    return Reference.model_validate({"instruction_id_list": ids, "kwargs": kwargs})


TASK = reference(
    ["punctuation:no_comma", "length_constraints:number_words", "startend:quotation"],
    [{}, {"relation": "at least", "num_words": 3, "num_sentences": None, "language": None}, {}],
)


@pytest.mark.asyncio(loop_scope="module")
async def test_the_share_of_instructions_followed_and_which_were_not(pool):
    scores = await score(pool, ['"one two three"', "one two three", "one, two", ""], TASK)
    assert [item.value for item in scores] == pytest.approx([1, 2 / 3, 0, 0])
    assert all(item.outcome == Outcome.ok for item in scores)
    assert scores[0].detail == "" and scores[1].detail == "not followed: startend:quotation"
    scores = await score(pool, ['"one two three"', "one two three"], TASK, pay="all")
    assert [item.value for item in scores] == [1, 0]
    scores = await score(pool, ['Here:\n"one two three"'], TASK, pay="all", variant="loose")
    assert [item.value for item in scores] == [1]


@pytest.mark.parametrize(
    ("ids", "kwargs", "field", "says"),
    [
        (None, None, "instruction_id_list", "required"),
        (["punctuation:no_comma"], None, "kwargs", "required"),
        ([], [], "instruction_id_list", "at least 1"),
        (["punctuation:no_comma"], [{}, {}], "kwargs", "one entry"),
        (["punctuation:no_comma", "no:such"], [{}, {}], "instruction_id_list[1]", "punctuation:no_comma"),
        (["length_constraints:number_words"], [{"num_words": 5}], "kwargs[0].relation", "takes num_words, relation"),
        (
            ["length_constraints:number_words"],
            [{"num_words": 5, "relation": "about"}],
            "kwargs[0].relation",
            "'less than' or 'at least'",
        ),
        (["punctuation:no_comma"], [{"num_words": 5}], "kwargs[0].num_words", "no arguments"),
        (["keywords:letter_frequency"], [{"letter": "ab"}], "kwargs[0].letter", "at most 1"),
    ],
)
@pytest.mark.asyncio(loop_scope="module")
async def test_a_reference_that_cannot_be_used_is_refused_by_field(pool, ids, kwargs, field, says):
    given = {"instruction_id_list": ids, "kwargs": kwargs}
    broken = Reference.model_validate({key: value for key, value in given.items() if value is not None})
    with pytest.raises(Problem) as refusal:
        await score(pool, ["x"], broken)
    assert refusal.value.status == 422
    assert refusal.value.field == f"groups[0].task.reference.{field}" and says in refusal.value.detail


EVERYTHING = reference(
    [name for name, *_ in CASES[::2]],
    [kwargs for _, kwargs, *_ in CASES[::2]],
)


@pytest.mark.asyncio(loop_scope="module")
async def test_hostile_texts_are_judged_or_fail_in_time_and_a_failure_is_never_a_zero(pool):
    size = 200_000
    texts = [
        "[" * size,
        "[" * 5_000 + "]" * 5_000,
        "<<" * size,
        "*" * size,
        "\n" * size,
        "A. B. " * (size // 3),
        "\u0661\u0662" * size,
        "9" * size,
        '{"a":' * 5_000 + "1" + "}" * 5_000,
        "word " * (size // 2),
    ]
    started = time.monotonic()
    scores = await score(pool, texts, EVERYTHING, variant="loose")
    assert time.monotonic() - started < 100
    for item in scores:
        assert (item.value is None) == (item.outcome in (Outcome.timeout, Outcome.error)), item
    by_text = dict(zip([text[:2] for text in texts], scores, strict=True))
    assert by_text["[["].outcome == Outcome.error  # JSON too deep for the reader, not for JSON
    assert by_text["<<"].value is not None and by_text["wo"].value is not None
    (fine,) = await score(pool, ["no commas"], reference(["punctuation:no_comma"], [{}]))
    assert fine.value == 1.0
