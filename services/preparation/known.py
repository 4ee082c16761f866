"""The data sets that are known by name: where they are, and what their columns mean."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from services.demo.task import SOURCE as DEMO
from services.recipe_sections import Data, Fields
from services.rows import Row

BOX = "\\boxed{"
PREDICTION = "What does the last line leave in place of the question marks?\n\n{code}\n\nassert f({input}) == ??"


class Unusable(ValueError):
    """A row that nothing can be trained on; the message is the name it is counted under."""


@dataclass(frozen=True)
class Known:
    """`needs` are columns of the source, `takes` those that it may have; `reshape` makes of them what `fields` name.
    `rows` are as published. `grader` is the reward that an answer must satisfy when given as the completion."""

    path: str
    source: str
    rows: int
    fields: Fields
    needs: tuple[str, ...]
    takes: tuple[str, ...] = ()
    config: str | None = None
    split: str = "train"
    answer_pattern: str | None = None
    grader: str | None = None
    reshape: Callable[[Row], Row] = field(default=lambda row: row)


def last_boxed(text: str) -> str | None:
    """What the last `\\boxed{}` of a text holds."""
    start = text.rfind(BOX)
    if start < 0:
        return None
    start += len(BOX)
    depth = 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return text[start:place].strip()
    return None


def _math(row: Row) -> Row:
    answer = row.get("answer") or last_boxed(row.get("solution") or "")
    if not answer:
        raise Unusable("no_answer")
    return {"problem": row["problem"], "answer": answer}


def _code_contests(row: Row) -> Row:
    if not (row["description"] or "").strip():
        raise Unusable("no_description")
    tests = []
    for kind in ("public_tests", "private_tests", "generated_tests"):
        found: Mapping[str, list[str]] = row.get(kind) or {"input": [], "output": []}
        pairs = zip(found["input"], found["output"], strict=True)
        tests += [{"input": given, "output": due} for given, due in pairs]
    if not tests:
        raise Unusable("no_tests")
    limit, memory = row.get("time_limit"), row.get("memory_limit_bytes")
    seconds = None if limit is None else (limit.get("seconds") or 0) + (limit.get("nanos") or 0) / 1e9
    return {
        "description": row["description"],
        "tests": tests,
        "name": row.get("name"),
        "time_limit_seconds": seconds or None,
        "memory_limit_mb": memory // 2**20 if memory else None,
        "rating": row.get("cf_rating") or None,
    }


def _cruxeval(row: Row) -> Row:
    return {**row, "prompt": re.sub(r"\{(code|input)\}", lambda found: row[found[1]], PREDICTION)}


def _named(*names: str) -> dict[str, Any]:
    return {name: name for name in names}


KNOWN: dict[str, Known] = {
    "math": Known(
        "DigitalLearningGmbH/MATH-lighteval",
        "math",
        7500,
        Fields(prompt="problem", answer="answer"),
        needs=("problem",),
        takes=("answer", "solution"),
        grader="math_verify",
        reshape=_math,
    ),
    "gsm8k": Known(
        "openai/gsm8k",
        "gsm8k",
        7473,
        Fields(prompt="question", answer="answer"),
        needs=("question", "answer"),
        config="main",
        answer_pattern=r"####\s*(.+)",
        grader="math_verify",
    ),
    "math500": Known(
        "HuggingFaceH4/MATH-500",
        "math500",
        500,
        Fields(prompt="problem", answer="answer"),
        needs=("problem", "answer"),
        split="test",
        grader="math_verify",
    ),
    "code_contests": Known(
        "deepmind/code_contests",
        "code_contests",
        13328,
        Fields(
            prompt="description",
            tests="tests",
            reference=_named("name", "time_limit_seconds", "memory_limit_mb", "rating"),
        ),
        needs=("description", "public_tests", "private_tests", "generated_tests"),
        takes=("name", "time_limit", "memory_limit_bytes", "cf_rating"),
        reshape=_code_contests,
    ),
    "cruxeval": Known(
        "cruxeval-org/cruxeval",
        "cruxeval",
        800,
        Fields(prompt="prompt", answer="output", id="id", reference=_named("code", "input")),
        needs=("code", "input", "output", "id"),
        split="test",
        grader="code_output",
        reshape=_cruxeval,
    ),
}


def how_to_make(path: Path, source: str) -> str:
    """What to add where there is no file `path` with rows of `source`; "" where no command is known to make it."""
    if source == DEMO:
        return "; `rlif demo-prepare DIR` makes DIR/train.jsonl, and DIR/recipe.yaml, which names it"
    name = next((name for name, known in KNOWN.items() if known.source == source), None)
    return "" if name is None else f"; `rlif data prepare {name} {path.with_suffix('.jsonl')}` makes one"


def published_rows(data: Data) -> int | None:
    """Of a data set on the hub, where it is known here."""
    rows = next((known.rows for known in KNOWN.values() if (known.path, known.split) == (data.path, data.split)), None)
    return rows if rows is None or data.limit is None else min(rows, data.limit)
