"""What each benchmark makes of a record: prompt, reference, and what of a completion is judged."""

import base64
import json
import pickle
import zlib
from dataclasses import replace

import numpy as np
import pytest

from services.evaluation import sources
from services.evaluation.benchmark import Hub, Item
from services.evaluation.identity import checksum
from services.evaluation.protocol import PRESETS, asked, described
from services.evaluation.tasks import BENCHMARKS, alpaca_eval, cruxeval_o, livecodebench, mmlu_pro
from services.prompts import named
from services.startup import StartupError

GSM8K = {"question": "How many?", "answer": "2*540 = <<2*540=1080>>1080\n#### 1,080"}
CRUX = {"code": "def f(x):\n    return x", "input": "", "output": "'a'", "id": "sample_1"}
MMLU = {
    "question_id": 7,
    "question": "Which?",
    "options": ["north", "south", "N/A"],
    "answer": "B",
    "category": "geography",
}


def only(name, record, examples=()):
    return BENCHMARKS[name].read(record, list(examples))


def test_math_is_asked_with_the_papers_prompt_and_the_bare_problem():
    item = only("gsm8k", GSM8K)
    assert item.reference == {"answer": "1080"}
    (one,) = asked(BENCHMARKS["gsm8k"], [item], PRESETS["paper"], "m")
    assert [turn.content for turn in one.messages] == [named("intuitor-3b@1").system, "How many?"]
    assert one.sampling.temperature == 0 and one.sampling.max_tokens == 3072
    plain = PRESETS["paper"].model_copy(update={"plain": True, "prompt": None})
    (one,) = asked(BENCHMARKS["gsm8k"], [item], plain, "m")
    assert one.messages is None and one.prompt == "How many?"


def test_math500_is_the_same_from_either_copy():
    bare = {"problem": "Find $x$.", "answer": "2"}
    asked_for = {
        **bare,
        "problem": "Find $x$.\nPlease reason step by step, and put your final answer within \\boxed{}.",
    }
    assert only("math500", bare) == only("math500", asked_for)


def test_a_protocol_says_where_it_departs_from_its_preset():
    assert described(PRESETS["paper"]) == "paper"
    changed = PRESETS["paper"].model_copy(update={"temperature": 0.9, "samples": 8})
    assert described(changed) == "paper, but temperature 0.9, 8 answers to each question"
    bare = PRESETS["open_r1"].model_copy(update={"prompt": None, "plain": True, "max_tokens": 99, "seeds": [0, 1]})
    assert described(bare) == "open_r1, but no prompt around problems, no chat template, at most 99 tokens, 2 seeds"


def test_keys_name_what_decides_an_answer_and_nothing_else():
    item, benchmark = only("gsm8k", GSM8K), BENCHMARKS["gsm8k"]
    drawn = PRESETS["open_r1"].model_copy(update={"samples": 2, "seeds": [0, 1]})
    keys = [one.key for one in asked(benchmark, [item], drawn, "m")]
    seeds = {one.sampling.seed for one in asked(benchmark, [item], drawn, "m")}
    assert len(set(keys)) == len(seeds) == 4
    more = drawn.model_copy(update={"samples": 3, "preset": "paper"})
    assert set(keys) < {one.key for one in asked(benchmark, [item], more, "m")}
    for change in ({"temperature": 0.7}, {"max_tokens": 9}, {"prompt": None}, {"plain": True}):
        changed = drawn.model_copy(update=change)
        assert not set(keys) & {one.key for one in asked(benchmark, [item], changed, "m")}
    assert not set(keys) & {one.key for one in asked(benchmark, [item], drawn, "other")}


# ---- CRUXEval --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"reasoning": "r", "answer": "[1, 2]"}', "[1, 2]"),
        ('```json\n{"reasoning": "r", "answer": "\'a\'"}\n```', "'a'"),
        ('{"answer": "1"} no: {"answer": "2"}', "2"),
        ('{"answer": "hello"}', "'hello'"),
        ('{"answer": ""}', "''"),
        ('{"answer": "-3.5"}', "-3.5"),
        ('{"answer": "True"}', "True"),
        ('{"answer": "Truely"}', "'Truely'"),
        ('{"answer": "OrderedDict([(1, 2)])"}', "OrderedDict([(1, 2)])"),
        ('{"answer": [1, null, true]}', "[1, None, True]"),
        ('{"answer": 7}', "7"),
        ('{"answer": {"a": 1}}', "{'a': 1}"),
        ('{"reasoning": "r", "answer": (1, 2)}', "(1, 2)"),
        ("```\n{\"answer\": b'x'}\n```", "b'x'"),
    ],
)
def test_the_answer_of_a_json_reply(text, value):
    assert cruxeval_o.judged(text) == f"[ANSWER]{value}[/ANSWER]"


