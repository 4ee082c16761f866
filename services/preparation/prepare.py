"""A data set -> rows that train as they are, and an account of what became of every row.

The same source and settings give the same bytes: rows are put in the order of a hash of seed and task id.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import orjson
from pydantic import Field

from services import prompts, rows
from services.contract import Message, Task
from services.preparation import manifest, pass_rates
from services.preparation.contamination import EvaluationTexts
from services.preparation.known import Known, Unusable
from services.prompt_tokens import load_tokenizer, prompt_lengths
from services.recipe_sections import Data, Model
from services.rows import DataError, Row, Table
from services.section import Section
from services.tasks import STANDARD, fields_of, tasks

TEXTS = ("problem", "question", "prompt", "description", "text", "code")
"""Columns of an evaluation set that may hold its texts: the first that is there does."""
Range = tuple[float, float]


class Filters(Section):
    """What is left out; each leaves out nothing by default. Ranges hold both their ends."""

    rating: Range | None = None
    decontaminate: list[Path] = Field(default_factory=list)
    pass_rates: list[Path] = Field(default_factory=list)
    pass_rate_field: str = "pass_rate"
    keep: Range = (0.0, 1.0)
    tokenizer: str | None = None
    max_prompt_tokens: int | None = Field(None, ge=1)
    max_tests: int | None = Field(None, ge=1)
    limit: int | None = Field(None, ge=1)


@dataclass
class Prepared:
    """`rows` as they are written, in their order; `dropped` by reason."""

    rows: list[Row]
    read: int
    dropped: dict[str, int]


def prepare(data: Data, known: Known | None, filters: Filters, seed: int, prompt: str | None) -> Prepared:
    """Raises DataError."""
    dropped: Counter[str] = Counter()
    table = rows.table(data.path, data.config, data.split, data.revision)
    if filters.max_tests is not None and fields_of(data, table.columns).tests is None:
        raise DataError(f"--max-tests {filters.max_tests}: the rows of {data.path!r} have no tests; leave it out")
    found = tasks(table if known is None else _reshaped(table, known, filters.rating, dropped), data)
    if prompt is not None and any([message.role for message in task.messages or []] != ["user"] for task in found):
        raise DataError(f"--prompt {prompt}: is put around a text, and the rows of {data.path} have whole messages")
    read = len(found) + dropped.total()
    for name, keeps in _filters(filters, prompt, seed):
        kept = keeps(found)
        dropped[name] = len(found) - len(kept)
        found = kept
    found.sort(key=lambda task: hashlib.blake2b(f"{seed}.{task.task_id}".encode(), digest_size=16).digest())
    if filters.limit is not None:
        dropped["beyond_limit"] = max(0, len(found) - filters.limit)
        found = found[: filters.limit]
    if not found:
        raise DataError(f"{data.path}: no row is left of {read}: {_told(dropped)}")
    return Prepared(_written(found, filters.max_tests, prompt, seed), read, dict(sorted(dropped.items())))


def _told(dropped: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in dropped.items() if count) or "it holds none"


def _reshaped(table: Table, known: Known, rating: Range | None, dropped: Counter[str]) -> Table:
    columns = [*known.needs, *(name for name in known.takes if name in table.columns)]

    def read(_columns: list[str]) -> Iterator[tuple[str, Row]]:
        for where, row in table.read(columns):
            try:
                made = known.reshape(row)
            except Unusable as reason:
                dropped[str(reason)] += 1
                continue
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(f"{where}: is not of the shape of {known.path}: {error!r}") from error
            if rating is not None and not rating[0] <= (made["rating"] or -1) <= rating[1]:
                dropped["rating"] += 1
                continue
            yield where, made

    return Table(known.fields.columns, read)


# ---- filters ---------------------------------------------------------------------------------------------------

Filter = Callable[[list[Task]], list[Task]]


def _filters(filters: Filters, prompt: str | None, seed: int) -> Iterator[tuple[str, Filter]]:
    if filters.decontaminate:
        seen = EvaluationTexts(text for path in filters.decontaminate for text in evaluation_texts(path))
        yield "contaminated", lambda found: [task for task in found if seen.contaminating(_problem(task)) is None]
    if filters.pass_rates:
        rates = pass_rates.read(filters.pass_rates, filters.pass_rate_field)
        low, high = filters.keep
        yield "pass_rate_unknown", lambda found: [task for task in found if task.task_id in rates]
        yield "pass_rate", lambda found: [task for task in found if low <= rates[task.task_id] <= high]
    if filters.tokenizer is not None and filters.max_prompt_tokens is not None:
        most = filters.max_prompt_tokens
        tokenizer = load_tokenizer(Model(path=filters.tokenizer))

        def short(found: list[Task]) -> list[Task]:
            asked = [_asked(task, prompt, seed, tokenizer.chat_template is not None) for task in found]
            lengths = prompt_lengths(asked, tokenizer)
            return [task for task, size in zip(found, lengths, strict=True) if size <= most]

        yield "too_long", short


def evaluation_texts(path: Path) -> Iterator[str]:
    """Raises DataError: the file has no column of a known name."""
    table = rows.table(str(path))
    name = next((name for name in TEXTS if name in table.columns), None)
    if name is None:
        raise DataError(f"--decontaminate {path}: none of its columns is one of {', '.join(TEXTS)}")
    yield from (str(row[name]) for _, row in table.read([name]))


def _problem(task: Task) -> str:
    """What is asked, without a system message."""
    return "\n".join(message.content for message in task.messages or [] if message.role != "system")


def _messages(task: Task, prompt: str | None, seed: int) -> list[Message]:
    given = task.messages or []
    return given if prompt is None else prompts.named(prompt).messages(given[0].content, seed)


def _asked(task: Task, prompt: str | None, seed: int, chat: bool) -> Task:
    messages = _messages(task, prompt, seed)
    if chat:
        return task.model_copy(update={"messages": messages})
    return Task(task_id=task.task_id, prompt="\n\n".join(message.content for message in messages))


# ---- writing ---------------------------------------------------------------------------------------------------


def _written(found: list[Task], max_tests: int | None, prompt: str | None, seed: int) -> list[Row]:
    """Every row has the same columns, by the names that a recipe without `data.fields` reads."""
    made: list[Row] = []
    for task in found:
        messages = _messages(task, prompt, seed)
        row: Row = {"id": task.task_id, "source": task.source}
        if prompt is None and [message.role for message in messages] == ["user"]:
            row["prompt"] = messages[0].content
        else:
            row["messages"] = [message.model_dump() for message in messages]
        reference = task.reference.model_dump(exclude_none=True) if task.reference else {}
        if max_tests is not None and "tests" in reference:
            reference["tests"] = reference["tests"][:max_tests]
        made.append(row | reference)
    if any("messages" in row for row in made):
        for row in made:
            if "prompt" in row:
                row["messages"] = [{"role": "user", "content": row.pop("prompt")}]
    there = {name for row in made for name in row}
    columns = ["id", "source", *(name for name in STANDARD if name in there - {"id", "source"})]
    columns += sorted(there - set(columns))
    return [{name: row.get(name) for name in columns} for row in made]


def write(prepared: Prepared, out: Path, account: dict[str, Any]) -> dict[str, Any]:
    """Write the rows, and beside them the manifest, which is `account` with rows and checksum; returns it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f"{out.name}.part")
    with aside.open("wb") as file:
        file.writelines(orjson.dumps(row) + b"\n" for row in prepared.rows)
    made = {
        "tool": f"rlif {version('rlif')}",
        **account,
        "rows": {"in": prepared.read, "out": len(prepared.rows)},
        "dropped": prepared.dropped,
        "columns": list(prepared.rows[0]),
        "sha256": manifest.sha256(aside),
    }
    # A file whose manifest is not yet there is only unchecked; one with the manifest of another is refused.
    place = manifest.beside(out)
    place.unlink(missing_ok=True)
    aside.replace(out)
    place.write_bytes(orjson.dumps(made, option=orjson.OPT_INDENT_2) + b"\n")
    return made
