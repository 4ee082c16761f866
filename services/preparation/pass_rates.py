"""How often each task was solved earlier: the ground of the difficulty filter."""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from services import rows
from services.rows import DataError

IDS = ("id", "task_id")


def read(paths: Iterable[Path], value: str) -> dict[str, float]:
    """The mean of column `value` (0 to 1; true and false are 1 and 0) over all lines of a task, by the task's id in the
    column `id` or `task_id`. A line without a value says nothing. Raises DataError."""
    given: dict[str, list[float]] = defaultdict(list)
    for path in paths:
        table = rows.table(str(path))
        name = next((name for name in IDS if name in table.columns), None)
        if name is None:
            raise DataError(f"{path}: has neither a field 'id' nor 'task_id' that says which task a row is about")
        for where, row in table.read([name, value]):
            found = row[value]
            if found is None:
                continue
            if not isinstance(found, int | float) or not 0 <= found <= 1:
                raise DataError(f"{where}: field {value!r}: a rate is a number from 0 to 1 (got {found!r:.80})")
            given[str(row[name])].append(float(found))
    return {task: sum(rates) / len(rates) for task, rates in given.items()}