def test_no_answer_in_a_reply_is_none():
    assert cruxeval_o.judged("the answer is [1]") == cruxeval_o.judged("") == ""
    assert cruxeval_o.judged('"answer": ' + "[" * 100_000).startswith("[ANSWER]")


def test_cruxeval_asks_for_the_call():
    item = only("cruxeval_o", CRUX)
    assert "f()\n" in item.prompt and CRUX["code"] in item.prompt and item.id == "sample_1"
    assert item.reference == {"answer": "'a'", "code": CRUX["code"], "input": ""}


# ---- MMLU-Pro --------------------------------------------------------------------------------------------------


def test_mmlu_pro_begins_with_worked_examples_of_the_subject():
    worked = {**MMLU, "question": "Example?", "cot_content": "A: Let's think step by step. Hot. The answer is (A)."}
    other = {**worked, "category": "law"}
    item = only("mmlu_pro", MMLU, [other, *[worked] * 7])
    assert item.prompt.count("Example?") == mmlu_pro.SHOTS and "about geography" in item.prompt
    assert "Answer: Let's think step by step. Hot. The answer is (A).\n\nQuestion:\n" in item.prompt
    assert item.prompt.endswith("Options:\nA. north\nB. south\nAnswer: Let's think step by step.")
    assert item.reference == {"answer": "B", "choices": ["north", "south"]} and item.id == "7"
    (one,) = asked(BENCHMARKS["mmlu_pro"], [item], PRESETS["paper"], "m")
    assert one.messages is None and one.sampling.stop == ["Question:"]
    with pytest.raises(ValueError, match="no worked example"):
        only("mmlu_pro", MMLU, [other])


# ---- LiveCodeBench ---------------------------------------------------------------------------------------------


def packed(tests) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


def test_livecodebench_reads_private_tests_without_unpickling():
    stdin = {"input": "1\n", "output": "2\n", "testtype": "stdin"}
    record = {
        "question_id": "q",
        "question_content": "Double it.",
        "public_test_cases": json.dumps([stdin]),
        "private_test_cases": packed([{**stdin, "input": "é\n"}]),
        "starter_code": "",
        "metadata": "{}",
    }
    item = only("livecodebench", record)
    assert [test["input"] for test in item.reference["tests"]] == ["1\n", "é\n"] and "fn_name" not in item.reference
    assert livecodebench.STDIN in item.prompt

    class Hostile:
        def __reduce__(self):
            return (pytest.fail, ("it was carried out",))

    for pickled in (pickle.dumps(Hostile()), b"no pickle"):
        with pytest.raises(ValueError, match="private_test_cases cannot be read"):
            only("livecodebench", {**record, "private_test_cases": base64.b64encode(zlib.compress(pickled)).decode()})


def test_livecodebench_unpacks_no_more_than_its_limit(monkeypatch):
    tests = [{"input": "1" * 5000, "output": "2"}]
    record = {"question_id": "q", "question_content": "Double it.", "public_test_cases": []}
    record["private_test_cases"] = packed(tests)
    size = len(zlib.decompress(base64.b64decode(packed(tests))))
    monkeypatch.setattr(livecodebench, "LONGEST_TESTS", size + 1)
    assert only("livecodebench", record).reference["tests"] == tests
    monkeypatch.setattr(livecodebench, "LONGEST_TESTS", size - 1)
    with pytest.raises(ValueError, match=f"private_test_cases cannot be read: .*more than {size - 1} bytes"):
        only("livecodebench", record)


def test_livecodebench_calls_a_function_where_the_record_names_one():
    record = {
        "question_id": "q",
        "question_content": "Shift.",
        "public_test_cases": json.dumps([{"input": "[1]\n2", "output": "[3,4]", "testtype": "functional"}]),
        "starter_code": "class Solution:\n    def shift(self, xs):\n        ",
        "metadata": json.dumps({"func_name": "shift"}),
    }
    item = only("livecodebench", record)
    assert item.reference == {"tests": [{"input": "[1]\n2", "output": "[3, 4]"}], "fn_name": "shift"}
    assert "```python\nclass Solution:\n    def shift(self, xs):\n```" in item.prompt


# ---- AlpacaEval ------------------------------------------------------------------------------------------------


def rated(length: int, baseline: int, value: float):
    return Item("i", "p", {"answer": "b" * baseline}), "a" * length, value


