"""The rewards `code_tests` and `code_output`, directly and through the reward server over real HTTP."""

import json
import time
from pathlib import Path

import httpx
import pytest
from hostile_programs import PROGRAMS
from hypothesis import given
from hypothesis import strategies as st
from sandboxes import started
from served import served

from reward_server.app import Settings, create
from reward_server.reward import Context
from reward_server.rewards import code_output, code_tests
from reward_server.sandbox import app as sandbox_app
from reward_server.sandbox.bubblewrap import Bubblewrap
from reward_server.sandbox.provider import CaseResult
from reward_server.sandbox.sandboxfusion import SandboxFusion
from reward_server.workers import Turn, WorkerPool
from services.access import HttpSettings
from services.api import CompletionText, RewardGroup
from services.contract import Reference, Task, TestCase
from services.http import Problem
from services.startup import StartupError

pytestmark = pytest.mark.alone

CRUXEVAL = Path(__file__).parents[2] / "shared" / "data" / "cruxeval.jsonl"
DOUBLE = "```python\nprint(2 * int(input()))\n```"
TESTS = [TestCase(input=str(number), output=f"{2 * number}\n") for number in (1, 21, -5, 0)]


def group_of(*texts, answer=None, tests=None, **extra) -> RewardGroup:
    task = Task(task_id="t", prompt="p", reference=Reference(answer=answer, tests=tests, **extra))
    return RewardGroup(group_id="g", task=task, completions=[CompletionText(text=text) for text in texts])


@pytest.fixture
async def sandbox():
    sandbox = await started(Bubblewrap(concurrency=2))
    yield sandbox
    await sandbox.stop()


@pytest.fixture
async def workers():
    pool = WorkerPool(1)
    pool.start()
    yield pool
    await pool.stop()


async def score(module, group, sandbox=None, workers=None, deadline=60.0, **params):
    context = Context(workers, time.monotonic() + deadline, Turn(), sandbox=sandbox)
    return await module.REWARD.score(group, module.REWARD.params(**params), context)


def told(scores):
    return [(score.value, str(score.outcome)) for score in scores]


# ---- the program in a completion -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("```python\na\n```", "a\n"),
        ("first\n```python\na\n```\nthen\n```py\nb\n\nc\n```\nend", "b\n\nc\n"),
        ("```python\na\n```\nIt prints:\n```\n42\n```", "a\n"),
        ("```\na\n```\n```\nb\n```", "b\n"),
        ("```Python3\na\n```\n```cpp\nb\n```", "a\n"),
        ("~~~python\na\n```\nb\n~~~", "a\n```\nb\n"),
        ("````python\n```\na\n```\n````", "```\na\n```\n"),
        ("  ```python title=x\r\na\r\n  ```", "a\r\n"),
        ("```python\n```", ""),
        ("```python\na", None),
        ("```python\na\n```\n```python\nb", "a\n"),
        ("```cpp\na\n```", None),
        ("print(1)", None),
        ("", None),
    ],
)
def test_the_last_closed_block_of_the_language_is_the_program(text, program):
    assert code_tests.extract(text, "python") == program


@given(st.lists(st.sampled_from(["```", "```python", "~~~", "x", "", " ```", "````"]), max_size=12))
def test_extraction_never_fails(lines):
    for language in ("python", "cpp"):
        program = code_tests.extract("\n".join(lines), language)
        assert program is None or all(line in lines for line in program.split("\n")[:-1])


def test_extraction_takes_linear_time():
    text = "```a\n" * 200_000
    started_at = time.process_time()
    assert code_tests.extract(text, "python") is None
    assert time.process_time() - started_at < 20  # a quadratic way takes hours


# ---- code_tests ------------------------------------------------------------------------------------------------


