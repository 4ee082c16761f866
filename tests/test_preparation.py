"""`rlif data prepare`: the same bytes every time, an account of every row, and a file that trains as it is."""

import hashlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from fastapi import FastAPI, Request, Response
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from served import served
from tiny import make_tiny_tokenizer

from services import prompts, recipe, rows
from services.orchestrator import data
from services.preparation import contamination, known, manifest, pass_rates
from services.preparation.prepare import Filters, prepare
from services.recipe_sections import Data, Fields
from services.rows import DataError

MATH = [
    {"problem": f"What is ${n} + {n}$?", "solution": f"It is \\boxed{{{n}}} twice, so $\\boxed{{{2 * n}}}$."}
    for n in range(20)
]
CONTEST = {
    "name": "1_A. Doubles",
    "description": "Read a number and print its double.",
    "public_tests": {"input": ["1\n"], "output": ["2\n"]},
    "private_tests": {"input": ["2\n", "3\n"], "output": ["4\n", "6\n"]},
    "generated_tests": {"input": ["-5\n"], "output": ["-10\n"]},
    "time_limit": {"seconds": 1, "nanos": 500_000_000},
    "memory_limit_bytes": 256 * 2**20,
    "cf_rating": 800,
    "cf_tags": ["math"],
    "solutions": {"language": [3], "solution": ["print(2 * int(input()))"]},
}
NO_TESTS = {"input": [], "output": []}


