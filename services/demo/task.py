"""The demo's task: two-digit addition, and the two kinds of author whose text the base model is made from.

A prompt is `47+58`. A *careful* author writes `units 7+8=15 tens 4+5+1=10 answer 105` and is nearly always right; a
*guessing* author writes `maybe 105` and is mostly wrong, by noise that is put in on purpose. The base model picks up
both habits and mostly guesses, although it can add step by step. What the demo really shows is the CHOICE of the surer
way of answering: the arithmetic inside either way was there before, and gets no better.
"""

import hashlib
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from services.contract import Message, Reference, Task

Part = Literal["pretraining", "train", "held_out"]
Way = Literal["step_by_step", "guess", "other"]

SOURCE = "addition"
ANSWER_PATTERN = r"(?:answer|maybe) (\d+)$"
"""Cuts the answer out of a completion: its last word must be a number after `answer` or `maybe`."""

CAREFUL_SHARE = 0.3
COLUMN_ERROR = 0.02
DIGIT_ERROR = 0.4


@dataclass(frozen=True, order=True)
class Problem:
    first: int
    second: int

    @property
    def prompt(self) -> str:
        return f"{self.first}+{self.second}"

    @property
    def answer(self) -> str:
        return str(self.first + self.second)

    @property
    def part(self) -> Part:
        """10 % held out, 10 % to train on with rewards, 80 % pretraining: by a hash of the unordered pair, so that
        a problem and its mirror (58+47) are always in the same part."""
        low, high = sorted((self.first, self.second))
        tenth = hashlib.sha256(f"{low}+{high}".encode()).digest()[0] % 10
        return "held_out" if tenth == 0 else "train" if tenth == 1 else "pretraining"

    @property
    def task(self) -> Task:
        return Task(
            task_id=self.prompt,
            source=SOURCE,
            messages=[Message(role="user", content=self.prompt)],
            reference=Reference(answer=self.answer),
        )


def problems(part: Part) -> list[Problem]:
    """Every pair of two-digit numbers that falls in `part`, in order."""
    pairs = (Problem(first, second) for first in range(10, 100) for second in range(10, 100))
    return [problem for problem in pairs if problem.part == part]


def held_out(limit: int | None = None) -> list[Problem]:
    """Held-out problems in an order that does not depend on any seed, so every run is measured on the same ones."""
    chosen = problems("held_out")
    random.Random(0).shuffle(chosen)
    return chosen[:limit]


def write_tasks(path: Path) -> int:
    """Write the training problems as JSONL; returns how many."""
    chosen = problems("train")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_jsonl(chosen))
    return len(chosen)


def as_jsonl(chosen: Sequence[Problem]) -> str:
    """A row `{"id", "prompt", "answer"}` for each."""
    rows = [{"id": one.prompt, "prompt": one.prompt, "answer": one.answer} for one in chosen]
    return "".join(json.dumps(row) + "\n" for row in rows)


def careful(problem: Problem, rng: random.Random) -> str:
    """A step-by-step answer. Each column's sum is off by one with probability `COLUMN_ERROR`, and the rest follows."""

    def column(total: int) -> int:
        return abs(total + rng.choice((-1, 1))) if rng.random() < COLUMN_ERROR else total

    tens_1, units_1 = divmod(problem.first, 10)
    tens_2, units_2 = divmod(problem.second, 10)
    units = column(units_1 + units_2)
    carry = units // 10
    tens = column(tens_1 + tens_2 + carry)
    answer = tens * 10 + units % 10
    return f"units {units_1}+{units_2}={units} tens {tens_1}+{tens_2}+{carry}={tens} answer {answer}"


def guess(problem: Problem, rng: random.Random) -> str:
    """The bare sum, each digit replaced by a random other one with probability `DIGIT_ERROR`."""
    digits = [
        rng.choice([other for other in "0123456789" if other != digit]) if rng.random() < DIGIT_ERROR else digit
        for digit in problem.answer
    ]
    return f"maybe {''.join(digits)}"


def author(problem: Problem, rng: random.Random) -> str:
    """One answer by an author drawn at random: careful with probability `CAREFUL_SHARE`, else guessing."""
    return careful(problem, rng) if rng.random() < CAREFUL_SHARE else guess(problem, rng)


def is_right(problem: Problem, completion: str) -> bool:
    found = re.search(ANSWER_PATTERN, completion)
    return found is not None and found[1] == problem.answer


def way(completion: str) -> Way:
    """Which way of answering a completion takes, by its first word."""
    if completion.startswith("units "):
        return "step_by_step"
    return "guess" if completion.startswith("maybe ") else "other"
