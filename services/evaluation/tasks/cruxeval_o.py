"""CRUXEval-O (Gu et al., arXiv 2401.03065): what does this function return for this input?

Asked for as the paper does, by ZeroEval's shape: one JSON object with `reasoning` and `answer`. The wording is ours.
"""

import json
import re
from typing import Any

from services.evaluation.benchmark import Benchmark, Hub, Item, Record, text_of
from services.spec import RewardTerm

PROMPT = """Below are a Python function and a call of it. Work out what the call returns.

```python
{code}

f({input})
```

Reply with one JSON object and nothing after it:

{{"reasoning": "how the result comes about, step by step", "answer": "the returned value, as a Python literal"}}"""
KEY = re.compile(r"\"answer\"\s*:\s*")
LITERAL = re.compile(r"\s*(?:[\"'\[({\d.+-]|[bru]{1,2}[\"']|(?:True|False|None)\s*$|[A-Za-z]+\()")
"""How the text of a Python value begins."""


def read(record: Record, _examples: list[Record]) -> Item:
    code, given, returned = (
        text_of(record, "code"),
        text_of(record, "input", may_be_empty=True),
        text_of(record, "output"),
    )
    prompt = PROMPT.format(code=code, input=given)
    return Item(text_of(record, "id"), prompt, {"answer": returned, "code": code, "input": given})


def _value(said: Any) -> str:
    """JSON's value as Python; text is one already, unless it does not read like one: then its quotes were JSON's."""
    return said if isinstance(said, str) and LITERAL.match(said) else repr(said)


def judged(text: str) -> str:
    """The last `answer` of the reply, marked as code_output wants it; empty when there is none."""
    found = None
    for found in KEY.finditer(text):  # noqa: B007
        pass
    if found is None:
        return ""
    try:
        said, _ = json.JSONDecoder().raw_decode(text, found.end())
    except (ValueError, RecursionError):  # an unquoted Python value, say
        said = text[found.end() :].strip().removesuffix("```").strip().removesuffix("}").strip()
    return f"[ANSWER]{_value(said)}[/ANSWER]"


BENCHMARK = Benchmark(
    name="cruxeval_o",
    title="CRUXEval-O",
    measure="accuracy",
    file="cruxeval.jsonl",
    hub=Hub("cruxeval-org/cruxeval", "test"),
    read=read,
    terms=(RewardTerm(name="code_output"),),
    main=("code_output",),
    max_tokens=2048,
    column="CRUXEval-O",
    judged=judged,
    vote={"answer": "regex", "regex": r"(?s)\[ANSWER\](.*)\[/ANSWER\]"},
    runs_code=True,
)