async def test_the_share_of_tests_passed(sandbox):
    texts = [
        DOUBLE,
        "```python\nprint(abs(2 * int(input())))\n```",
        "```python\nprint(7)\n```",
        "```python\nprint(2 * int(input())\n```",
        "no code",
        "```python\nx = int(input())\nwhile x == 21: pass\nprint(2 * x)\n```",
        "```python\nimport os\nx = int(input())\nprint(2 * x, flush=True)\nos._exit(x == 1)\n```",
    ]
    found = await score(code_tests, group_of(*texts, tests=TESTS), sandbox, seconds=1)
    assert told(found) == [
        (1.0, "correct"),
        (0.75, "wrong"),
        (0.0, "wrong"),
        (0.0, "wrong"),
        (0.0, "no_answer"),
        (0.75, "wrong"),
        (0.75, "wrong"),
    ]
    assert found[0].detail == "4 of 4 passed" and found[0].seconds > 0
    assert found[1].detail == "3 of 4 passed; test 2: wrong output"
    assert found[5].detail == "3 of 4 passed; test 1: more than 1 s of CPU time"
    assert "SyntaxError" in found[3].detail and "exit code 1" in found[6].detail
    every = await score(code_tests, group_of(*texts[:2], tests=TESTS), sandbox, reward="all")
    assert told(every) == [(1.0, "correct"), (0.0, "wrong")]
    first = await score(code_tests, group_of(texts[1], tests=TESTS), sandbox, max_cases=2)
    assert told(first) == [(1.0, "correct")] and first[0].detail == "2 of 2 passed"


async def test_tests_that_are_calls_of_a_function(sandbox):
    body = "print('noise'); return [a + b for a in xs]"
    texts = [
        f"```python\ndef shift(xs, b): {body}\n```",
        f"```python\nclass Solution:\n  def shift(self, xs: List[int], b: int) -> List[int]:\n    {body}\n```",
        "```python\ndef shift(xs, b): return tuple(xs)\n```",
        "```python\ndef shift(xs, b): print('[1, 2]')\n```",
        "```python\ndef other(xs, b): return xs\n```",
    ]
    tests = [TestCase(input="[1, 2]\n0", output="[1, 2]"), TestCase(input="[]\n5\n", output="[]")]
    tests.append(TestCase(input="[1]\n2", output="[3]"))
    found = await score(code_tests, group_of(*texts, tests=tests, fn_name="shift"), sandbox)
    assert told(found)[:2] == [(1.0, "correct")] * 2
    assert found[2].detail == "2 of 3 passed; test 2: wrong output"
    assert told(found)[3:] == [(0.0, "wrong")] * 2 and "KeyError: 'shift'" in found[4].detail
    for name, language in (("os.system", "python"), ("shift", "cpp")):
        with pytest.raises(Problem) as refused:
            await score(code_tests, group_of(texts[0], tests=tests, fn_name=name), sandbox, language=language)
        assert refused.value.field == "groups[0].task.reference.fn_name"


async def test_cpp_programs_and_tolerance(sandbox):
    half = '#include <cstdio>\nint main() { double x; scanf("%lf", &x); printf("%.3f", x / 3); }'
    texts = [f"```cpp\n{half}\n```", "```cpp\nint main() { return y; }\n```", "```python\nprint(1)\n```"]
    tests = [TestCase(input="1", output="0.33333333"), TestCase(input="3", output="1")]
    close = await score(code_tests, group_of(*texts, tests=tests), sandbox, language="cpp", tolerance=0.001)
    assert told(close) == [(1.0, "correct"), (0.0, "wrong"), (0.0, "no_answer")]
    assert "0 of 2 passed; test 0: compile error" in close[1].detail
    exact = await score(code_tests, group_of(texts[0], tests=tests), sandbox, language="cpp")
    assert told(exact) == [(0.0, "wrong")]


async def test_the_whole_output_counts(sandbox):
    texts = [
        f"```python\nprint({said!r})\n```" for said in ("1 2\n3", "1\n2\n3  \n\n", "1 2", "1 2 3 4", "1 2 3\n4", "")
    ]
    found = await score(code_tests, group_of(*texts, tests=[TestCase(input="", output="1 2 3\n")]), sandbox)
    assert [item.value for item in found] == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]


