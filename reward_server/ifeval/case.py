"""`language:...` and `change_case:...`: the language of the whole, and capitals."""

import re
from functools import cache
from typing import Annotated, Any

from pydantic import Field

from reward_server.ifeval.registry import Relation, holds, instruction

BETWEEN_WORDS = re.compile(r"[\s;:,@#$%&?!()\[\]{}<>\"\u201c\u201d\u2026]+|--+")


@cache
def _detector() -> Any:
    import langdetect

    langdetect.DetectorFactory.seed = 0  # it samples, and would otherwise not say the same twice
    return langdetect


def _is_in(text: str, language: str) -> bool:
    """As the published code has it, a text in which no language can be told (digits alone) passes."""
    detector = _detector()
    try:
        return detector.detect(text) == language
    except detector.LangDetectException:
        return True


@instruction("language:response_language")
def response_language(text: str, *, language: Annotated[str, Field(min_length=2, max_length=8)]) -> bool:
    return _is_in(text, language)


@instruction("change_case:english_capital")
def english_capital(text: str) -> bool:
    # langdetect takes every sixth English text in capitals for another language (50 of 300 GSM8K questions).
    return text.isupper() and _is_in(text.lower(), "en")


@instruction("change_case:english_lowercase")
def english_lowercase(text: str) -> bool:
    return text.islower() and _is_in(text, "en")


@instruction("change_case:capital_word_frequency")
def capital_word_frequency(
    text: str, *, capital_frequency: Annotated[int, Field(ge=0)], capital_relation: Relation
) -> bool:
    """Words without small letters; a hyphenated one is one word."""
    return holds(sum(word.isupper() for word in BETWEEN_WORDS.split(text)), capital_relation, capital_frequency)
