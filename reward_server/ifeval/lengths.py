"""`length_constraints:...`: sentences, words and paragraphs."""

import re
from functools import cache
from typing import Annotated, Any

from pydantic import Field

from reward_server.ifeval.registry import Relation, holds, instruction

Count = Annotated[int, Field(ge=0)]


@cache
def _sentences() -> Any:
    """Punkt (Kiss and Strunk 2006) with its English model, which the published code uses, too."""
    import punkt

    return punkt.tokenizer_for("english")


@instruction("length_constraints:number_sentences")
def number_sentences(text: str, *, num_sentences: Count, relation: Relation) -> bool:
    return holds(len(_sentences().tokenize(text)), relation, num_sentences)


@instruction("length_constraints:number_words")
def number_words(text: str, *, num_words: Count, relation: Relation) -> bool:
    """Runs of letters, digits and underscores: `it's` is two."""
    return holds(len(re.findall(r"\w+", text)), relation, num_words)


@instruction("length_constraints:number_paragraphs")
def number_paragraphs(text: str, *, num_paragraphs: Count) -> bool:
    """Paragraphs parted by `***`. A blank one at either end is not counted; one in the middle is a fault."""
    parts = [part.strip() for part in text.split("***")]
    inner = parts[1:-1]
    return all(inner) and sum(map(bool, parts)) == num_paragraphs


@instruction("length_constraints:nth_paragraph_first_word")
def nth_paragraph_first_word(
    text: str, *, num_paragraphs: Count, nth_paragraph: Annotated[int, Field(ge=1)], first_word: str
) -> bool:
    """Paragraphs parted by a blank line; the word ends at a blank or at one of . , ? ! ' \" and case is ignored."""
    paragraphs = [part.strip() for part in text.split("\n\n") if part.strip()]
    if len(paragraphs) != num_paragraphs or nth_paragraph > num_paragraphs:
        return False
    word = paragraphs[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    return re.split(r"[.,?!'\"]", word)[0].lower() == first_word.lower()