async def test_what_is_no_fault_of_the_program_is_no_zero(sandbox):
    sleeper = "```python\nimport time\ntime.sleep(100)\n```"
    late = await score(code_tests, group_of(sleeper, DOUBLE, tests=TESTS), sandbox, deadline=4, wall_seconds=100)
    assert told(late) == [(None, "timeout"), (1.0, "correct")]
    dead = SandboxFusion("http://127.0.0.1:9")
    await dead.start()
    started_at = time.monotonic()
    found = await score(code_tests, group_of(DOUBLE, "no code", tests=TESTS), dead, deadline=2)
    assert told(found)[1] == (0.0, "no_answer") and found[0].value is None and time.monotonic() - started_at < 30
    await dead.stop()


async def test_outputs_are_compared_as_they_arrive_and_not_kept(monkeypatch):
    """32 programs with 16 tests that print almost what they may: what is in memory at once is a few outputs."""
    alive = most = 0

    class Printed(str):
        def __new__(cls, text):
            nonlocal alive, most
            alive, most = alive + 1, max(most, alive + 1)
            return super().__new__(cls, text)

        def __del__(self):
            nonlocal alive
            alive -= 1

    async def printing(_self, _command, _files, case, limits):
        return CaseResult.model_construct(status="ok", stdout=Printed("x" * case.most_stdout(limits)), seconds=0.0)

    monkeypatch.setattr(Bubblewrap, "_case", printing)
    texts = [f"```python\n{number}\n```" for number in range(32)]
    tests = [TestCase(input="", output="x")] * 16
    found = await score(code_tests, group_of(*texts, tests=tests), Bubblewrap(frozenset({"python"}), concurrency=2))
    assert told(found) == [(0.0, "wrong")] * 32 and most <= 2 * 4 + 8


async def test_an_output_that_cannot_be_right_any_more_ends_its_test(sandbox):
    wanted = "7 " * 50_000
    texts = [f"```python\nprint({said})\n```" for said in ("'7\\n\\n ' * 50_000", "'7 ' * 10**6", "' ' * 70_000 + '7'")]
    long = await score(code_tests, group_of(*texts, tests=[TestCase(input="", output=wanted)]), sandbox)
    assert told(long) == [(1.0, "correct"), (0.0, "wrong"), (0.0, "wrong")]
    assert long[1].detail == f"0 of 1 passed; test 0: more than {2**16 + 4 * len(wanted)} bytes to stdout"
    (short,) = await score(code_tests, group_of(texts[2], tests=[TestCase(input="", output="7")]), sandbox)
    assert told([short]) == [(0.0, "wrong")] and "more than 65540 bytes" in short.detail
    noisy = "```python\nimport sys\nsys.stderr.write('x' * 200_000)\nprint(7)\n```"
    found = await score(code_tests, group_of(noisy, tests=[TestCase(input="", output="7")]), sandbox)
    assert told(found) == [(1.0, "correct")]


@pytest.mark.parametrize("status", ["deadline", "error"])
def test_one_case_that_says_nothing_makes_the_score_missing(status):
    results = [CaseResult(status="ok", stdout="2"), CaseResult(status=status, detail="why")]
    found = code_tests.judge(results, {0}, "share")
    assert found.value is None and found.detail == "why"
    assert str(found.outcome) == ("timeout" if status == "deadline" else "error")


