"""`combination:...`, `startend:...` and `punctuation:...`: how the whole response is put together."""

from typing import Annotated

from pydantic import Field

from reward_server.ifeval.registry import instruction

Phrase = Annotated[str, Field(min_length=1)]


@instruction("combination:two_responses")
def two_responses(text: str) -> bool:
    """Two different ones, parted by `******`; nothing blank between two marks."""
    parts = [part.strip() for part in text.split("******")]
    given = [part for part in parts if part]
    return all(parts[1:-1]) and len(given) == 2 and given[0] != given[1]


@instruction("combination:repeat_prompt")
def repeat_prompt(text: str, *, prompt_to_repeat: Phrase) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


@instruction("startend:end_checker")
def end_checker(text: str, *, end_phrase: Phrase) -> bool:
    """Case, and quotation marks around the whole, are ignored."""
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


@instruction("startend:quotation")
def quotation(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


@instruction("punctuation:no_comma")
def no_comma(text: str) -> bool:
    return "," not in text
