"""What the completions of one group answer, and which of them say the same: the ground of all votes.

First each completion is read by itself: its final answer is taken out as text. Equal texts (and equal whole numbers)
are one answer. What remains is compared, each answer with those before it in a fixed order: cheap-looking ones first,
then by length and alphabet. An answer joins the cluster of the first *representative* it equals, or begins one of its
own. (Verified equality is not transitive, since numbers are compared with a tolerance: representatives in a fixed
order make the clusters a function of what was said, whoever said it first.)

All of it runs in processes that can be killed. An answer that cannot be read or compared in time is that completion's
failure: it is in no cluster, and the others are clustered without it.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

from pydantic import Field, model_validator

from reward_server.reward import Context, Params
from reward_server.rewards import math_verify, patterns
from reward_server.workers import Verdict
from services.api import RewardGroup
from services.contract import Outcome, Score

LONGEST = 4096
"""Characters of an answer."""
AT_ONCE = 16
"""Answers that one check compares with another: few enough for the quantum of a verifier process."""
ROUNDS = 3
"""A comparison may fail through either side, so what failed is compared anew without the first to blame."""


class AnswerParams(Params):
    """How the final answer is found in a completion, and when two are the same.

    `math`: as `math_verify` finds it, equal when math-verify says so. `regex`: the last match's group; `text`: all of
    the completion; both are equal when they differ in nothing but blanks (and, unless `case`, in upper and lower case).
    """

    answer: Literal["math", "regex", "text"] = "math"
    regex: patterns.Pattern | None = Field(None, description="with `answer: regex`: has one group, the answer")
    case: bool = Field(True, description="upper and lower case differ (not with `math`)")
    anchored: bool = Field(False, description="with `math`: only boxed or announced answers count")
    tail_characters: int = Field(16384, ge=16, le=200_000, description="only the end of a completion is read")

    @model_validator(mode="after")
    def pattern_where_it_is_used(self) -> Self:
        import re

        if (self.answer == "regex") != (self.regex is not None):
            raise ValueError("`answer: regex` and `regex` belong together: give both or neither")
        if self.regex is not None and re.compile(self.regex).groups != 1:
            raise ValueError(f"regex: needs exactly one group, the answer (got {re.compile(self.regex).groups})")
        return self


@dataclass(frozen=True)
class Answer:
    """`cluster` numbers the answers of the group; none: no answer was given, or `failure` says why it is not known."""

    cluster: int | None
    text: str = ""
    failure: Score | None = None
    seconds: float = 0.0

    @property
    def is_known(self) -> bool:
        return self.failure is None

    def score(self, value: float, outcome: Outcome = Outcome.ok) -> Score:
        """What a vote says of the completion: its failure, 0 for no answer, or else `value`."""
        if self.failure is not None:
            return self.failure
        if self.cluster is None:
            return Score.of(0.0, Outcome.no_answer, seconds=self.seconds)
        return Score.of(value, outcome, self.text[:200], self.seconds)

    def skipped(self, why: str) -> Score:
        """The vote says nothing of this completion."""
        return self.failure or Score.failed(Outcome.skipped, why, self.seconds)


async def answers(group: RewardGroup, params: AnswerParams, context: Context) -> list[Answer]:
    """One Answer a completion, in order. Rewards of one group that find answers the same way share the work."""
    way = AnswerParams(**params.model_dump(include=set(AnswerParams.model_fields)))
    return await context.once(("answers", way), lambda: _clustered(group, way, context))


# ---- reading ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Said:
    """One completion read by itself. Two that have the same `key` say the same; none: there is no answer."""

    key: tuple[str, str] | None
    text: str = ""
    failure: Score | None = None
    seconds: float = 0.0


def _failure(verdict: Verdict) -> Score:
    return Score.failed(Outcome(verdict.status), verdict.detail, verdict.seconds)


async def _read(text: str, params: AnswerParams, context: Context) -> Said:
    text = text[-params.tail_characters :]
    if params.answer == "math":
        return await _read_math(text, params.anchored, context)
    seconds = 0.0
    if params.regex is not None:
        verdict = await patterns.match(params.regex, text, "last", context)
        if verdict.status != "ok":
            return Said(None, failure=_failure(verdict))
        text, seconds = verdict.result["group"] or "", verdict.seconds
    plain = " ".join(text.split())
    if not plain:
        return Said(None, seconds=seconds)
    return Said(("text", plain if params.case else plain.casefold()), plain, None, seconds)


async def _read_math(text: str, anchored: bool, context: Context) -> Said:
    payload, costly = {"text": text, "anchored": anchored}, math_verify.heavy(text)
    verdict = await context.workers.check(math_verify.READ, payload, context.deadline, context.turn, heavy=costly)
    if verdict.status != "ok":
        return Said(None, failure=_failure(verdict))
    said, integer = verdict.result["answer"], verdict.result["integer"]
    if said is None:
        return Said(None, seconds=verdict.seconds)
    if integer:
        return Said(("integer", integer), said, None, verdict.seconds)
    plain = " ".join(said.split())
    if len(plain) > LONGEST:
        detail = f"the answer has {len(plain)} characters, more than {LONGEST}"
        return Said(None, failure=Score.failed(Outcome.unparsable, detail, verdict.seconds))
    return Said(("math", plain), plain, None, verdict.seconds)


# ---- comparing -------------------------------------------------------------------------------------------------


def order_of(key: tuple[str, str]) -> tuple[bool, int, tuple[str, str]]:
    """A place in the fixed order: what looks expensive to compare comes last."""
    return math_verify.heavy(key[1]), len(key[1]), key


def clusters(count: int, equal: Sequence[set[int]]) -> list[int]:
    """Cluster numbers of `count` answers in their fixed order; `equal[i]` are the places before i that i equals."""
    representatives: list[int] = []
    labels = []
    for place in range(count):
        label = next((n for n, there in enumerate(representatives) if there in equal[place]), len(representatives))
        if label == len(representatives):
            representatives.append(place)
        labels.append(label)
    return labels


async def _equal_to(key: tuple[str, str], others: list[tuple[str, str]], context: Context) -> set[int] | Score:
    """Places in `others` that the answer equals, or why that cannot be told. Distinct whole numbers differ."""
    compared = [place for place, other in enumerate(others) if not key[0] == other[0] == "integer"]
    if key[0] == "text":  # equal texts have one key
        return set()

    async def some(places: list[int]) -> Verdict:
        payload = {"answer": key[1], "others": [others[place][1] for place in places]}
        costly = math_verify.heavy(key[1])
        return await context.workers.check(math_verify.SAME, payload, context.deadline, context.turn, heavy=costly)

    parts = [compared[start : start + AT_ONCE] for start in range(0, len(compared), AT_ONCE)]
    equal: set[int] = set()
    for part, verdict in zip(parts, await asyncio.gather(*map(some, parts)), strict=True):
        if verdict.status != "ok":
            return _failure(verdict)
        equal |= {part[place] for place in verdict.result["equal"]}
    return equal


async def _compare(
    keys: list[tuple[str, str]], context: Context
) -> tuple[dict[tuple[str, str], int], dict[tuple[str, str], Score]]:
    """(cluster by key, failure by key). `keys` are in their fixed order.

    Of the answers whose comparisons failed, the first is to blame: it was compared with sound ones alone. The others
    may have failed on it, and are compared again without it.
    """
    equal: dict[tuple[str, str], set[tuple[str, str]]] = {}
    failed: dict[tuple[str, str], Score] = {}
    for attempt in range(ROUNDS):
        left = [key for key in keys if key not in failed]
        open_keys = [key for key in left if key not in equal]
        before = {key: left[: left.index(key)] for key in open_keys}
        found = await asyncio.gather(*(_equal_to(key, before[key], context) for key in open_keys))
        bad = {}
        for key, result in zip(open_keys, found, strict=True):
            if isinstance(result, Score):
                bad[key] = result
            else:
                equal[key] = {before[key][place] for place in result}
        if not bad:
            break
        to_blame = list(bad) if attempt == ROUNDS - 1 else list(bad)[:1]
        failed.update((key, bad[key]) for key in to_blame)
    left = [key for key in keys if key not in failed]
    places = {key: place for place, key in enumerate(left)}
    labels = clusters(len(left), [{places[other] for other in equal[key] if other in places} for key in left])
    return dict(zip(left, labels, strict=True)), failed


async def _clustered(group: RewardGroup, params: AnswerParams, context: Context) -> list[Answer]:
    said = await asyncio.gather(*(_read(item.text, params, context) for item in group.completions))
    keys = sorted({item.key for item in said if item.key is not None}, key=order_of)
    cluster, failed = await _compare(keys, context)

    def answer(item: Said) -> Answer:
        if item.key is None:
            return Answer(None, failure=item.failure, seconds=item.seconds)
        return Answer(cluster.get(item.key), item.text, failed.get(item.key), item.seconds)

    return [answer(item) for item in said]