def write_jsonl(path: Path, given: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    return path


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rlif(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    """Exit code, and what the command said on stdout and stderr."""
    from services.cli.main import main

    monkeypatch.setattr(sys, "argv", ["rlif", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


@pytest.fixture
def run(monkeypatch, capsys):
    """`rlif data prepare ARGUMENTS --json` -> the manifest."""

    def prepared(*arguments: object) -> dict:
        code, out, err = rlif(monkeypatch, capsys, "data", "prepare", *arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    return prepared


def load(path: Path, **settings) -> list:
    """The tasks that a recipe on the file has, in the file's order."""
    tree = {
        "run": {"name": "r", "dir": "/unused"},
        "model": {"path": "unused"},
        "data": {"path": str(path), "shuffle": False, "max_prompt_tokens": 4096, **settings},
        "rewards": "intuitor",
        "trainer": {"steps": 1, "groups_per_step": 1},
    }
    return data.load(recipe.parse(tree), make_tiny_tokenizer()).tasks


# ---- bytes -----------------------------------------------------------------------------------------------------


def test_the_same_source_and_seed_give_the_same_bytes(run, tmp_path):
    source = write_jsonl(tmp_path / "math.jsonl", MATH)
    reversed_source = write_jsonl(tmp_path / "htam.jsonl", MATH[::-1])
    parquet.write_table(pyarrow.Table.from_pylist(MATH), tmp_path / "math.parquet")
    made = {}
    for name, path, seed in [
        ("a", source, 0),
        ("b", source, 0),
        ("reversed", reversed_source, 0),
        ("parquet", tmp_path / "math.parquet", 0),
        ("seed", source, 1),
    ]:
        account = run("math", tmp_path / f"{name}.jsonl", "--file", path, "--seed", seed, "--no-verify")
        made[name] = (tmp_path / f"{name}.jsonl").read_bytes()
        assert account["sha256"] == manifest.sha256(tmp_path / f"{name}.jsonl")
    assert made["a"] == made["b"] == made["reversed"] == made["parquet"] != made["seed"]
    assert sorted(made["a"].splitlines()) == sorted(made["seed"].splitlines())
    assert [row["answer"] for row in lines(tmp_path / "a.jsonl")] != [str(2 * n) for n in range(20)]


def test_the_manifest_accounts_for_every_row(run, tmp_path):
    source = write_jsonl(tmp_path / "math.jsonl", [*MATH, {"problem": "Prove it.", "solution": "Obvious."}])
    seen = write_jsonl(tmp_path / "seen.jsonl", [{"problem": MATH[3]["problem"]}])
    options = ("--file", source, "--decontaminate", seen, "--limit", 15, "--no-verify", "--seed", 3)
    account = run("math", tmp_path / "out.jsonl", *options)
    assert account["rows"] == {"in": 21, "out": 15}
    assert account["dropped"] == {"beyond_limit": 4, "contaminated": 1, "no_answer": 1}
    assert account["rows"]["in"] == account["rows"]["out"] + sum(account["dropped"].values())
    assert account["source"] == {"path": str(source), "sha256": manifest.sha256(source)}
    assert account["filters"]["decontaminate"] == [{"path": str(seen), "sha256": manifest.sha256(seen)}]
    assert (account["seed"], account["columns"]) == (3, ["id", "source", "prompt", "answer"])
    assert json.loads(manifest.beside(tmp_path / "out.jsonl").read_text()) == account


def test_a_prepared_file_trains_as_it_is_and_is_refused_when_changed(run, tmp_path):
    out = tmp_path / "out.jsonl"
    run("math", out, "--file", write_jsonl(tmp_path / "math.jsonl", MATH), "--no-verify")
    written = lines(out)
    tasks = load(out, prompt="intuitor-3b@1")
    assert [task.task_id for task in tasks] == [row["id"] for row in written]
    assert [task.reference.answer for task in tasks] == [row["answer"] for row in written]
    assert {task.source for task in tasks} == {"math"} and tasks[0].messages[0].role == "system"
    with out.open("a") as file:
        file.write("\n")
    with pytest.raises(DataError, match="has changed since it was prepared"):
        load(out)
    manifest.beside(out).write_text("{}")
    with pytest.raises(DataError, match="is no manifest of `rlif data prepare`"):
        load(out)
    manifest.beside(out).unlink()
    assert len(load(out)) == 20


def test_rewards_are_routed_by_the_rows_own_sources(tmp_path):
    path = write_jsonl(
        tmp_path / "two.jsonl", [{"prompt": "a", "source": "math"}, {"prompt": "b", "source": "code_contests"}]
    )
    assert [task.source for task in load(path, source="ignored")] == ["math", "code_contests"]
    routed = {"rewards": [{"name": "self_certainty", "sources": ["math"]}]}
    tree = {"run": {"name": "r", "dir": "d"}, "model": {"path": "m"}, "trainer": {"steps": 1, "groups_per_step": 1}}
    assert recipe.parse({**tree, **routed, "data": {"path": str(path)}}).data.names_sources
    with pytest.raises(recipe.RecipeError, match="none has a weight other than 0 for tasks of data.source 'x'"):
        recipe.parse({**tree, **routed, "data": {"path": str(path), "fields": {"prompt": "prompt"}, "source": "x"}})
    with pytest.raises(DataError, match="field 'source': a source is 1 to 128 characters"):
        load(write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "a", "source": 7}]))


def test_columns_without_standard_names_are_asked_for(tmp_path):
    path = write_jsonl(tmp_path / "q.jsonl", [{"question": "a", "gold": "b"}])
    with pytest.raises(DataError, match="data.fields: say which column is what: .* has 'question', 'gold'"):
        load(path)
    both = write_jsonl(tmp_path / "both.jsonl", [{"prompt": "a", "messages": []}])
    with pytest.raises(DataError, match="not one of prompt, messages"):
        load(both)


def test_a_prompt_is_put_around_each_problem_and_counted(run, tmp_path):
    tokenizer = tmp_path / "tokenizer"
    make_tiny_tokenizer().save_pretrained(tokenizer)
    source = write_jsonl(tmp_path / "p.jsonl", [{"q": "x" * size} for size in (1, 10, 400)])
    out = tmp_path / "out.jsonl"
    prompt = prompts.named("verl-boxed@1")
    # One token a byte, and one for each of <system>, <user> and <assistant>.
    whole = len(prompt.system) + 3
    options = ("--fields", "prompt=q", "--prompt", prompt.name, "--tokenizer", tokenizer)
    account = run(source, out, *options, "--max-prompt-tokens", whole + 10)
    assert account["dropped"]["too_long"] == 1 and account["prompt"] == prompt.name
    written = lines(out)
    assert sorted(len(row["messages"][1]["content"]) for row in written) == [1, 10]
    assert all(row["messages"][0] == {"role": "system", "content": prompt.system} for row in written)
    assert [[m.model_dump() for m in task.messages] for task in load(out)] == [row["messages"] for row in written]
    bare = run(source, tmp_path / "bare.jsonl", "--fields", "prompt=q", "--tokenizer", tokenizer)
    assert bare["dropped"]["too_long"] == 0
    bare_ids = [row["id"] for row in lines(tmp_path / "bare.jsonl") if len(row["prompt"]) < 99]
    assert [row["id"] for row in written] == bare_ids
    short = run(source, out, "--fields", "prompt=q", "--tokenizer", tokenizer, "--max-prompt-tokens", 11)
    assert short["dropped"]["too_long"] == 2


# ---- the known data sets ---------------------------------------------------------------------------------------


@given(st.recursive(st.text("ab\\ ", max_size=4), lambda inner: st.lists(inner, max_size=3).map("{%s}".__mod__)))
def test_the_last_box_is_found_however_deep(inside):
    inside = str(inside).replace("[", "").replace("]", "").replace("'", "")
    assert known.last_boxed(f"\\boxed{{1}} so \\boxed{{{inside}}} and {{}}") == inside.strip()
    assert known.last_boxed(f"\\boxed{{{inside}") is None
    assert known.last_boxed("none") is None


def test_answers_of_math_and_gsm8k(run, tmp_path):
    source = write_jsonl(tmp_path / "g.jsonl", [{"question": "q", "answer": "so\n#### 1,234"}])
    account = run("gsm8k", tmp_path / "g-out.jsonl", "--file", source, "--no-verify")
    assert lines(tmp_path / "g-out.jsonl")[0]["answer"] == "1,234" and "verified" not in account
    given_answer = write_jsonl(tmp_path / "m.jsonl", [{"problem": "p", "answer": "\\frac12", "level": "Level 5"}])
    run("math", tmp_path / "m-out.jsonl", "--file", given_answer, "--no-verify")
    (row,) = lines(tmp_path / "m-out.jsonl")
    assert (row["prompt"], row["answer"], row["source"]) == ("p", "\\frac12", "math") and len(row["id"]) == 16


def test_answers_that_do_not_verify_are_told(run, tmp_path):
    answers = ["\\frac{1}{2}", "05\\!:\\!00", "1,234", "(1, 2)"]
    source = write_jsonl(tmp_path / "m.jsonl", [{"problem": f"p{n}", "answer": a} for n, a in enumerate(answers)])
    told = run("math", tmp_path / "out.jsonl", "--file", source, "--workers", 1)["verified"]
    assert (told["reward"], told["answers"], told["not_verified"]) == ("math_verify", 4, 1)
    assert told["which"][0]["answer"] == answers[1] and told["which"][0]["outcome"] == "unparsable"


def test_code_contests_keep_every_test(run, tmp_path):
    other = {**CONTEST, "description": "Another.", "cf_rating": 2400}
    untested = {**CONTEST, "description": "Untested.", **dict.fromkeys(("public_tests", "private_tests"), NO_TESTS)}
    untested["generated_tests"] = NO_TESTS
    unrated = {**CONTEST, "description": "Unrated.", "cf_rating": 0, "time_limit": None, "memory_limit_bytes": 0}
    blank = {**CONTEST, "description": " "}
    source = tmp_path / "contests.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([CONTEST, other, untested, unrated, blank]), source)
    out = tmp_path / "out.jsonl"
    account = run("code_contests", out, "--file", source)
    assert account["dropped"] == {"no_description": 1, "no_tests": 1} and "verified" not in account
    by_prompt = {task.messages[0].content: task for task in load(out)}
    tests = [(test.input, test.output) for test in by_prompt[CONTEST["description"]].reference.tests]
    assert tests == [("1\n", "2\n"), ("2\n", "4\n"), ("3\n", "6\n"), ("-5\n", "-10\n")]
    further = by_prompt[CONTEST["description"]].reference.model_extra
    assert further == {"name": "1_A. Doubles", "time_limit_seconds": 1.5, "memory_limit_mb": 256, "rating": 800}
    assert by_prompt["Unrated."].reference.model_extra == {"name": "1_A. Doubles"}
    options = ("--file", source, "--rating", "700:1000", "--max-tests", 2)
    rated = run("code_contests", out, *options, "--prompt", "code-contests@1")
    assert rated["dropped"]["rating"] == 2 and rated["rows"]["out"] == 1
    (row,) = lines(out)
    assert len(row["tests"]) == 2
    assert row["messages"][1]["content"] == prompts.named("code-contests@1").user(CONTEST["description"], 0)


def test_cruxeval_rows_keep_what_the_reward_reads(run, tmp_path):
    code = "def f(x):\n    return x + 1  # {input}"
    row = {"code": code, "input": "3", "output": "4", "id": "sample_0"}
    source = write_jsonl(tmp_path / "c.jsonl", [row])
    account = run("cruxeval", tmp_path / "out.jsonl", "--file", source, "--workers", 1)
    assert account["verified"] == {"reward": "code_output", "answers": 1, "not_verified": 0, "which": []}
    (task,) = load(tmp_path / "out.jsonl")
    assert task.task_id == "sample_0" and task.messages[0].content.endswith(f"{row['code']}\n\nassert f(3) == ??")
    assert (task.reference.answer, task.reference.model_extra) == ("4", {"code": row["code"], "input": "3"})


# ---- filters ---------------------------------------------------------------------------------------------------


def slow_common(first, second) -> int:
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, a in enumerate(first, 1):
        for j, b in enumerate(second, 1):
            table[i][j] = table[i - 1][j - 1] + 1 if a == b else max(table[i - 1][j], table[i][j - 1])
    return table[-1][-1]


@given(*[st.lists(st.sampled_from("abcd"), max_size=40).map(tuple)] * 2)
def test_the_longest_common_subsequence(first, second):
    assert contamination.common(first, second) == slow_common(first, second)


def test_what_contaminates():
    words = [f"w{n}" for n in range(40)]
    seen = contamination.EvaluationTexts([" ".join(words), "Is 7 prime?", ""])
    assert seen.contaminating("is 7 PRIME") == 1 and seen.contaminating("is 8 prime") is None
    assert seen.contaminating("") is None and seen.contaminating("?!") is None
    # 13 words in a row, and at least 0.6 of the shorter text.
    assert seen.contaminating(" ".join(words[5:18])) == 0
    assert seen.contaminating(" ".join(words[5:17])) is None
    assert seen.contaminating(" ".join([*words[5:18], *"abcdefgh"])) == 0  # 13 of 21
    assert seen.contaminating(" ".join([*words[5:18], *"abcdefghi"])) is None  # 13 of 22
    assert seen.contaminating(" ".join([*words[:13], "x", *words[14:20], "y", *words[30:]])) == 0


def test_evaluation_texts_are_found_in_files_of_several_shapes(tmp_path):
    from services.preparation.prepare import evaluation_texts

    for name in ("problem", "question", "prompt"):
        path = write_jsonl(tmp_path / f"{name}.jsonl", [{"other": 1, name: "text"}])
        assert list(evaluation_texts(path)) == ["text"]
    with pytest.raises(DataError, match="none of its columns is one of problem, question"):
        list(evaluation_texts(write_jsonl(tmp_path / "x.jsonl", [{"x": 1}])))


def test_tasks_are_kept_by_how_often_they_were_solved(run, tmp_path):
    source = write_jsonl(tmp_path / "p.jsonl", [{"key": f"t{n}", "q": f"question {n}"} for n in range(5)])
    first = write_jsonl(tmp_path / "step-1.jsonl", [{"task_id": f"t{n}", "value.math_verify": n / 4} for n in range(3)])
    again = [{"task_id": "t0", "value.math_verify": 1.0}, {"task_id": "t3", "value.math_verify": None}]
    second = write_jsonl(tmp_path / "step-2.jsonl", again)
    field = ("--pass-rate-field", "value.math_verify")
    rates = ("--pass-rates", first, "--pass-rates", second, *field, "--keep", "0.25:0.5")
    account = run(source, tmp_path / "out.jsonl", "--fields", "prompt=q,id=key", *rates)
    # t0: (0 + 1) / 2, t1: 0.25, t2: 0.5; of t3 and t4 nothing is known.
    assert sorted(row["id"] for row in lines(tmp_path / "out.jsonl")) == ["t0", "t1", "t2"]
    assert account["dropped"] == {"pass_rate": 0, "pass_rate_unknown": 2}
    easier = run(source, tmp_path / "out.jsonl", "--fields", "prompt=q,id=key", *rates[:-1], "0.3:1")
    assert easier["dropped"] == {"pass_rate": 1, "pass_rate_unknown": 2}
    samples = write_jsonl(tmp_path / "s.jsonl", [{"id": "a", "correct": c} for c in (True, False, True, True)])
    assert pass_rates.read([samples], "correct") == {"a": 0.75}
    for row, says in [({"id": "a", "r": 2}, "from 0 to 1 .got 2"), ({"r": 1}, "neither a field 'id' nor 'task_id'")]:
        with pytest.raises(DataError, match=says):
            pass_rates.read([write_jsonl(tmp_path / "bad.jsonl", [row])], "r")


def test_nothing_left_is_refused_with_the_reasons(tmp_path):
    source = write_jsonl(tmp_path / "m.jsonl", [{"problem": "p", "solution": "none"}] * 2)
    settings = Data(path=str(source), fields=Fields(prompt="problem", answer="answer"))
    with pytest.raises(DataError, match="holds no rows"):
        prepare(settings, known.KNOWN["math"], Filters(), 0, None)
    good = write_jsonl(tmp_path / "g.jsonl", MATH)
    with pytest.raises(DataError, match="no row is left of 20: contaminated 20"):
        prepare(
            settings.model_copy(update={"path": str(good)}), known.KNOWN["math"], Filters(decontaminate=[good]), 0, None
        )


def test_7500_rows_take_seconds(run, tmp_path):
    import time

    many = [{"problem": f"{MATH[n % 20]['problem']} {n} " + "and so on " * 20, "answer": str(n)} for n in range(7500)]
    source = write_jsonl(tmp_path / "m.jsonl", many)
    seen = write_jsonl(tmp_path / "seen.jsonl", [{"problem": f"unlike {n} " + "but so on " * 20} for n in range(500)])
    started = time.process_time()
    account = run("math", tmp_path / "out.jsonl", "--file", source, "--decontaminate", seen, "--no-verify")
    assert account["rows"]["out"] == 7500 and time.process_time() - started < 30


def test_the_overrides_that_a_recipe_needs_are_told(monkeypatch, capsys, tmp_path):
    """Pasted behind the recipe of the data set's own columns, it reads the file."""
    gsm8k = Path(__file__).parent.parent / "recipes" / "gsm8k.yaml"
    source = write_jsonl(tmp_path / "m.jsonl", MATH)
    for name, options in (("bare", ()), ("with prompt", ("--prompt", "verl-1.5b@1"))):
        out = tmp_path / f"{name}.jsonl"
        code, told, _ = rlif(
            monkeypatch, capsys, "data", "prepare", "math", out, "--file", source, "--no-verify", *options
        )
        line = next(line for line in told.splitlines() if line.startswith("  in a recipe: "))
        overrides = shlex.split(line.removeprefix("  in a recipe: "))
        assert code == 0 and overrides[0] == f"data.path={out}"
        chosen = recipe.load(gsm8k, overrides)
        tasks = data.load(chosen, make_tiny_tokenizer(), chosen.data.model_copy(update={"max_prompt_tokens": 4096}))
        assert len(tasks.tasks) == 20 and tasks.tasks[0].messages[0].role == "system"


# ---- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["math", "o.parquet", "--file", "M"], "o.parquet: the file to write ends in .jsonl"),
        (["math", "o.jsonl", "--file", "absent.jsonl"], "rlif: --file absent.jsonl: there is no such file"),
        (["math", "o.jsonl", "--file", "M", "--fields", "prompt=q"], "--fields: the columns of 'math' are known"),
        (["M", "o.jsonl", "--file", "M"], "--file M: is for a data set known by name (math, gsm8k,"),
        (["M", "o.jsonl", "--fields", "prompt"], "--fields prompt: write prompt=COLUMN"),
        (
            ["M", "o.jsonl", "--fields", "promt=q"],
            "there is no field 'promt'; choose from prompt, messages, answer, tests, id, source,",
        ),
        (["M", "o.jsonl", "--fields", "answer=q"], "exactly one of `prompt` and `messages`"),
        (["M", "o.jsonl", "--fields", "prompt=gone"], "no field 'gone'; it has 'problem', 'solution'"),
        (["M", "o.jsonl"], "rlif: --fields: say which column is what"),
        (["gsm8k", "o.jsonl", "--file", "M"], "no field 'question'"),
        (["C", "o.jsonl", "--prompt", "verl-boxed@1"], "is put around a text, and the rows of C.jsonl have whole"),
        (["math", "o.jsonl", "--file", "M", "--prompt", "nice"], "--prompt: there is no prompt 'nice'"),
        (["math", "o.jsonl", "--file", "M", "--keep", "0:1"], "--pass-rates and --keep belong together"),
        (["math", "o.jsonl", "--file", "M", "--rating", "1:2"], "--rating 1:2: only the problems of code_contests"),
        (["math", "o.jsonl", "--file", "M", "--pass-rates", "M", "--keep", "1:0"], "the lower end comes first"),
        (["math", "o.jsonl", "--file", "M", "--pass-rates", "M", "--keep", "x"], "--keep x: write LOW:HIGH"),
        (
            ["math", "o.jsonl", "--file", "M", "--decontaminate", "gone"],
            "rlif: --decontaminate gone: a file must end in",
        ),
        (
            ["math", "o.jsonl", "--file", "M", "--decontaminate", "g.jsonl"],
            "rlif: --decontaminate g.jsonl: there is no",
        ),
        (["math", "o.jsonl", "--file", "M", "--pass-rates", "g.jsonl", "--keep", "0:1"], "rlif: --pass-rates g.jsonl:"),
        (["gone.jsonl", "o.jsonl"], "rlif: there is no file 'gone.jsonl'"),
        (["no/such/folder", "o.jsonl"], "rlif: there is no file or folder 'no/such/folder'"),
        (["math", "o.jsonl", "--file", "M", "--max-tests", "3"], "rlif: --max-tests 3: the rows of 'M.jsonl' have no"),
        (["C", "o.jsonl", "--max-tests", "3"], "rlif: --max-tests 3: the rows of 'C.jsonl' have no tests"),
        (["math", "o.jsonl", "--file", "M", "--tokenizer", "./gone"], "rlif: --tokenizer: no tokenizer for './gone'"),
        (["math", "o.jsonl", "--file", "M", "--max-prompt-tokens", "9"], "--max-prompt-tokens 9: name the model"),
    ],
)
def test_refusals_are_one_line(monkeypatch, capsys, tmp_path, arguments, says):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "M.jsonl", MATH)
    write_jsonl(tmp_path / "C.jsonl", [{"messages": [{"role": "system", "content": "s"}]}])
    arguments = [f"{argument}.jsonl" if argument in ("M", "C") else argument for argument in arguments]
    code, _, err = rlif(monkeypatch, capsys, "data", "prepare", *arguments)
    last = err.strip().splitlines()[-1]
    assert code == 2 and last.startswith("rlif: ") and says.replace("--file M:", "--file M.jsonl:") in last
    assert not (tmp_path / "o.jsonl").exists()


