"""LiveCodeBench (Jain et al., arXiv 2403.07974), code generation, release v6: a program for a contest problem.

A problem has tests on standard input, or names a function (of `class Solution`, as its starter code has it) and gives
arguments and results as JSON. All tests must pass. The wording of the prompt is ours; it says what the benchmark's
says: one fenced Python program, input read from stdin, or the starter code completed.
"""

import base64
import binascii
import json
import pickletools
import zlib
from typing import Any

from services.evaluation.benchmark import Benchmark, Hub, Item, Record, cases, text_of
from services.spec import RewardTerm

PROMPT = """Write a correct and efficient Python program for the problem below.

{problem}

{how}

Put the whole program into one block fenced by ```python and ```."""
STDIN = "The program reads from standard input and writes the answer to standard output, nothing else."
STARTER = "Complete this code, and keep its names:\n\n```python\n{starter}\n```"
LONGEST_TESTS = 2**29
"""Bytes that one record's private tests may unpack to: a few kilobytes could fill the memory."""
RELEASE_V6 = ("test.jsonl", *(f"test{number}.jsonl" for number in range(2, 7)))


def _plain(given: Any) -> Any:
    """The list that a column of JSON text holds, which the private tests' is compressed and pickled in."""
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given)
    except ValueError:
        pass
    try:
        unpacking = zlib.decompressobj()
        pickled = unpacking.decompress(base64.b64decode(given), LONGEST_TESTS)
        if not unpacking.eof:
            raise ValueError(f"cut off, or more than {LONGEST_TESTS} bytes unpacked")
        # The pickle is of one text. Its opcodes are read, and none is carried out.
        (text,) = (said for opcode, said, _ in pickletools.genops(pickled) if "UNICODE" in opcode.name)
        return json.loads(str(text))
    except (ValueError, binascii.Error, zlib.error) as error:
        raise ValueError(f"private_test_cases cannot be read: {error}") from error


def read(record: Record, _examples: list[Record]) -> Item:
    tests = [*_plain(record["public_test_cases"]), *_plain(record.get("private_test_cases") or [])]
    starter, function = record.get("starter_code") or "", _plain(record.get("metadata") or {}).get("func_name")
    if function:
        # As the call prints it.
        tests = [{**test, "output": json.dumps(json.loads(test["output"]))} for test in tests]
    how = STARTER.format(starter=starter.rstrip()) if function else STDIN
    prompt = PROMPT.format(problem=text_of(record, "question_content").strip(), how=how)
    reference = {"tests": cases(tests)} | ({"fn_name": function} if function else {})
    return Item(text_of(record, "question_id"), prompt, reference)


BENCHMARK = Benchmark(
    name="livecodebench",
    title="LiveCodeBench v6",
    measure="accuracy",
    file="livecodebench.jsonl",
    hub=Hub("livecodebench/code_generation_lite", "train", files=RELEASE_V6),
    read=read,
    # Six seconds a test are the benchmark's own limit.
    terms=(
        RewardTerm(
            name="code_tests",
            params={"reward": "all", "max_cases": 1024, "seconds": 6.0, "wall_seconds": 12.0, "memory_mb": 4096},
        ),
    ),
    main=("code_tests",),
    max_tokens=2048,
    column="LCB",
    runs_code=True,
)
