"""`keywords:...`: what must occur, how often, and what must not. Case is ignored."""

import re
from typing import Annotated

from pydantic import Field

from reward_server.ifeval.registry import Relation, holds, instruction
from services.contract import Items

Word = Annotated[str, Field(min_length=1)]


@instruction("keywords:existence")
def existence(text: str, *, keywords: Annotated[Items[Word], Field(min_length=1)]) -> bool:
    return all(re.search(re.escape(word), text, re.IGNORECASE) for word in keywords)


@instruction("keywords:frequency")
def frequency(text: str, *, keyword: Word, frequency: int, relation: Relation) -> bool:
    return holds(len(re.findall(re.escape(keyword), text, re.IGNORECASE)), relation, frequency)


@instruction("keywords:forbidden_words")
def forbidden_words(text: str, *, forbidden_words: Annotated[Items[Word], Field(min_length=1)]) -> bool:
    """As whole words: `rock` does not forbid `rocket`."""
    return not any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) for word in forbidden_words)


@instruction("keywords:letter_frequency")
def letter_frequency(
    text: str,
    *,
    letter: Annotated[str, Field(min_length=1, max_length=1)],
    let_frequency: int,
    let_relation: Relation,
) -> bool:
    """Any character may be the letter; the data set also counts `#` and `!`."""
    return holds(text.lower().count(letter.lower()), let_relation, let_frequency)
