"""`exact_match`: is the completion, or what a pattern cuts out of it, the reference answer character by character?

1 when it is `reference.answer`, or one of the further accepted answers in `reference.answers` (a list), else 0.

Outcomes: `correct`, `wrong`, `no_answer` (`regex` finds nothing; value 0), `timeout` (the pattern took too long).
Caveat: `4` and `4.0` differ; `gsm8k` compares numbers and `math_verify` expressions.
"""

import asyncio

from pydantic import Field, field_validator

from reward_server.references import Fields, read
from reward_server.reward import Context, Params, Reward
from reward_server.rewards import patterns
from services.api import RewardGroup
from services.contract import Outcome, Score


class Answers(Fields):
    answer: str
    answers: list[str] = []


class ExactMatchParams(Params):
    """`regex` has one group, which cuts the answer out of the completion (its last match counts)."""

    regex: patterns.Pattern | None = Field(None, description="e.g. `answer (\\d+)`; none compares the whole completion")
    strip: bool = Field(True, description="ignore blanks around both answers")
    case: bool = Field(True, description="upper and lower case differ")

    @field_validator("regex")
    @classmethod
    def one_group(cls, regex: str | None) -> str | None:
        import re

        if regex is not None and re.compile(regex).groups != 1:
            raise ValueError(f"needs exactly one group, the answer (got {re.compile(regex).groups})")
        return regex

    def plain(self, text: str) -> str:
        text = text.strip() if self.strip else text
        return text if self.case else text.casefold()


async def score(group: RewardGroup, params: ExactMatchParams, context: Context) -> list[Score]:
    reference = read(Answers, group, context.field, "exact_match")
    accepted = {params.plain(answer) for answer in [reference.answer, *reference.answers]}

    def judge(answer: str, seconds: float) -> Score:
        is_same = params.plain(answer) in accepted
        return Score.of(float(is_same), Outcome.correct if is_same else Outcome.wrong, answer[:200], seconds)

    async def one(text: str) -> Score:
        if params.regex is None:
            return judge(text, 0.0)
        verdict = await patterns.match(params.regex, text, "last", context)
        if verdict.status != "ok":
            return Score.failed(Outcome(verdict.status), verdict.detail, verdict.seconds)
        answer = verdict.result["group"]
        if answer is None:
            return Score.of(0.0, Outcome.no_answer, seconds=verdict.seconds)
        return judge(answer, verdict.seconds)

    return list(await asyncio.gather(*(one(completion.text) for completion in group.completions)))


REWARD = Reward(
    name="exact_match",
    description="1 when the completion (or what `regex` cuts out of it) is an accepted answer, else 0.",
    needs=("reference.answer",),
    range=(0.0, 1.0),
    params=ExactMatchParams,
    score=score,
)