# ---- code_output -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer", "outcome"),
    [
        ("[ANSWER]\n[1,2]\n[/ANSWER]", "[1, 2]", "correct"),
        ("[ANSWER]assert f('x') == \"a\"[/ANSWER]", "'a'", "correct"),
        ("[ANSWER] 'a' ", "'a'", "correct"),
        ("[ANSWER]1[/ANSWER] no, [ANSWER]2[/ANSWER]", "2", "correct"),
        ("[ANSWER]2[/ANSWER] no, [ANSWER]1[/ANSWER]", "2", "wrong"),
        ("so\n```python\nassert f([1, 2]) == {'a': 1}\n```", "{'a': 1}", "correct"),
        ("assert f(1 == 1) == True", "True", "correct"),
        ("assert f('==') == '=='", "'=='", "correct"),
        ("thinking\n\n'a'\n", "'a'", "correct"),
        ("`'a'`", "'a'", "correct"),
        ("1.0", "1", "correct"),
        ("-1", "-1", "correct"),
        ("{2, 1}", "{1, 2}", "correct"),
        ("set()", "[]", "wrong"),
        ("(1, 2)", "[1, 2]", "wrong"),
        ("'a'", "'A'", "wrong"),
        ("The output is 5.", "5", "no_answer"),
        ("[ANSWER]f(3)[/ANSWER]", "5", "no_answer"),
        ("[ANSWER]__import__('os').system('true')[/ANSWER]", "0", "no_answer"),
        ("[ANSWER][x for x in (1, 2)][/ANSWER]", "[1, 2]", "no_answer"),
        ("", "5", "no_answer"),
        ("5", "OrderedDict()", "unparsable"),
    ],
)
async def test_the_predicted_value(workers, text, answer, outcome):
    (found,) = await score(code_output, group_of(text, answer=answer), None, workers)
    assert str(found.outcome) == outcome, found
    assert found.value == {"correct": 1.0, "unparsable": None}.get(outcome, 0.0)


async def test_hostile_predictions_cost_their_own_score_only(workers):
    texts = ["[" * 100_000, "[ANSWER]" + "(" * 50_000 + "[/ANSWER]", "-" * 100_000 + "1", "9" * 10_000, "'a'"]
    found = await score(code_output, group_of(*texts, answer="'a'"), None, workers)
    assert told(found)[-1] == (1.0, "correct")
    assert all(item.value in (None, 0.0) for item in found[:-1])


async def test_where_the_value_is_no_literal_the_code_is_run(workers, sandbox):
    code = "from collections import OrderedDict\ndef f(n):\n    return OrderedDict((i, i * i) for i in range(n))"
    texts = [
        "[ANSWER]OrderedDict([(0, 0), (1, 1)])[/ANSWER]",
        "[ANSWER]{0: 0, 1: 1}[/ANSWER]",
        "[ANSWER]OrderedDict({0: 0})[/ANSWER]",
        "[ANSWER]f(2)[/ANSWER]",
        "[ANSWER]type('X', (), {'__eq__': lambda *_: True})()[/ANSWER]",
        "[ANSWER]list(range(10 ** 12))[/ANSWER]",
        "[ANSWER]list(range(1000000000000))[/ANSWER]",
        "[ANSWER]set([[]])[/ANSWER]",
    ]
    group = group_of(*texts, answer="OrderedDict([(0, 0), (1, 1)])", code=code, input="2")
    found = await score(code_output, group, sandbox, workers)
    assert [str(item.outcome) for item in found] == [
        "correct",
        "correct",
        "wrong",
        *["no_answer"] * 3,
        "wrong",
        "wrong",
    ]
    broken = group_of(texts[0], answer="OrderedDict()", code="def f(n): 1 / 0", input="2")
    (failed,) = await score(code_output, broken, sandbox, workers)
    assert failed.value is None and "ZeroDivisionError" in failed.detail


@pytest.mark.parametrize(
    ("said", "runs", "outcome"),
    [
        ("3 # sure", "3", "correct"),
        ("[1, # one\n 2]", "[1, 2]", "wrong"),
        ("dict(a=1, a=2)", None, "no_answer"),
        ("0x" + "f" * 5000, None, "no_answer"),
        ("'a' 'b'", "'ab'", "wrong"),
    ],
)
async def test_only_the_value_of_a_prediction_gets_into_the_program(sandbox, said, runs, outcome):
    found = code_output.check({"gold": "f(1)", "text": f"[ANSWER]{said}[/ANSWER]"})
    assert found == {"outcome": "unparsable" if runs else "no_answer", "said": runs or ""}
    if runs:
        context = Context(None, time.monotonic() + 60, Turn(), sandbox=sandbox)
        score = await code_output._run("def f(n): return n", "3", found["said"], context)
        assert str(score.outcome) == outcome and score.value == float(outcome == "correct")


