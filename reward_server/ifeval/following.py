"""Which instructions a response follows: strictly, or in one of eight forms of it (loosely)."""

from typing import Any

from reward_server.ifeval.registry import instructions


def forms(response: str) -> list[str]:
    """The response; it without its first line, last line, or both; and these four without asterisks (arXiv 2311.07911,
    section 2.2): what remains when an introduction, a closing remark or markdown is taken off."""
    lines = response.split("\n")
    cut = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return cut + [form.replace("*", "") for form in cut]


def check(payload: dict[str, Any]) -> dict[str, Any]:
    """Runs inside a worker process: {"followed": [bool]}, one an instruction.

    The payload: "text", "ids", "arguments" (one dict an id, already validated), "loose". A blank form follows nothing.
    """
    known = instructions()
    texts = [text for text in (forms(payload["text"]) if payload["loose"] else [payload["text"]]) if text.strip()]
    pairs = zip(payload["ids"], payload["arguments"], strict=True)
    return {"followed": [any(known[name].follows(text, **given) for text in texts) for name, given in pairs]}
