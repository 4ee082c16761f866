"""The steps that a run trained, kept up to date from its stream in Redis."""

import asyncio
from typing import Any

import orjson

from services.keys import Keys
from services.redis import insist
from services.steps import keep

BATCH = 5000
PATIENCE_SECONDS = 2.0
Row = dict[str, Any]


class History:
    """`rows` are the surviving steps' numbers, by step; `times` when each was told (Unix seconds of redis' clock);
    `fields` the names that any step had a number of. `undone` counts how often a part of the steps was lost to a
    restart or a roll-back."""

    def __init__(self, redis: Any, run_id: str):
        self.redis, self.run_id = redis, run_id
        self.rows: dict[int, Row] = {}
        self.times: dict[int, float] = {}
        self.fields: set[str] = set()
        self.undone = 0
        self._seen = "-"

    async def refresh(self) -> None:
        """Read what is new. Raises DeadlineExceeded."""
        while True:
            found = await insist(self._read, f"run {self.run_id}: read its steps", PATIENCE_SECONDS)
            rows = await asyncio.to_thread(_rows, found)
            # Not in the thread: pages read what changes here, all of it between two of their awaits.
            self._take(found, rows)
            if len(found) < BATCH:
                return

    async def _read(self) -> list[Any]:
        return await self.redis.xrange(Keys(self.run_id).steps, self._seen, "+", BATCH)

    def _take(self, entries: list[Any], rows: list[Row]) -> None:
        for (entry_id, _), row in zip(entries, rows, strict=True):
            self.undone += keep(self.rows, row)
            self.fields |= {name for name, value in row.items() if value is not None}
            self.times[row["step"]] = int(entry_id.split(b"-")[0]) / 1e3
            self._seen = f"({entry_id.decode()}"

    @property
    def last(self) -> Row | None:
        return self.rows[max(self.rows)] if self.rows else None

    def pace(self, over: int = 20) -> float | None:
        """Seconds a step, over the last so many; none before there are two."""
        steps = sorted(self.rows)[-over - 1 :]
        if len(steps) < 2:
            return None
        return (self.times[steps[-1]] - self.times[steps[0]]) / (steps[-1] - steps[0])


def _rows(entries: list[Any]) -> list[Row]:
    return [orjson.loads(fields[b"line"]) for _, fields in entries]
