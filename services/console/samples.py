"""The last scored groups: one line of each, to be filtered, sorted and paged, and each whole."""

import asyncio
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from services import codec
from services.contract import ScoredGroup, Task
from services.keys import Keys
from services.orchestrator.progress import made_by
from services.redis import insist

BATCH = 50
PAGE = 25
ENTRY = re.compile(r"[0-9]{1,18}-[0-9]{1,18}")
"""Ids of entries of a stream."""
PATIENCE_SECONDS = 5.0
PROMPT_SHOWN = 160
"""Characters of a prompt in the list."""
SORTS = {
    "newest": "Newest first",
    "oldest": "Oldest first",
    "reward": "Highest reward",
    "lowest": "Lowest reward",
    "spread": "Widest advantages",
    "longest": "Longest",
}


@dataclass(frozen=True)
class Line:
    """One group in the list. `reward`: mean over the completions that have one, none where none has. `spread`: from the
    lowest advantage to the highest. `outcomes`: how many scores of any component had which. `at`: Unix seconds."""

    entry_id: str
    group_id: str
    index: int
    source: str
    prompt: str
    size: int
    reward: float | None
    spread: float
    outcomes: Mapping[str, int]
    length: float
    version: str
    scored_by: str
    skipped: str
    at: float


@dataclass(frozen=True)
class Choice:
    """What to list. Empty text filters nothing; `reward_from` and `reward_to` leave out groups without a reward."""

    source: str = ""
    outcome: str = ""
    version: str = ""
    reward_from: float | None = None
    reward_to: float | None = None
    sort: str = "newest"
    page: int = 1

    @classmethod
    def of(cls, given: Mapping[str, str]) -> "Choice":
        """From a query; what cannot be read filters nothing."""
        page = given.get("page", "1")
        return cls(
            source=given.get("source", "")[:128],
            outcome=given.get("outcome", "")[:32],
            version=given.get("version", "").strip()[:40],
            reward_from=_finite(given.get("from", "")),
            reward_to=_finite(given.get("to", "")),
            sort=given["sort"] if given.get("sort") in SORTS else "newest",
            page=max(1, int(page)) if page.isdecimal() and len(page) < 8 else 1,
        )

    def takes(self, line: Line) -> bool:
        if self.source and line.source != self.source:
            return False
        if self.outcome and not line.outcomes.get(self.outcome):
            return False
        if self.version and self.version not in (line.version, line.version.split(".")[-1]):
            return False
        low, high = self.reward_from, self.reward_to
        if low is None and high is None:
            return True
        if line.reward is None:
            return False
        return (low is None or line.reward >= low) and (high is None or line.reward <= high)


@dataclass(frozen=True)
class Page:
    """`lines` of the `count` that the choice takes, of `kept` in all."""

    lines: list[Line]
    count: int
    kept: int
    page: int
    pages: int
    sources: list[str]
    outcomes: list[str]


class Samples:
    """The groups that the orchestrator keeps for people to look at, by entry id."""

    def __init__(self, redis: Any, run_id: str):
        self.redis, self.run_id, self.key = redis, run_id, Keys(run_id).samples
        self.lines: dict[str, Line] = {}
        self._seen = "-"
        self._reading = asyncio.Lock()

    async def refresh(self) -> None:
        """Read what is new, and forget what is not kept any more. Raises DeadlineExceeded."""
        async with self._reading:
            while True:
                found = await self._range(self._seen, "+", BATCH)
                self.lines |= await asyncio.to_thread(_lines, found)
                if found:
                    self._seen = f"({found[-1][0].decode()}"
                if len(found) < BATCH:
                    break
            first = await self._range("-", "+", 1)
            oldest = _place(first[0][0].decode()) if first else None
            kept = {place: line for place, line in self.lines.items() if oldest and _place(place) >= oldest}
            self.lines = kept

    async def page(self, choice: Choice) -> Page:
        await self.refresh()
        taken = _sorted([line for line in self.lines.values() if choice.takes(line)], choice.sort)
        pages = max(1, math.ceil(len(taken) / PAGE))
        page = min(choice.page, pages)
        return Page(
            lines=taken[(page - 1) * PAGE : page * PAGE],
            count=len(taken),
            kept=len(self.lines),
            page=page,
            pages=pages,
            sources=sorted({line.source for line in self.lines.values()}),
            outcomes=sorted({name for line in self.lines.values() for name in line.outcomes}),
        )

    async def group(self, entry_id: str) -> ScoredGroup | None:
        """None: it is not kept (any more)."""
        if not ENTRY.fullmatch(entry_id):
            return None
        found = await self._range(entry_id, entry_id, 1)
        return await asyncio.to_thread(_unpacked, found[0][1]) if found else None

    async def last(self, count: int) -> list[ScoredGroup]:
        """The newest groups, newest first."""
        found = await insist(
            lambda: self.redis.xrevrange(self.key, "+", "-", count), f"run {self.run_id}: its samples", PATIENCE_SECONDS
        )
        groups = await asyncio.to_thread(lambda: [_unpacked(fields) for _, fields in found])
        return [group for group in groups if group is not None]

    async def _range(self, start: str, end: str, count: int) -> list[Any]:
        return await insist(
            lambda: self.redis.xrange(self.key, start, end, count), f"run {self.run_id}: its samples", PATIENCE_SECONDS
        )


def _place(entry_id: str) -> tuple[int, int]:
    milliseconds, _, number = entry_id.partition("-")
    return int(milliseconds), int(number)


def _unpacked(fields: Mapping[bytes, bytes]) -> ScoredGroup | None:
    try:
        return codec.unpack_as(ScoredGroup, fields[b"group"])
    except (ValueError, KeyError):  # of another version of rlif
        return None


def _lines(entries: Iterable[Any]) -> dict[str, Line]:
    found = {}
    for entry_id, fields in entries:
        group = _unpacked(fields)
        if group is not None:
            place = entry_id.decode()
            found[place] = line_of(place, group)
    return found


def line_of(entry_id: str, group: ScoredGroup) -> Line:
    rewards = [score.reward for score in group.scores if score.reward is not None]
    advantages = [score.advantage for score in group.scores if score.valid]
    outcomes = Counter(str(part.outcome) for score in group.scores for part in score.components.values())
    return Line(
        entry_id=entry_id,
        group_id=group.group_id,
        index=group.index,
        source=group.task.source,
        prompt=prompt_of(group.task)[-PROMPT_SHOWN:],
        size=len(group.completions),
        reward=math.fsum(rewards) / len(rewards) if rewards else None,
        spread=max(advantages) - min(advantages) if advantages else 0.0,
        outcomes=dict(sorted(outcomes.items())),
        length=sum(len(made.token_ids) for made in group.completions) / len(group.completions),
        version=str(made_by(group)),
        scored_by=str(group.scorer_weight_version) if group.scorer_weight_version else "\u2013",
        skipped=group.skipped,
        at=int(entry_id.partition("-")[0]) / 1e3,
    )


def prompt_of(task: Task) -> str:
    """The text, or the last message of a chat."""
    return task.prompt if task.prompt is not None else task.messages[-1].content if task.messages else ""


def _sorted(lines: list[Line], sort: str) -> list[Line]:
    if sort == "oldest":
        return lines
    if sort == "newest":
        return lines[::-1]
    if sort in ("reward", "lowest"):
        sign = -1 if sort == "reward" else 1
        return sorted(lines, key=lambda line: (line.reward is None, sign * (line.reward or 0.0)))
    return sorted(lines, key=lambda line: -(line.spread if sort == "spread" else line.length))


def _finite(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
