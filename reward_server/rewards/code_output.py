"""`code_output`: does the completion say what the given code returns? (CRUXEval's output prediction.)

1 when the value that the completion predicts equals `reference.answer`, both read as Python literals, else 0: `[1,2]`
is `[1, 2]`, `'a'` is `"a"`, `1.0` is `1`. The prediction is the first of these that the completion has, each time the
last one of its kind:

1. between `[ANSWER]` and `[/ANSWER]` (or the end, where that was the stop string);
2. a closed code block;
3. the last line that is not blank.

Of these, what follows the `==` counts where it reads `assert f(...) == value`.

Where the expected value is no literal (an OrderedDict, say), and the reference has `code` (defining `f`) and `input`,
the code itself is run in the sandbox and its result compared there. Only literals and calls of the standard containers
on literals are taken as predictions: the call itself, or an object that equals everything, is not.

Outcomes: `correct`, `wrong`, `no_answer` (value 0: nothing that reads as a value), `unparsable` (the expected value is
no literal, and there is no code to run or no sandbox), `timeout` and `error` of the check itself.
"""

import ast
import asyncio
import re
from typing import Any

from pydantic import Field

from reward_server.reward import Context, Params, Reward
from reward_server.sandbox.provider import FAULTS, Case, Limits, Program
from services.api import RewardGroup
from services.contract import Outcome, Score

CHECK = "reward_server.rewards.code_output:check"
ANSWER = re.compile(r"\[ANSWER\](.*?)(?=\[/ANSWER\]|\[ANSWER\]|\Z)", re.DOTALL)
BLOCK = re.compile(r"```[^\n`]*\n(.*?)```", re.DOTALL)
ASSERTION = re.compile(r"^\s*assert\b.*?==", re.DOTALL)
CONTAINERS = frozenset(
    {
        "set",
        "frozenset",
        "dict",
        "list",
        "tuple",
        "bytearray",
        "range",
        "float",
        "complex",
        "OrderedDict",
        "Counter",
        "deque",
    }
)
SAME, DIFFERENT = "same", "different"
LIMITS = Limits(seconds=4, wall_seconds=10, memory_mb=512)


class CodeOutputParams(Params):
    tail_characters: int = Field(16384, ge=16, le=200_000, description="only the end of a completion is read")


def predicted(text: str) -> str:
    """The text of the value that a completion predicts; empty when there is none."""
    for pattern in (ANSWER, BLOCK):
        if found := pattern.findall(text):
            return _value(found[-1])
    lines = [line for line in text.splitlines() if line.strip()]
    return _value(lines[-1]) if lines else ""


def _value(said: str) -> str:
    said = said.strip().strip("`").strip()
    if ASSERTION.match(said):
        # The call may hold a `==` of its own: of what follows each, the first that is an expression is the value.
        parts = said.split("==")
        rests = ["==".join(parts[place:]).strip() for place in range(1, len(parts))]
        return next((rest for rest in rests if _parse(rest) is not None), "")
    return said


def _parse(text: str) -> ast.expr | None:
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


async def score(group: RewardGroup, params: CodeOutputParams, context: Context) -> list[Score]:
    reference = group.task.reference
    gold = (reference.answer or "") if reference else ""
    given = (reference.model_extra or {}) if reference else {}
    code, call = given.get("code"), given.get("input")
    can_run = isinstance(code, str) and isinstance(call, str) and context.sandbox is not None

    async def one(text: str) -> Score:
        payload = {"gold": gold, "text": text[-params.tail_characters :]}
        verdict = await context.workers.check(CHECK, payload, context.deadline, context.turn)
        if verdict.status != "ok":
            return Score.failed(Outcome(verdict.status), verdict.detail, verdict.seconds)
        outcome, said = Outcome(verdict.result["outcome"]), verdict.result["said"]
        if outcome is Outcome.unparsable:
            if can_run:
                return await _run(str(code), str(call), said, context)
            return Score.failed(outcome, f"the expected value is no Python literal: {gold[:200]}", verdict.seconds)
        return Score.of(float(outcome is Outcome.correct), outcome, said[:200], verdict.seconds)

    return list(await asyncio.gather(*(one(completion.text) for completion in group.completions)))


async def _run(code: str, call: str, said: str, context: Context) -> Score:
    source = (
        f"{code}\nfrom collections import Counter, OrderedDict, deque\n"
        f"_returned = f({call})\nprint({DIFFERENT!r}, flush=True)\nprint({SAME!r} if _returned == ({said}) else '')\n"
    )
    program = Program(language="python", source=source)
    (result,) = await context.sandbox.run(program, [Case()], LIMITS, context.deadline)
    words = result.stdout.split()
    # Once the code has returned, whatever else goes wrong is the prediction's doing.
    if result.status not in FAULTS and words and words[-1] in (SAME, DIFFERENT):
        is_same = result.status == "ok" and words[-1] == SAME
        return Score.of(float(is_same), Outcome.correct if is_same else Outcome.wrong, said[:200], result.seconds)
    outcome = Outcome.timeout if result.status in ("deadline", "timeout") else Outcome.error
    detail = result.detail or (result.stderr.strip().splitlines() or [result.status])[-1]
    return Score.failed(outcome, f"the reference's code does not run: {detail}", result.seconds)


REWARD = Reward(
    name="code_output",
    description="1 when the completion predicts the value that the reference says the code returns, else 0.",
    needs=("reference.answer",),
    range=(0.0, 1.0),
    params=CodeOutputParams,
    score=score,
)


# ---- from here on: inside a worker process ---------------------------------------------------------------------


def is_plain(node: ast.AST) -> bool:
    """Whether an expression is a literal, or a call of a standard container on such."""
    if isinstance(node, ast.Call):
        named = isinstance(node.func, ast.Name) and node.func.id in CONTAINERS
        return named and all(map(is_plain, [*node.args, *(word.value for word in node.keywords)]))
    if isinstance(node, ast.Constant):
        return True
    allowed = (
        ast.List,
        ast.Tuple,
        ast.Set,
        ast.Dict,
        ast.UnaryOp,
        ast.BinOp,
        ast.USub,
        ast.UAdd,
        ast.Add,
        ast.Sub,
        ast.Load,
    )
    return isinstance(node, allowed) and all(map(is_plain, ast.iter_child_nodes(node)))


def expression(tree: ast.expr) -> str | None:
    """Python for the value alone, without what a completion wrote around it (comments, line breaks); none where it is
    no expression after all (a keyword given twice, a number too long to be written)."""
    try:
        text = ast.unparse(tree)
        compile(text, "<prediction>", "eval")
    except (SyntaxError, ValueError, RecursionError):
        return None
    return text


def check(payload: dict[str, Any]) -> dict[str, Any]:
    """{"outcome", "said"}: `unparsable` leaves it to the caller to run the code, with `said`, the prediction as an
    expression of its own."""
    said = predicted(payload["text"])
    tree = _parse(said)
    if tree is None or not is_plain(tree):
        return {"outcome": "no_answer", "said": ""}
    try:
        wanted = ast.literal_eval(payload["gold"].strip())
    except (SyntaxError, ValueError, TypeError):
        text = expression(tree)
        return {"outcome": "no_answer" if text is None else "unparsable", "said": text or ""}
    try:
        value = ast.literal_eval(said)
    except (ValueError, TypeError):
        return {"outcome": "wrong", "said": said}
    return {"outcome": "correct" if value == wanted else "wrong", "said": said}
