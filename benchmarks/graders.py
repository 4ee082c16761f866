"""Whether data sets and graders agree: every gold answer given back as a completion, every CRUXEval program run.

    python benchmarks/graders.py --data DIR [--workers N] [--json]

Of DIR it takes what is there: math_train.jsonl, math500.jsonl, gsm8k_train.jsonl, gsm8k_test.jsonl, cruxeval.jsonl. An
answer is boxed (CRUXEval: between [ANSWER] marks) and judged by the reward that trains on it; each CRUXEval function is
called in the sandbox, and its result compared with the recorded one by the reward `code_tests`. Exit code 1 where more
than 1 % of a file does not agree.
"""

import argparse
import asyncio
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reward_server import golds
from reward_server.reward import Context
from reward_server.rewards import code_tests
from reward_server.sandbox.bubblewrap import Bubblewrap
from reward_server.workers import Turn, WorkerPool
from services import rows
from services.api import CompletionText, RewardGroup
from services.contract import Outcome, Reference, Score, Task, TestCase
from services.preparation.known import KNOWN, Unusable

FILES = {
    "math_train.jsonl": "math",
    "math500.jsonl": "math500",
    "gsm8k_train.jsonl": "gsm8k",
    "gsm8k_test.jsonl": "gsm8k",
    "cruxeval.jsonl": "cruxeval",
}
AT_ONCE = 4
MOST = 0.01


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the files")
    parser.add_argument("--workers", type=int, default=2, help="verifier processes")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def read(path: Path, name: str) -> tuple[list[Reference], int]:
    """The references of a file, and how many rows have no answer at all."""
    known = KNOWN[name]
    pattern = re.compile(known.answer_pattern or "(?s)(.*)")
    table = rows.table(str(path))
    columns = [*known.needs, *(column for column in known.takes if column in table.columns)]
    references, lacking = [], 0
    for _, row in table.read(columns):
        try:
            made = known.reshape(row)
        except Unusable:
            lacking += 1
            continue
        found = pattern.search(made[known.fields.answer])
        further = {key: made[column] for key, column in known.fields.reference.items()}
        references.append(Reference(answer=found[1].strip(), **further))
    return references, lacking


async def run(references: list[Reference], ran: Callable[[], None] = lambda: None) -> list[Score]:
    """What `code_tests` says of each function's call, the recorded result being the expected output."""
    sandbox, pool = Bubblewrap(frozenset({"python"}), concurrency=AT_ONCE), WorkerPool(1)
    await sandbox.start()
    places = asyncio.Semaphore(AT_ONCE)

    async def one(reference: Reference) -> Score:
        given = reference.model_extra
        program = f"```python\n{given['code']}\nprint(repr(f({given['input']})))\n```"
        tests = [TestCase(input="", output=str(reference.answer))]
        task = Task(task_id="run", prompt="", reference=Reference(tests=tests))
        group = RewardGroup(group_id="run", task=task, completions=[CompletionText(text=program)])
        async with places:
            context = Context(pool, time.monotonic() + golds.DEADLINE_SECONDS, Turn(), sandbox=sandbox)
            (score,) = await code_tests.score(group, code_tests.CodeTestsParams(), context)
        ran()
        return score

    try:
        return list(await asyncio.gather(*map(one, references)))
    finally:
        await sandbox.stop()


def account(
    name: str, references: list[Reference], lacking: int, scores: list[Score], seconds: float
) -> dict[str, Any]:
    failed = [
        {"answer": str(reference.answer)[:100], "outcome": str(score.outcome), "why": score.detail[:200]}
        for reference, score in zip(references, scores, strict=True)
        if score.outcome is not Outcome.correct
    ]
    return {
        "check": name,
        "rows": len(references) + lacking,
        "without_answer": lacking,
        "agree": len(references) - len(failed),
        "failed": failed,
        "seconds": round(seconds, 1),
    }


def main() -> int:
    options = arguments()
    found = []
    for file, name in FILES.items():
        path = options.data / file
        if not path.is_file():
            continue
        references, lacking = read(path, name)
        reward = KNOWN[name].grader
        started = time.monotonic()
        scores = asyncio.run(golds.check(references, reward, options.workers))
        found.append(account(f"{file}: {reward}", references, lacking, scores, time.monotonic() - started))
        if name == "cruxeval":
            started = time.monotonic()
            scores = asyncio.run(run(references))
            found.append(account(f"{file}: run in the sandbox", references, 0, scores, time.monotonic() - started))
    if not found:
        sys.exit(f"--data {options.data}: holds none of {', '.join(FILES)}")
    for one in found if not options.json else []:
        others = one["rows"] - one["agree"]
        print(f"{one['check']:<38} {one['agree']} of {one['rows']} agree ({others / one['rows']:.2%} do not), ", end="")
        print(f"{one['without_answer']} without an answer, {one['seconds']} s")
        for failure in one["failed"]:
            print(f"    {failure['outcome']}: {failure['answer']}: {failure['why']}")
    if options.json:
        print(json.dumps(found, indent=2))
    return int(any(one["agree"] < (1 - MOST) * one["rows"] for one in found))


if __name__ == "__main__":
    sys.exit(main())
