"""`detectable_content:...` and `detectable_format:...`: parts that must be there, and the format of the whole."""

import re
from typing import Annotated

from pydantic import Field

from reward_server.ifeval.registry import instruction
from reward_server.json_text import decode

Count = Annotated[int, Field(ge=0)]
ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
POSTSCRIPTS = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}
FENCE = re.compile(r"```(?:json|Json|JSON)?")


@instruction("detectable_content:number_placeholders")
def number_placeholders(text: str, *, num_placeholders: Count) -> bool:
    """`[...]` on one line, at least so many."""
    # What follows a line's last bracket is cut off: without it, no search for a closing bracket is in vain.
    closed = (line[: line.rfind("]") + 1] for line in text.split("\n"))
    return sum(len(re.findall(r"\[.*?\]", line)) for line in closed) >= num_placeholders


@instruction("detectable_content:postscript")
def postscript(text: str, *, postscript_marker: Annotated[str, Field(min_length=1)]) -> bool:
    """Anywhere in the text; case, and a blank inside `P. S.`, are ignored."""
    pattern = POSTSCRIPTS.get(postscript_marker, re.escape(postscript_marker.lower()))
    return re.search(pattern, text.lower()) is not None


@instruction("detectable_format:number_bullet_lists")
def number_bullet_lists(text: str, *, num_bullets: Count) -> bool:
    """Lines that begin with `-`, or with one `*`: exactly so many."""
    lines = [line.lstrip() for line in text.split("\n")]
    return sum(bool(re.match(r"-|\*(?!\*|$)", line)) for line in lines) == num_bullets


@instruction("detectable_format:constrained_response")
def constrained_response(text: str) -> bool:
    return any(answer in text for answer in ANSWERS)


@instruction("detectable_format:number_highlighted_sections")
def number_highlighted_sections(text: str, *, num_highlights: Count) -> bool:
    """`*so*` or `**so**`, not blank, at least so many."""
    marked = re.findall(r"\*\*([^\n*]*)\*\*", text) + re.findall(r"\*([^\n*]*)\*", text)
    return sum(bool(part.strip()) for part in marked) >= num_highlights


@instruction("detectable_format:multiple_sections")
def multiple_sections(text: str, *, section_spliter: Annotated[str, Field(min_length=1)], num_sections: Count) -> bool:
    """At least so many marks such as `Section 1` (the argument's name is the data set's)."""
    return len(re.findall(re.escape(section_spliter) + r"\s?\d+", text)) >= num_sections


@instruction("detectable_format:json_format")
def json_format(text: str) -> bool:
    """The whole is JSON, fenced or not. Raises where the JSON cannot be read (see `decode`)."""
    text = text.strip()
    if fence := FENCE.match(text):
        text = text[fence.end() :]
    try:
        decode(text.removesuffix("```").strip())
    except ValueError:
        return False
    return True


@instruction("detectable_format:title")
def title(text: str) -> bool:
    """`<<so>>` on one line, not blank."""
    for line in text.split("\n"):
        start, end = line.find("<<"), line.rfind(">>")
        if end - start > 2 and start >= 0 and line[start:end].lstrip("<").rstrip(">").strip():
            return True
    return False