def test_rows_have_their_place_in_every_format(tmp_path):
    path = write_jsonl(tmp_path / "r.jsonl", [{"a": 1}, {"a": 2}])
    assert list(rows.table(str(path)).read(["a"]))[1] == (f"{path} line 2", {"a": 2})


# ---- the hub ---------------------------------------------------------------------------------------------------

COMMIT = "c0ffee" * 6 + "c0ff"


def hub_with(content: bytes) -> FastAPI:
    """A Hugging Face hub that has one data set, own/sums, of one file, at one commit."""
    app, etag = FastAPI(), hashlib.sha256(content).hexdigest()
    entry = {"type": "file", "path": "train.jsonl", "oid": etag[:40], "size": len(content)}

    @app.get("/api/datasets/own/sums")
    @app.get("/api/datasets/own/sums/revision/{revision}")
    def info(revision: str = "main"):
        if revision not in ("main", COMMIT):
            return Response("{}", 404, {"X-Error-Code": "RevisionNotFound"})
        return {"id": "own/sums", "sha": COMMIT, "siblings": [{"rfilename": "train.jsonl"}]}

    @app.get("/api/datasets/own/sums/tree/{revision}")
    @app.get("/api/datasets/own/sums/tree/{revision}/{path:path}")
    def tree(revision: str, path: str = ""):
        return [entry] if (revision, path) == (COMMIT, "") else Response("{}", 404, {"X-Error-Code": "EntryNotFound"})

    @app.post("/api/datasets/own/sums/paths-info/{revision}")
    async def paths_info(revision: str, request: Request):
        asked = (await request.body()).decode()
        return [entry] if revision == COMMIT and "train.jsonl" in asked else []

    @app.api_route("/datasets/own/sums/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])
    def resolve(revision: str, path: str):
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'}
        if (revision, path) != (COMMIT, "train.jsonl"):
            return Response("", 404, {"X-Error-Code": "EntryNotFound", **headers})
        return Response(content, headers=headers)

    return app


def test_a_name_on_the_hub_is_read_at_the_commit_that_the_manifest_names(tmp_path):
    content = "".join(json.dumps({"q": f"{n}+{n}?", "a": str(2 * n)}) + "\n" for n in range(5)).encode()
    arguments = ["data", "prepare", "own/sums", str(tmp_path / "out.jsonl"), "--fields", "prompt=q,answer=a"]
    command = [sys.executable, "-m", "services.cli.main", *arguments, "--no-verify", "--json"]
    with served(hub_with(content)) as url:
        mine = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
        environment = {**os.environ, **mine, "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
        assert done.returncode == 0, done.stderr
    account = json.loads(done.stdout)
    assert account["source"] == {"path": "own/sums", "config": None, "split": "train", "revision": COMMIT}
    assert sorted(row["answer"] for row in lines(tmp_path / "out.jsonl")) == ["0", "2", "4", "6", "8"]
