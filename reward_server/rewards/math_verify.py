"""`math_verify`: is the completion's last answer mathematically the reference answer?

The answer is looked for boxed first (the last `\\boxed{}`), then after phrases such as "the answer is", then, unless
`anchored`, as the last expression of the text. Bare boxes in one text are one answer together (the set of them), so
that hedging does not pay. The work is done by the math-verify package in processes that can be killed: hostile answers
(towers of powers, huge factorials, deep nesting) become `timeout` or `error`, never 0.

Outcomes: `correct`, `wrong`, `no_answer` (no expression found; value 0), `unparsable` (the reference is no mathematical
expression, or too long), `timeout`, `error`. Caveat: the last expression of a text is easily not meant as its answer;
`anchored` is the stricter rule.
"""

import asyncio
import re
from dataclasses import replace
from functools import cache, lru_cache
from typing import Any

from pydantic import Field

from reward_server.reward import Context, Params, Reward
from reward_server.worker_process import Exhausted
from services.api import RewardGroup
from services.contract import Outcome, Score

CHECK, READ, SAME = (f"reward_server.rewards.math_verify:{name}" for name in ("check", "read", "same"))
WARM_UP = (CHECK, {"gold": "\\frac{1}{2}", "text": "so \\boxed{0.5}", "anchored": False})
MAX_GOLD = 4096
STOPS = ".,;"
STRICT: dict[str, Any] = {"parsing_timeout": None, "raise_on_error": True}
PROBE = "0.7391"
"""Any number will do: what it costs to compare an answer with it is what the answer costs."""
LARGEST = 10**40

MARKED = re.compile(r"\\boxed|(?<!\\)\$")
"""A reference answer that says itself where its mathematics are; any other is mathematics as a whole."""
COSTLY = re.compile(
    r"[\d)}]\s*!"  # factorials
    r"|\\(?:sum|prod|int|lim|binom)|(?:\\[dt]?frac.{0,12}){4}|(?:\\sqrt.{0,6}){4}"
    r"|(?:\^|\*\*)[\s{(]*\d{3,}"  # large exponents
    r"|(?:\^|\*\*)[\s{(\d]*(?:\^|\*\*)"  # towers of powers
    r"|[)}\]]\s*(?:\^|\*\*)[\s{(]*\d\d"  # large powers of sums and of powers
    r"|[)}\]]\s*(?:\^|\*\*).{0,8}[)}\]]\s*(?:\^|\*\*)"  # powers of powers of powers
    r"|[{(\[]\s*(?:[{(\[]\s*){5}"  # deep nesting
    r"|\d{40,}"
)


class MathParams(Params):
    """`anchored`: an answer counts only in a box or after words that announce it, not just by standing last."""

    anchored: bool = False
    tail_characters: int = Field(16384, ge=16, le=200_000, description="only the end of a completion is read")


def heavy(text: str) -> bool:
    """Whether the answer looks expensive to compare. Decides where the check waits, never what it says."""
    start = text.rfind("\\boxed")
    answer = text[start : start + 4000] if start >= 0 else text[-2000:]
    return COSTLY.search(answer) is not None


async def score(group: RewardGroup, params: MathParams, context: Context) -> list[Score]:
    gold = (group.task.reference.answer or "") if group.task.reference else ""
    if len(gold) > MAX_GOLD:
        detail = f"the reference answer has {len(gold)} characters, more than {MAX_GOLD}"
        return [Score.failed(Outcome.unparsable, detail) for _ in group.completions]
    gold_is_heavy = heavy(gold)

    async def one(text: str) -> Score:
        text = text[-params.tail_characters :]
        payload = {"gold": gold, "text": text, "anchored": params.anchored}
        costly = gold_is_heavy or heavy(text)
        verdict = await context.workers.check(CHECK, payload, context.deadline, context.turn, heavy=costly)
        if verdict.status != "ok":
            return Score.failed(Outcome(verdict.status), verdict.detail, verdict.seconds)
        outcome, detail = Outcome(verdict.result["outcome"]), verdict.result["detail"]
        if outcome is Outcome.unparsable:
            return Score.failed(outcome, detail, verdict.seconds)
        return Score.of(float(outcome is Outcome.correct), outcome, detail, verdict.seconds)

    return list(await asyncio.gather(*(one(completion.text) for completion in group.completions)))


REWARD = Reward(
    name="math_verify",
    description="1 when the completion's final answer equals the reference answer mathematically, 0 when it does not.",
    needs=("reference.answer", "math-verify"),
    range=(0.0, 1.0),
    params=MathParams,
    score=score,
)


# ---- from here on: inside a worker process ---------------------------------------------------------------------