@pytest.mark.skipif(not CRUXEVAL.exists(), reason="the CRUXEval rows are not here")
async def test_every_cruxeval_answer_verifies_and_no_other_does(workers):
    rows = [json.loads(line) for line in CRUXEVAL.read_text().splitlines()]
    assert len(rows) == 800
    for place, row in enumerate(rows):
        other = rows[(place + 1) % len(rows)]["output"]
        texts = [
            row["output"],
            f"[ANSWER]{row['output']}[/ANSWER]",
            f"assert f({row['input']}) == {row['output']}",
            other,
        ]
        group = group_of(*texts, answer=row["output"], code=row["code"], input=row["input"])
        found = [item.value for item in await score(code_output, group, None, workers)]
        assert found == [1.0, 1.0, 1.0, float(eval(other) == eval(row["output"]))], row["id"]


@pytest.mark.skipif(not CRUXEVAL.exists(), reason="the CRUXEval rows are not here")
async def test_cruxeval_functions_run_in_the_sandbox(sandbox):
    """As programs with tests: 40 real functions print what their data set says they return."""
    rows = [json.loads(line) for line in CRUXEVAL.read_text().splitlines()][:40]
    for row in rows:
        program = f"```python\n{row['code']}\nprint(repr(f({row['input']})))\n```"
        (found,) = await score(code_tests, group_of(program, tests=[TestCase(input="", output=row["output"])]), sandbox)
        assert found.value == 1.0, (row["id"], found)


# ---- through the reward server ---------------------------------------------------------------------------------


def body(*texts, spec="code_tests"):
    task = {"task_id": "t", "prompt": "p", "reference": {"tests": [test.model_dump() for test in TESTS[:2]]}}
    return {
        "spec": spec,
        "groups": [{"group_id": "g", "task": task, "completions": [{"text": text} for text in texts]}],
    }


async def test_without_a_sandbox_the_reward_says_so():
    with served(create(Settings(verifier_workers=1))) as url:
        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            listed = {item["name"]: item for item in (await http.get("/v1/rewards")).json()["rewards"]}
            assert not listed["code_tests"]["available"] and "--sandbox" in listed["code_tests"]["unavailable_because"]
            assert listed["code_output"]["available"]
            answer = await http.post("/v1/rewards", json=body(DOUBLE))
            assert answer.status_code == 422 and "sandbox" in answer.text


@pytest.mark.parametrize("kind", ["bubblewrap", "service"])
async def test_hostile_completions_beside_good_ones(kind):
    await (await started(Bubblewrap(frozenset({"python"})))).stop()
    names = ("fork bomb", "flood of stdout", "memory", "sleep", "daemon", "a forged report")
    hostile = [f"```python\n{item.source}\n```" for item in PROGRAMS if item.name in names]
    service = sandbox_app.create(HttpSettings(), Bubblewrap(frozenset({"python"}), concurrency=4))
    with served(service) as sandbox_url:
        choice = sandbox_url if kind == "service" else "bubblewrap"
        with served(create(Settings(verifier_workers=1, sandbox=choice))) as url:
            async with httpx.AsyncClient(base_url=url, timeout=120, headers={"X-Deadline-Seconds": "100"}) as http:
                assert (await http.get("/readyz")).json()["dependencies"]["sandbox"] == "ok"
                spec = {"rewards": [{"name": "code_tests", "params": {"seconds": 0.5, "wall_seconds": 2}}]}
                assert (await http.put("/v1/specs/code", json=spec)).is_success
                answer = (await http.post("/v1/rewards", json=body(*hostile, DOUBLE, DOUBLE, spec="code"))).json()
    found = [item["components"]["code_tests"] for item in answer["groups"][0]["scores"]]
    assert [item["value"] for item in found] == [0.0] * len(names) + [1.0, 1.0]
    assert all(item["outcome"] == "wrong" and item["detail"] for item in found[:-2])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_reward_server_whose_sandbox_cannot_be_set_up_does_not_start(monkeypatch):
    monkeypatch.setattr("reward_server.sandbox.bubblewrap.PATH", "/nowhere")
    app = create(Settings(verifier_workers=1, sandbox="bubblewrap"))
    with pytest.raises(RuntimeError, match="did not start"), served(app):
        pass
    assert isinstance(app.state.refusal, StartupError) and "the sandbox" in str(app.state.refusal)