def test_the_win_rate_at_equal_length():
    same = [rated(10, 10, value) for value in (1.0, 0.0, 0.0, 0.5)]
    assert alpaca_eval.at_equal_length(same)["at_equal_length"] == pytest.approx(0.375)
    # Longer answers win and shorter ones lose, as often: none of it is left at equal length.
    biased = [rated(30, 10, 0.9), rated(10, 30, 0.1)] * 5
    assert alpaca_eval.at_equal_length(biased)["at_equal_length"] == pytest.approx(0.5)
    always = [rated(30, 10, 1.0), rated(20, 10, 1.0)]
    assert 0.9 < alpaca_eval.at_equal_length(always)["at_equal_length"] <= 1.0


def test_the_fit_has_no_slope_left():
    random = np.random.default_rng(0)
    rows = [rated(int(a), int(b), float(v)) for a, b, v in zip(*random.integers(1, 90, (2, 60)), random.random(60))]  # noqa: B905
    chance = alpaca_eval.at_equal_length(rows)["at_equal_length"]
    lengths = np.array([len(text) - len(item.reference["answer"]) for item, text, _ in rows])
    x, y = np.tanh(lengths / lengths.std()), np.array([value for *_, value in rows])
    best = min(np.linspace(-3, 3, 601), key=lambda slope: loss(np.log(chance / (1 - chance)), slope, x, y))
    for nearby in (chance - 0.02, chance + 0.02):
        assert loss(np.log(chance / (1 - chance)), best, x, y) < min(
            loss(np.log(nearby / (1 - nearby)), slope, x, y) for slope in np.linspace(-3, 3, 601)
        )


def loss(intercept, slope, x, y) -> float:
    chance = 1 / (1 + np.exp(-intercept - slope * x))
    return float(-(y * np.log(chance) + (1 - y) * np.log(1 - chance)).sum())


# ---- files -----------------------------------------------------------------------------------------------------


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_a_file_becomes_questions(tmp_path):
    other = {**GSM8K, "question": "How much?"}
    write(tmp_path / "gsm8k_test.jsonl", GSM8K, other, GSM8K)
    found = sources.load(BENCHMARKS["gsm8k"], tmp_path, None)
    assert [item.prompt for item in found.items] == ["How many?", "How much?"]
    first = sources.load(BENCHMARKS["gsm8k"], tmp_path, 1)
    assert (len(first.items), first.left_out, found.left_out) == (1, 2, 0)
    write(tmp_path / "gsm8k_test.jsonl", dict(reversed(GSM8K.items())), other, GSM8K)
    assert sources.load(BENCHMARKS["gsm8k"], tmp_path, None).sha256 == found.sha256


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (None, "no gsm8k_test.jsonl (nor .parquet); without --data the hub is read"),
        ("", "no records"),
        ("{", "line 1: not valid JSON"),
        ("[]", "line 1: a row is a JSON object"),
        ('{"question": "q"}', "record 1: not a record of gsm8k: no field 'answer'"),
        ('{"question": "q", "answer": "7"}', "record 1: not a record of gsm8k: answer has no number after ####"),
        ('{"question": " ", "answer": "#### 7"}', "question is text (got ' ')"),
    ],
)
def test_a_file_that_is_not_of_the_benchmark_is_refused(tmp_path, lines, said):
    if lines is not None:
        (tmp_path / "gsm8k_test.jsonl").write_text(lines)
    with pytest.raises(StartupError) as refused:
        sources.load(BENCHMARKS["gsm8k"], tmp_path, None)
    assert said in str(refused.value)


def test_a_checksum_names_what_decides_what_a_model_says(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    before = checksum(tmp_path)
    (tmp_path / "evaluation-400.json").write_text("{}")
    (tmp_path / "README.md").write_text("a model")
    assert checksum(tmp_path) == before
    for name in ("model.safetensors", "chat_template.jinja"):
        (tmp_path / name).write_bytes(b"Weights")
        assert checksum(tmp_path) != before
        before = checksum(tmp_path)


def test_without_a_folder_the_hub_is_read(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    saved = tmp_path / "hub"  # `datasets` reads such a folder as it reads the hub
    datasets.DatasetDict({"test": datasets.Dataset.from_list([GSM8K])}).save_to_disk(saved)
    benchmark = replace(BENCHMARKS["gsm8k"], hub=Hub(str(saved), "test"))
    found = sources.load(benchmark, None, None)
    assert found.items == [only("gsm8k", GSM8K)] and found.source == f"{saved} (test)"
    datasets.Dataset.from_list([GSM8K]).to_parquet(tmp_path / "gsm8k_test.parquet")
    assert sources.load(benchmark, tmp_path, None).items == found.items
    for hub in (Hub("owner/nothing", "test"), Hub("owner/nothing", "test", files=("a.jsonl",))):
        with pytest.raises(StartupError, match="^'owner/nothing'.*hub"):
            sources.load(replace(benchmark, hub=hub), None, None)
