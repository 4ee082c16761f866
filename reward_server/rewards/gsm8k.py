"""`gsm8k`: does the completion end in the reference number?

1 when the completion's number equals the reference's, else 0. The reference is a plain number or a GSM8K solution
(Cobbe et al., arXiv 2110.14168), whose number follows the last `####`. In the completion the number right after the
last such `####` counts; with `flexible`, when there is none, the last number of the text does.

Numbers are compared as numbers: `1,080`, `$1080`, `1080.00 dollars` and `1080%` are all 1080, `3/4` is 0.75, `-5` and
`−5` are alike. Units are not looked at, so 5 m equals 5 cm, and 25 % equals 25 but not 0.25. For anything but plain
numbers use `math_verify`.

Outcomes: `correct`, `wrong`, `no_answer` (no number; value 0), `unparsable` (the reference has no number).
"""

import asyncio
import re
from fractions import Fraction
from typing import Literal

from pydantic import Field

from reward_server.reward import Context, Params, Reward
from services.api import RewardGroup
from services.contract import Outcome, Score

NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\].])[-\u2212\u2013])?[$€£¥]?(?P<inner>(?<=[$€£¥])[-\u2212])?"
    r"(?P<digits>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
    r"(?:[eE](?P<exponent>[-+]?\d{1,3})(?!\w))?"
    r"(?:/(?P<below>\d+(?:\.\d+)?))?"
)
MARKED = re.compile(r"####\s{0,16}[^\w\n.\u2212-]{0,16}" + NUMBER.pattern)
"""Words between `####` and the number make it a heading (`#### Step 3`)."""
LONGEST = 1000
"""Characters of a number that is still read; reference numbers are far below it, so a longer one is another number."""


class Gsm8kParams(Params):
    method: Literal["strict", "flexible"] = Field(
        "flexible", description="`strict`: only a number after `####` counts; `flexible`: else the last number does"
    )
    tail_characters: int = Field(16384, ge=16, le=200_000, description="only the end of a completion is read")


def value_of(found: re.Match[str]) -> Fraction | None:
    """None when it is no number after all: over-long, or divided by zero."""
    if len(found[0]) > LONGEST:
        return None
    exponent = f"e{found['exponent']}" if found["exponent"] else ""
    value = Fraction(found["digits"].replace(",", "") + exponent)
    below = Fraction(found["below"]) if found["below"] else Fraction(1)
    if below == 0:
        return None
    return -value / below if found["sign"] or found["inner"] else value / below


def answer(text: str, method: str) -> re.Match[str] | None:
    """The number that `text` gives as its answer."""
    text = text.replace("\\$", "$").replace("{,}", ",")  # as LaTeX writes them
    for pattern in (MARKED, NUMBER) if method == "flexible" else (MARKED,):
        last = None
        for last in pattern.finditer(text):  # noqa: B007
            pass
        if last is not None:
            return last
    return None


def judge(text: str, gold: Fraction, params: Gsm8kParams) -> Score:
    found = answer(text[-params.tail_characters :], params.method)
    if found is None:
        return Score.of(0.0, Outcome.no_answer)
    is_same = value_of(found) == gold
    return Score.of(float(is_same), Outcome.correct if is_same else Outcome.wrong, found[0].lstrip("# ")[:200])


async def score(group: RewardGroup, params: Gsm8kParams, _context: Context) -> list[Score]:
    reference = (group.task.reference.answer or "") if group.task.reference else ""
    found = answer(reference, "flexible")
    gold = None if found is None else value_of(found)
    if gold is None:
        failure = Score.failed(Outcome.unparsable, f"the reference answer has no number: {reference[-100:]!r}")
        return [failure for _ in group.completions]
    return await asyncio.to_thread(lambda: [judge(item.text, gold, params) for item in group.completions])


REWARD = Reward(
    name="gsm8k",
    description="1 when the number after `####`, or else the last number of the completion, is the reference number.",
    needs=("reference.answer",),
    range=(0.0, 1.0),
    params=Gsm8kParams,
    score=score,
)
