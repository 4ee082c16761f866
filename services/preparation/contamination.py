"""Which training texts are evaluation texts, wholly or nearly.

A training text is contaminated by an evaluation text when the two have 13 words in a row in common (the n-gram of
GPT-3, arXiv 2005.14165, appendix C) and their longest common subsequence of words is at least 0.6 of the shorter one's
length (the second condition, and its 0.6, of the Qwen2.5 report, arXiv 2412.15115, section 5): problems share phrases
such as "where m and n are relatively prime positive integers, find m + n" without being the same. Texts of fewer than
13 words count when they are equal. Words are runs of letters and digits, in lower case.
"""

import re
from collections import defaultdict
from collections.abc import Iterable

GRAM = 13
SHARE = 0.6
WORD = re.compile(r"[^\W_]+")


def words(text: str) -> tuple[str, ...]:
    return tuple(WORD.findall(text.lower()))


def common(first: tuple[str, ...], second: tuple[str, ...]) -> int:
    """Length of the longest common subsequence, by the bit-parallel recurrence of Hyyrö (2004): bit i of `row` is 0
    where the table's row rises at the first text's word i."""
    places: dict[str, int] = defaultdict(int)
    for place, word in enumerate(first):
        places[word] |= 1 << place
    full = (1 << len(first)) - 1
    row = full
    for word in second:
        matching = row & places.get(word, 0)
        row = ((row + matching) | (row - matching)) & full
    return len(first) - row.bit_count()


class EvaluationTexts:
    def __init__(self, texts: Iterable[str]):
        self.texts = [words(text) for text in texts]
        self._whole = {text: place for place, text in enumerate(self.texts) if text}
        self._grams: dict[tuple[str, ...], set[int]] = defaultdict(set)
        for place, text in enumerate(self.texts):
            for gram in _grams(text):
                self._grams[gram].add(place)

    def contaminating(self, text: str) -> int | None:
        """The place of an evaluation text that contaminates this training text; none when none does."""
        said = words(text)
        if said in self._whole:
            return self._whole[said]
        near = {place for gram in _grams(said) for place in self._grams.get(gram, ())}
        for place in sorted(near):
            other = self.texts[place]
            if common(said, other) >= SHARE * min(len(said), len(other)):
                return place
        return None


def _grams(text: tuple[str, ...]) -> Iterable[tuple[str, ...]]:
    return (text[start : start + GRAM] for start in range(len(text) - GRAM + 1))
