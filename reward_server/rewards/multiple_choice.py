"""`multiple_choice`: did the completion pick the reference's letter?

1 when the letter the completion settles on is the reference's, else 0. The first of these that the text has decides:

1. the last `\\boxed{...}`: a letter (`B`, `(B)`, `\\text{B}`, `B. Paris`) or the text of a choice;
2. the last announcement (`answer is B`, `Answer: (B)`, `answer is **B**`, `the answer is Paris`);
3. unless `anchored`: the last letter standing in brackets, `(B)`, or alone as a capital. `A` and `I` before a
   lower-case word are read as words.

Two letters in one place (`\\boxed{A, C}`, `the answer is A or B`) are no choice: `wrong`, so that hedging does not pay.
Of several boxes or announcements the last counts.

The reference is a letter (`B`, `(b)`, `B. Paris`) or, when `reference.choices` lists the choices, the text of one; then
the number of choices is theirs.

Outcomes: `correct`, `wrong`, `no_answer` (no letter; value 0), `unparsable` (the reference is no letter and no choice).
Caveat: guessing pays 1 / choices on average.
"""

import asyncio
import re
from string import ascii_uppercase
from typing import Annotated

from pydantic import Field

from reward_server.references import Fields, read
from reward_server.reward import Context, Params, Reward
from services.api import RewardGroup
from services.contract import Items, Outcome, Score

BOX = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]{0,400}\}){0,400})\}")
ANNOUNCED = re.compile(r"\b(?:answer|choice|option)\s{0,8}(?:is|:|=)[\s:]{0,8}(?=([^\n]{1,400}))", re.IGNORECASE)
"""What follows is only looked at, since it may hold the next announcement."""
WRAPPING = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{|\\[()\[\]]|[{}$*_`\"']")
ALSO = re.compile(r"\s*(?:or|and|,|/|&|\+)\s*(?:option\s+|choice\s+)?\(?([A-Za-z])(?![\w'])", re.IGNORECASE)


SENTENCE_END = re.compile(r"[.;!?](?:\s|$)")


class Choices(Fields):
    choices: Annotated[Items[str], Field(min_length=2, max_length=26)] | None = None


class MultipleChoiceParams(Params):
    choices: int = Field(4, ge=2, le=26, description="letters A, B, ... that count, unless the reference has `choices`")
    anchored: bool = Field(False, description="a letter counts only in a box or after words that announce it")
    tail_characters: int = Field(16384, ge=16, le=200_000, description="only the end of a completion is read")


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip(" .,;:!").casefold()


class Options:
    """The letters of one question and, where known, the texts they stand for."""

    def __init__(self, letters: str, texts: list[str] | None):
        self.letters = letters
        self.texts = [_plain(text) for text in texts or []]
        anything = "".join(f"{letter}{letter.lower()}" for letter in letters)
        self.leading = re.compile(rf"\s*(?:(?:option|choice)\s+)?[(\[]?\s*([{anything}])(?![\w'])", re.IGNORECASE)
        self.alone = re.compile(rf"[(\[]([{anything}])[)\]]|(?<![\w'\\])(?!(?:A|I) +[a-z])([{letters}])(?![\w'])")

    def named(self, said: str) -> set[str]:
        """The letters that a short phrase names: none, one, or, where it hedges, two."""
        said = WRAPPING.sub(" ", said)
        for part in (said, SENTENCE_END.split(said, maxsplit=1)[0]):
            if (plain := _plain(part)) and self.texts.count(plain) == 1:
                return {self.letters[self.texts.index(plain)]}
        found = self.leading.match(said)
        if found is None or (found[1] == "a" and re.match(r" +[a-z]", said[found.end() :])):
            return set()
        named, rest = {found[1].upper()}, said[found.end() :].lstrip(" )]")
        while (more := ALSO.match(rest)) and more[1].upper() in self.letters:
            named.add(more[1].upper())
            rest = rest[more.end() :].lstrip(" )]")
        return named

    def last(self, text: str) -> set[str]:
        last = None
        for last in self.alone.finditer(text):  # noqa: B007
            pass
        return {(last[1] or last[2]).upper()} if last else set()


def picked(text: str, options: Options, anchored: bool) -> set[str]:
    """The letters that a completion settles on."""
    for pattern in (BOX, ANNOUNCED):
        for said in reversed(pattern.findall(text)):
            if named := options.named(said):
                return named
    if anchored:
        return set()
    return options.named(text) if _plain(text) in options.texts else options.last(text)


def judge(text: str, gold: str, options: Options, params: MultipleChoiceParams) -> Score:
    found = picked(text[-params.tail_characters :], options, params.anchored)
    if not found:
        return Score.of(0.0, Outcome.no_answer)
    is_right = found == {gold}
    return Score.of(float(is_right), Outcome.correct if is_right else Outcome.wrong, ", ".join(sorted(found)))


async def score(group: RewardGroup, params: MultipleChoiceParams, context: Context) -> list[Score]:
    texts = read(Choices, group, context.field, "multiple_choice").choices
    options = Options(ascii_uppercase[: len(texts) if texts else params.choices], texts)
    reference = (group.task.reference.answer or "") if group.task.reference else ""
    gold = options.named(reference)
    if len(gold) != 1:
        detail = f"the reference answer {reference[:100]!r} is none of {', '.join(options.letters)}"
        failure = Score.failed(Outcome.unparsable, detail + (" nor a choice" if texts else ""))
        return [failure for _ in group.completions]
    (letter,) = gold
    return await asyncio.to_thread(lambda: [judge(item.text, letter, options, params) for item in group.completions])


REWARD = Reward(
    name="multiple_choice",
    description="1 when the completion picks the reference's letter (boxed, announced, or standing last), else 0.",
    needs=("reference.answer",),
    range=(0.0, 1.0),
    params=MultipleChoiceParams,
    score=score,
)
