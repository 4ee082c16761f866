"""`code_tests`: does the program in the completion pass the task's tests?

The program is the last closed fenced code block that is marked as the language (```` ```python ````), or else the last
one that is not marked at all; a block cut off by the end of the completion is none. It runs in the sandbox once for
every test of `reference.tests` ({"input", "output"}, the first `max_cases` of them): the input comes on stdin, and a
test is passed when the program ends with exit code 0 and its whole output agrees with the expected one, token by token
(`reward_server.sandbox.compare`).

With `reference.fn_name` (Python; as APPS, TACO and LiveCodeBench have it) a test is a call instead: the input is one
JSON argument a line, for that function, or method of `class Solution`, and what it returns is compared as JSON. What
the program prints itself does not count then.

The value is the share of tests passed, or, with `reward: all`, 1 only when every one is. What the program itself does
wrong fails that one test and no other: a crash, too much time, memory or output (more than 64 KiB and four times the
expected output). (After three tests over their time the others count as over it, too, and are not run.) A program that
does not compile passes none.

Outcomes: `correct` (all passed), `wrong`, `no_answer` (no code block; value 0). What is not the program's fault gives
no value: `timeout` when the request's deadline passes before the tests are through, or the machine is too busy to run
the program, `error` when the sandbox fails.
"""

import asyncio
import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from reward_server.references import Fields, read
from reward_server.reward import Context, Params, Reward
from reward_server.sandbox.compare import same_output
from reward_server.sandbox.provider import FAULTS, Case, CaseResult, Language, Limits, Program
from services.api import RewardGroup
from services.contract import Outcome, Score
from services.http import Problem

FENCE = re.compile(r"[ \t]{0,3}(`{3,}|~{3,})[ \t]*([^\s`]*)")
MARKS: dict[Language, frozenset[str]] = {
    "python": frozenset({"python", "python3", "py", "py3"}),
    "cpp": frozenset({"cpp", "c++", "cc", "cxx", "c++17", "c++20"}),
}


BEFORE = """import sys as _sys
_out, _sys.stdout = _sys.stdout, _sys.stderr
from typing import *
"""
"""Programs that complete a starter code take the names of its annotations for granted."""
AFTER = """
import json as _json
_function = getattr(Solution(), {name!r}) if "Solution" in globals() else globals()[{name!r}]
_returned = _function(*(_json.loads(_line) for _line in _sys.stdin.read().splitlines() if _line.strip()))
print(_json.dumps(_returned), file=_out)
"""
SPARE_BYTES, SPARE_FACTOR = 2**16, 4
"""How much longer than the expected output one with other white space or more digits may be."""
EXCERPT = 200


class Function(Fields):
    fn_name: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}$")] | None = None


class CodeTestsParams(Params):
    language: Language = "python"
    reward: Literal["share", "all"] = Field("share", description="the share of tests passed, or all of them or nothing")
    tolerance: float | None = Field(None, ge=0, le=1, description="numbers may differ by it, times max(1, |expected|)")
    max_cases: int = Field(64, ge=1, le=1024, description="only the first tests of a task are run")
    seconds: float = Field(4.0, gt=0, le=120, description="CPU time of one test")
    wall_seconds: float = Field(10.0, gt=0, le=300, description="time of one test, waiting included")
    memory_mb: int = Field(512, ge=32, le=16384)

    @property
    def limits(self) -> Limits:
        return Limits(seconds=self.seconds, wall_seconds=self.wall_seconds, memory_mb=self.memory_mb)


def extract(text: str, language: Language) -> str | None:
    """The program that a completion offers; none when it has no closed code block for it."""
    marked = unmarked = None
    for mark, body in _blocks(text):
        if mark in MARKS[language]:
            marked = body
        elif not mark:
            unmarked = body
    return marked if marked is not None else unmarked


def _blocks(text: str) -> Iterator[tuple[str, str]]:
    """The mark and content of every closed code block. Line by line, so that no text takes more than linear time."""
    fence, mark = "", ""
    body: list[str] = []
    for line in text.split("\n"):
        found = FENCE.match(line)
        if not fence:
            if found:
                fence, mark, body = found[1], found[2].lower(), []
        elif found and line.strip() == found[1] and found[1].startswith(fence):
            yield mark, "\n".join([*body, ""])
            fence = ""
        else:
            body.append(line)


def judge(results: list[CaseResult], right: set[int], reward: Literal["share", "all"]) -> Score:
    """The score of one program from what became of each test, and the places of those whose output was right."""
    seconds = sum(result.seconds for result in results)
    for result in results:
        if result.status in FAULTS:
            outcome = Outcome.timeout if result.status == "deadline" else Outcome.error
            return Score.failed(outcome, result.detail, seconds)
    failures = []
    for place, result in enumerate(results):
        if result.status != "ok":
            failures.append(f"test {place}: {result.detail or _last_line(result) or result.status}")
        elif place not in right:
            failures.append(f"test {place}: wrong output")
    passed = len(results) - len(failures)
    detail = f"{passed} of {len(results)} passed" + (f"; {failures[0]}" if failures else "")
    value = passed / len(results) if reward == "share" else float(not failures)
    return Score.of(value, Outcome.wrong if failures else Outcome.correct, detail, seconds)


def _last_line(result: CaseResult) -> str:
    said = result.stderr.strip().splitlines()
    return said[-1] if said else f"exit code {result.exit_code}"


def _most_bytes(wanted: str) -> int:
    return SPARE_BYTES + SPARE_FACTOR * len(wanted.encode(errors="replace"))


async def score(group: RewardGroup, params: CodeTestsParams, context: Context) -> list[Score]:
    reference = group.task.reference
    tests = (reference.tests or [] if reference else [])[: params.max_cases]
    function = read(Function, group, context.field, "code_tests").fn_name
    if function and params.language != "python":
        field = f"{context.field}.task.reference.fn_name"
        raise Problem(422, "A reference is not usable", "code_tests calls functions of Python programs only", field)
    cases = [Case(stdin=test.input, stdout_bytes=_most_bytes(test.output)) for test in tests]

    async def one(text: str) -> Score:
        source = await asyncio.to_thread(extract, text, params.language)
        if source is None:
            return Score.of(0.0, Outcome.no_answer)
        if function:
            source = BEFORE + source + AFTER.format(name=function)
        right: set[int] = set()

        async def judge_output(place: int, result: CaseResult) -> CaseResult:
            wanted = tests[place].output
            if result.status == "ok" and await asyncio.to_thread(same_output, result.stdout, wanted, params.tolerance):
                right.add(place)
            return result.model_copy(update={"stdout": result.stdout[:EXCERPT]})

        program = Program(language=params.language, source=source)
        results = await context.sandbox.run(program, cases, params.limits, context.deadline, judge_output)
        return judge(results, right, params.reward)

    return list(await asyncio.gather(*(one(completion.text) for completion in group.completions)))


REWARD = Reward(
    name="code_tests",
    description="The share of the task's tests that the program in the completion passes (or: whether it passes all).",
    needs=("sandbox", "reference.tests"),
    range=(0.0, 1.0),
    params=CodeTestsParams,
    score=score,
)
