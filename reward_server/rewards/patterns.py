"""Regular expressions over untrusted text: run in a worker process, since a match may take for ever."""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from reward_server.reward import Context
from reward_server.workers import Verdict

CHECK = "reward_server.rewards.patterns:check"
WARM_UP = (CHECK, {"pattern": "a", "text": "a", "how": "search"})


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except (re.error, OverflowError) as error:
        raise ValueError(f"not a regular expression: {error}") from error
    except RecursionError as error:
        raise ValueError("not a regular expression that can be used: its groups are nested too deeply") from error
    return pattern


Pattern = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_compiles)]


async def match(pattern: str, text: str, how: str, context: Context) -> Verdict:
    """`how`: `search`, `fullmatch`, or `last` (the last match in the text). `.` matches newlines too.

    The verdict's result: {"found": bool, "group": str | None}, group being the first group of the match, and of a match
    also "span": where it begins, and where its group does.
    """
    payload = {"pattern": pattern, "text": text, "how": how}
    return await context.workers.check(CHECK, payload, context.deadline, context.turn)


def check(payload: dict[str, Any]) -> dict[str, Any]:
    """Runs inside a worker process."""
    compiled, text, how = re.compile(payload["pattern"], re.DOTALL), payload["text"], payload["how"]
    if how == "last":
        found = None
        for found in compiled.finditer(text):  # noqa: B007
            pass
    else:
        found = compiled.fullmatch(text) if how == "fullmatch" else compiled.search(text)
    if found is None:
        return {"found": False, "group": None}
    group = 1 if compiled.groups else 0
    return {"found": True, "group": found.group(group), "span": [found.start(), found.start(group)]}
