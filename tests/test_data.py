"""Task source: every format gives the same tasks, order is a pure function of the seed, faults are named."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow
import pytest
from pyarrow import parquet
from tiny import make_tiny_tokenizer

from services import prompts, recipe
from services.contract import group_id
from services.orchestrator import data

ROWS = [{"question": f"{n}+{n}?", "answer": f"adding\n#### {2 * n}", "key": f"row{n}"} for n in range(23)]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tiny_tokenizer()


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def jsonl(tmp_path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", ROWS)


def recipe_of(path: Path | str, seed: int = 0, model: str = "unused", **settings) -> recipe.Recipe:
    fields = settings.pop("fields", {"prompt": "question", "answer": "answer"})
    return recipe.parse(
        {
            "run": {"name": "r", "dir": "/unused", "seed": seed},
            "model": {"path": model},
            "data": {"path": str(path), "fields": fields, "source": "gsm8k", **settings},
            "rewards": "intuitor",
            "trainer": {"steps": 1, "groups_per_step": 1},
        }
    )


def load(tokenizer, path, **settings) -> data.TaskSource:
    return data.load(recipe_of(path, **settings), tokenizer)


def test_a_row_becomes_a_task(tokenizer, jsonl):
    source = load(tokenizer, jsonl, answer_pattern=r"####\s*(.+)", system_prompt="Think.", shuffle=False)
    task = source.task(3)
    assert [(m.role, m.content) for m in task.messages] == [("system", "Think."), ("user", "3+3?")]
    assert (task.reference.answer, task.source, task.prompt) == ("6", "gsm8k", None)


def test_a_named_prompt_stands_around_the_problem(tokenizer, jsonl, tmp_path):
    task = load(tokenizer, jsonl, prompt="verl-boxed@1", shuffle=False).task(3)
    boxed = prompts.named("verl-boxed@1")
    assert task.messages == boxed.messages("3+3?")
    code = prompts.named("code-contests@1")
    for seed in (0, 1):
        tasks = load(tokenizer, jsonl, prompt=code.name, seed=seed, shuffle=False, max_prompt_tokens=1024).tasks
        assert [t.messages for t in tasks] == [code.messages(f"{n}+{n}?", seed) for n in range(23)]
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    path = write_jsonl(tmp_path / "c.jsonl", [{"chat": chat}, {"chat": chat[1:]}])
    with pytest.raises(data.DataError, match="line 1: field 'chat': already starts .* leave data.prompt out"):
        load(tokenizer, path, fields={"messages": "chat"}, prompt="verl-boxed@1")


def test_formats_agree(tokenizer, jsonl, tmp_path):
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet", row_group_size=5)
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "folder"))
    splits = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
    )
    splits.save_to_disk(str(tmp_path / "splits"))
    paths = [jsonl, tmp_path / "rows.parquet", tmp_path / "folder", tmp_path / "splits"]
    first, *others = [load(tokenizer, path).tasks for path in paths]
    assert len(first) == len(ROWS)
    for tasks in others:
        assert tasks == first
    assert len(load(tokenizer, tmp_path / "splits", split="test").tasks) == 1


def test_messages_and_tests_columns(tokenizer, tmp_path):
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    pairs = [{"input": "1", "output": "2"}, {"input": "3", "output": "4"}]
    columnar = {"input": ["1", "3"], "output": ["2", "4"]}
    path = write_jsonl(tmp_path / "c.jsonl", [{"chat": chat, "t": pairs}, {"chat": chat, "t": columnar}])
    first, second = load(tokenizer, path, fields={"messages": "chat", "tests": "t"}).tasks
    assert [m.model_dump() for m in first.messages] == chat
    assert first.reference == second.reference
    assert [(t.input, t.output) for t in first.reference.tests] == [("1", "2"), ("3", "4")]
    assert second.task_id == f"{first.task_id}-2"


def test_further_columns_of_the_reference(tokenizer, tmp_path):
    rows = [
        {"q": "a", "options": ["x", "y"], "given": [{"num_words": 3, "relation": None}]},
        {"q": "b", "options": None, "given": None},
    ]
    fields = {"prompt": "q", "reference": {"choices": "options", "kwargs": "given"}}
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "r.parquet")
    for path in (write_jsonl(tmp_path / "r.jsonl", rows), tmp_path / "r.parquet"):
        first, second = load(tokenizer, path, fields=fields).tasks
        assert first.reference.model_extra == {"choices": ["x", "y"], "kwargs": rows[0]["given"]}
        assert first.reference.answer is None and second.reference is None
    parquet.write_table(pyarrow.Table.from_pylist([{"q": "a", "options": b"x"}]), tmp_path / "b.parquet")
    with pytest.raises(data.DataError, match="field 'options': .*bytes"):
        load(tokenizer, tmp_path / "b.parquet", fields={"prompt": "q", "reference": {"choices": "options"}})
    parquet.write_table(pyarrow.Table.from_pylist([{"q": "a", "options": [float("nan")]}]), tmp_path / "n.parquet")
    with pytest.raises(data.DataError, match="field 'options': .*not JSON compliant"):
        load(tokenizer, tmp_path / "n.parquet", fields={"prompt": "q", "reference": {"choices": "options"}})
    with pytest.raises(data.DataError, match="gone"):
        load(tokenizer, tmp_path / "r.parquet", fields={"prompt": "q", "reference": {"choices": "gone"}})
    with pytest.raises(ValueError, match="fields.answer"):
        load(tokenizer, tmp_path / "r.parquet", fields={"prompt": "q", "reference": {"answer": "q"}})


def test_epochs_are_permutations_that_depend_on_the_seed_alone(tokenizer, jsonl):
    source = load(tokenizer, jsonl, seed=5)
    n = len(source.tasks)
    epochs = [[source.task(epoch * n + place).task_id for place in range(n)] for epoch in range(6)]
    assert all(sorted(ids) == sorted(task.task_id for task in source.tasks) for ids in epochs)
    assert len({tuple(ids) for ids in epochs}) == 6
    assert [load(tokenizer, jsonl, seed=6).task(i).task_id for i in range(n)] != epochs[0]
    # An order that was dropped from the cache comes back the same: a resumed run sees what the first one saw.
    assert [source.task(place).task_id for place in range(n)] == epochs[0]


def test_another_process_sees_the_same_order(tokenizer, jsonl):
    source = load(tokenizer, jsonl, seed=5)
    here = [source.order(epoch) for epoch in (0, 1, 7)]
    code = (
        "from services.contract import Task; from services.orchestrator.data import TaskSource\n"
        f"tasks = [Task(task_id=str(i), prompt='p') for i in range({len(source.tasks)})]\n"
        "source = TaskSource(tasks, 'r', 5); print([source.order(epoch) for epoch in (0, 1, 7)])"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(there.stdout) == here


def test_without_shuffle_the_order_is_the_files(tokenizer, jsonl):
    source = load(tokenizer, jsonl, shuffle=False)
    assert [source.task(i).messages[0].content for i in range(25)] == [f"{n % 23}+{n % 23}?" for n in range(25)]


def test_group_ids_follow_the_contract(tokenizer, jsonl):
    source = load(tokenizer, jsonl, fields={"prompt": "question", "id": "key"})
    ids = [source.group_id(index) for index in range(3 * 23)]
    assert len(set(ids)) == len(ids)
    assert ids[30] == group_id("r", 1, source.task(30).task_id)


def test_content_ids_do_not_depend_on_the_rows_place(tokenizer, tmp_path):
    forward = load(tokenizer, write_jsonl(tmp_path / "a.jsonl", ROWS))
    backward = load(tokenizer, write_jsonl(tmp_path / "b.jsonl", ROWS[::-1]))
    assert {t.task_id for t in forward.tasks} == {t.task_id for t in backward.tasks}


def test_duplicate_ids_of_the_id_column_are_refused(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [{"q": "a", "i": 7}, {"q": "b", "i": 8}, {"q": "c", "i": 7}])
    with pytest.raises(data.DataError, match=r"d.jsonl line 3: field 'i': id '7' is taken by .*line 1"):
        load(tokenizer, path, fields={"prompt": "q", "id": "i"})


def test_long_prompts_are_dropped_by_the_models_own_count(tokenizer, tmp_path, caplog):
    # Tiny tokenizer: one token a byte, plus <user> and <assistant> from the template.
    path = write_jsonl(tmp_path / "l.jsonl", [{"q": "x" * size} for size in (7, 8, 9, 30)])
    with caplog.at_level(logging.WARNING):
        source = load(tokenizer, path, fields={"prompt": "q"}, max_prompt_tokens=10, shuffle=False)
    assert [len(task.messages[0].content) for task in source.tasks] == [7, 8]
    assert "dropped 2 prompts of more than 10 tokens" in caplog.text
    for task, length in zip(source.tasks, data.prompt_lengths(source.tasks, tokenizer), strict=True):
        chat = [m.model_dump() for m in task.messages]
        assert length == len(tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"])
    with pytest.raises(data.DataError, match="data.max_prompt_tokens: every one of the 4 prompts"):
        load(tokenizer, path, fields={"prompt": "q"}, max_prompt_tokens=3)


def test_limit_reads_the_first_rows(tokenizer, jsonl):
    assert [t.messages[0].content for t in load(tokenizer, jsonl, limit=2).tasks] == ["0+0?", "1+1?"]


def test_without_a_chat_template_prompts_are_plain(jsonl):
    plain = make_tiny_tokenizer()
    plain.chat_template = None
    task = load(plain, jsonl, system_prompt="Think.", shuffle=False).task(0)
    assert (task.messages, task.prompt) == (None, "Think.\n\n0+0?")
    with pytest.raises(data.DataError, match="data.fields.messages: .* has no chat template"):
        load(plain, jsonl, fields={"messages": "question"})


@pytest.mark.parametrize(
    "line, settings, message",
    [
        ("{bad", {}, r"line 2: not valid JSON"),
        ('{"question": NaN, "answer": "1"}', {}, r"line 2: not valid JSON"),
        ("[1]", {}, r"line 2: a row is a JSON object"),
        ('{"answer": "#### 1"}', {}, r"line 2: no field 'question'; it has 'answer'"),
        ('{"question": 5, "answer": "#### 1"}', {}, r"line 2: field 'question': is text \(got 5\)"),
        (
            '{"question": "q", "answer": "none"}',
            {"answer_pattern": "#### (.+)"},
            r"line 2: field 'answer': .*does not match",
        ),
        (
            '{"question": "q", "answer": "#### 1", "t": [{"input": 3}]}',
            {"tests": "t"},
            r"line 2: field 't': tests.0.input",
        ),
    ],
)
def test_a_bad_row_is_named(tokenizer, tmp_path, line, settings, message):
    path = tmp_path / "bad.jsonl"
    good = '{"question": "q", "answer": "#### 1", "t": []}'
    path.write_text(f"{good}\n{line}\n")
    fields = {"prompt": "question", "answer": "answer", "tests": settings.pop("tests", None)}
    with pytest.raises(data.DataError, match="bad.jsonl " + message):
        load(tokenizer, path, fields=fields, **settings)


def test_bad_paths_are_named(tokenizer, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "e.jsonl").write_text("\n")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 but no")
    (tmp_path / "t.csv").write_text("a,b")
    datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "splits"))
    for name, message in [
        ("none.jsonl", "there is no file"),
        ("e.jsonl", "holds no rows"),
        ("broken.parquet", "not a Parquet file"),
        ("t.csv", "a file must end in .jsonl"),
        ("empty", "is not a folder that `datasets` saved"),
        ("splits", "has no split 'train'; it has test"),
    ]:
        with pytest.raises(data.DataError, match=message):
            load(tokenizer, tmp_path / name)
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    with pytest.raises(data.DataError, match="no column 'q'; it has 'question', 'answer', 'key'"):
        load(tokenizer, tmp_path / "rows.parquet", fields={"prompt": "q"})


def test_the_models_tokenizer_is_loaded(tiny_model, jsonl):
    source = data.load(recipe_of(jsonl, model=str(tiny_model)))
    assert source.task(0).messages is not None
    with pytest.raises(data.DataError, match="model.path: no tokenizer for"):
        data.load(recipe_of(jsonl, model=str(jsonl.parent / "nowhere")))