@cache
def _library() -> tuple[Any, Any, Any]:
    """(parse, verify, extraction configs by (units, anchored)), with out-of-resources failures made visible.

    math-verify catches every Exception of its parsers and goes on as if there were no answer; running out of stack or
    memory must not become a 0 that way.
    """
    import logging

    import math_verify as package
    from math_verify import parser

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # warns that its own timeouts are off: ours are on

    def surfacing(function):
        def call(*args, **kwargs):
            try:
                return function(*args, **kwargs)
            except (RecursionError, MemoryError) as error:
                raise Exhausted(f"{type(error).__name__} while parsing") from None

        return call

    parser.latex2sympy = surfacing(parser.latex2sympy)
    parser.parse_expr = surfacing(parser.parse_expr)
    plain = package.LatexExtractionConfig().normalization_config
    return (
        package.parse,
        package.verify,
        {
            (units, anchored): [
                package.LatexExtractionConfig(
                    boxed_match_priority=0,
                    try_extract_without_anchor=not anchored,
                    normalization_config=replace(plain, units=units),
                ),
                package.ExprExtractionConfig(try_extract_without_anchor=not anchored),
            ]
            for units in (True, False)
            for anchored in (True, False)
        },
    )


def _expressions(found: list[Any]) -> list[Any]:
    """What math-verify parsed; it adds the extracted text as a plain string, also where parsing failed."""
    return [item for item in found if not isinstance(item, str)]


def _boxed(text: str) -> str:
    """Without the stop that ends its sentence, which math-verify takes for a part of the expression."""
    return f"\\boxed{{{text.strip().rstrip(STOPS)}}}"


def _is_number_like(expression: Any) -> bool:
    """False for what divides by zero and the like: math-verify refuses to compare it with anything."""
    from sympy import nan, zoo

    return not expression.has(nan, zoo)


@lru_cache(maxsize=512)
def _gold(text: str) -> tuple[list[Any], bool]:
    """What a reference answer says, and whether letters at its end were read as units."""
    parse, _, configs = _library()
    if not MARKED.search(text):
        text = _boxed(text)
    for units in (True, False):  # math-verify takes the letters of `a + b + c` for units and drops them
        found = parse(text, extraction_config=configs[units, False], **STRICT)
        if _expressions(found):
            break
    return found, units


def _said(text: str, units: bool, anchored: bool) -> tuple[list[Any], str]:
    """What the completion's answer is, parsed and as text; an empty list when there is none."""
    parse, _, configs = _library()
    config = configs[units, anchored]
    found = parse(text, extraction_config=config, extraction_mode="first_match", **STRICT)
    said = next((item for item in found if isinstance(item, str)), "")
    if said and not _expressions(found) and said.rstrip()[-1] in STOPS:
        found = parse(_boxed(said), extraction_config=config, **STRICT)
    return found, said


def _equal(gold: list[Any], found: list[Any]) -> bool:
    _, verify, _ = _library()
    return verify(gold, found, timeout_seconds=None, raise_on_error=True)


def check(payload: dict[str, Any]) -> dict[str, Any]:
    """Compare one completion with the gold answer: {"outcome", "detail"}.

    With `raise_on_error`, and the time limits of the worker process instead of math-verify's own, so that an expired
    check is never taken for a wrong answer. Raises whatever math-verify does.
    """
    gold, units = _gold(payload["gold"])
    if not all(map(_is_number_like, _expressions(gold))) or not _expressions(gold):
        return {"outcome": "unparsable", "detail": "the reference answer is not a mathematical expression"}
    found, said = _said(payload["text"], units, payload["anchored"])
    if not found:
        return {"outcome": "no_answer", "detail": ""}
    said = said[:200]
    if not all(map(_is_number_like, _expressions(found))):
        return {"outcome": "wrong", "detail": said}
    if _equal(gold, found):
        return {"outcome": "correct", "detail": said}
    return {"outcome": "wrong" if _expressions(found) else "no_answer", "detail": said}


def read(payload: dict[str, Any]) -> dict[str, Any]:
    """What one completion says: {"answer": its text or none, "integer": its digits where it is a whole number}.

    An answer that takes for ever to compare does so here, on its own, and not beside the answers of others.
    """
    from sympy import Integer

    found, said = _said(payload["text"], True, payload["anchored"])
    expressions = _expressions(found)
    if not expressions:
        return {"answer": None, "integer": ""}
    if len(expressions) == 1 and isinstance(expressions[0], Integer) and abs(expressions[0]) < LARGEST:
        return {"answer": said, "integer": str(expressions[0])}
    if all(map(_is_number_like, expressions)):
        _equal(_gold(PROBE)[0], found)
    return {"answer": said, "integer": ""}


def same(payload: dict[str, Any]) -> dict[str, Any]:
    """Which of the `others` the `answer` equals: {"equal": [places in `others`]}."""
    answer = {units: _said(_boxed(payload["answer"]), units, False)[0] for units in (True, False)}
    equal = []
    for place, other in enumerate(payload["others"]):
        gold, units = _gold(other)
        expressions = _expressions(gold), _expressions(answer[units])
        if all(expressions) and all(map(_is_number_like, sum(expressions, []))) and _equal(gold, answer[units]):
            equal.append(place)
    return {"equal": equal}
