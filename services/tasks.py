"""Rows -> tasks, as the section `data` of a recipe says. Every row is checked before the first task is used: a fault is
named with file, row and field."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import orjson
from pydantic import ValidationError

from services import prompts, rows
from services.contract import Message, Reference, Task
from services.preparation import known, manifest
from services.recipe_sections import Data, Fields
from services.rows import DataError, Row, Table

STANDARD = ("prompt", "messages", "answer", "tests", "id", "source")
"""Columns that need no `data.fields` (as `rlif data prepare` writes them); any other is the reference's."""


def fields_of(data: Data, columns: list[str]) -> Fields:
    """As the recipe says, or else by the standard names. Raises DataError."""
    if data.fields is not None:
        return data.fields
    if ("prompt" in columns) == ("messages" in columns):
        has = ", ".join(map(repr, columns)) or "no columns"
        raise DataError(f"data.fields: say which column is what: {data.path!r} has {has}, not one of prompt, messages")
    named = {name: name for name in STANDARD if name in columns}
    return Fields(**named, reference={name: name for name in columns if name not in STANDARD})


def read(data: Data, chat: bool = True, seed: int = 0) -> list[Task]:
    """`tasks` of the rows that `data` names, which must be those that their manifest, if they have one, was written
    for. Raises DataError."""
    path = Path(data.path)
    if rows.is_file(data.path) and not path.is_file():
        raise DataError(f"data.path: there is no file {data.path!r}{known.how_to_make(path, data.source)}")
    manifest.check(data.path)
    return tasks(rows.table(data.path, data.config, data.split, data.revision), data, chat, seed)


def tasks(table: Table, data: Data, chat: bool = True, seed: int = 0) -> list[Task]:
    """Of the first `data.limit` rows, in their order. With `chat` tasks are `messages` (a text prompt becomes the
    user's turn), else the plain `prompt`, the system prompt above it. `seed` chooses among a prompt's templates.

    Raises DataError.
    """
    fields = fields_of(data, table.columns)
    if not chat and fields.messages is not None:
        raise DataError(
            "data.fields.messages: the model's tokenizer has no chat template; use a column of text: fields.prompt"
        )
    pattern = None if data.answer_pattern is None else re.compile(data.answer_pattern)

    def located() -> Iterator[tuple[str, Task]]:
        for where, row in islice(table.read(fields.columns), data.limit):
            try:
                yield where, _task(row, data, fields, pattern, chat, seed)
            except ValueError as error:
                raise DataError(f"{where}: {error}") from error

    found = _distinct(located(), fields.id)
    if not found:
        raise DataError(f"data.path: {data.path!r} holds no rows")
    return found


def _answer(value: Any, pattern: re.Pattern[str] | None) -> str | None:
    if value is None:
        return None
    text = value if isinstance(value, str) else str(value)
    if pattern is None:
        return text.strip()
    found = pattern.search(text)
    if found is None or found[1] is None:
        raise ValueError(f"data.answer_pattern {pattern.pattern!r} does not match {text[-120:]!r}")
    return found[1].strip()


def _tests(value: Any) -> list[dict[str, Any]] | None:
    """[{"input", "output"}, ...], which columnar formats may hand over as {"input": [...], "output": [...]}."""
    if isinstance(value, dict) and set(value) == {"input", "output"}:
        return [{"input": given, "output": due} for given, due in zip(value["input"], value["output"], strict=True)]
    return value


def _plain(value: Any) -> Any:
    """A value that can go on the wire as it is."""
    try:
        orjson.dumps(value)
        json.dumps(value, allow_nan=False, default=str)
    except TypeError as error:
        raise ValueError(str(error)) from error
    return value


def _messages(row: Row, data: Data, fields: Fields, seed: int) -> list[Message]:
    prompt = None if data.prompt is None else prompts.named(data.prompt)
    if fields.prompt is not None:
        text = row[fields.prompt]
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"is text (got {text!r:.80})")
        messages = [Message(role="user", content=text if prompt is None else prompt.user(text, seed))]
    else:
        assert fields.messages is not None
        given = row[fields.messages]
        if not isinstance(given, list) or not given:
            raise ValueError(f'is a list of {{"role", "content"}} (got {given!r:.80})')
        messages = [Message.model_validate(message) for message in given]
        if prompt is not None and prompt.templates:
            raise ValueError(f"holds whole messages: data.prompt {prompt.name!r} is put around a text")
    system = data.system_prompt if prompt is None else prompt.system
    if system is None:
        return messages
    if messages[0].role == "system":
        key = "system_prompt" if prompt is None else "prompt"
        raise ValueError(f"already starts with a system message: leave data.{key} out")
    return [Message(role="system", content=system), *messages]


def _task(row: Row, data: Data, fields: Fields, pattern: re.Pattern[str] | None, chat: bool, seed: int) -> Task:
    """Raises ValueError with a message that starts with the field's name."""
    name: str | None = fields.prompt or fields.messages
    try:
        messages = _messages(row, data, fields, seed)
        name = fields.answer
        answer = _answer(row[fields.answer], pattern) if fields.answer else None
        name = fields.tests
        tests = _tests(row[fields.tests]) if fields.tests else None
        further = {}
        for key, name in fields.reference.items():
            if row[name] is not None:
                further[key] = _plain(row[name])
        name = fields.tests
        reference = None
        if answer is not None or tests is not None or further:
            reference = Reference.model_validate({"answer": answer, "tests": tests, **further})
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        raise ValueError(f"field {name!r}: {'.'.join(map(str, fault['loc']))}: {fault['msg']}") from error
    except ValueError as error:
        raise ValueError(f"field {name!r}: {error}") from error
    if chat:
        prompt: dict[str, Any] = {"messages": messages}
    else:
        prompt = {"prompt": "\n\n".join(message.content for message in messages)}
    task_id = _given_id(row[fields.id], fields.id) if fields.id else _content_id(messages, reference)
    source = _given_source(row[fields.source], fields.source) if fields.source else data.source
    return Task(task_id=task_id, source=source, reference=reference, **prompt)


def _given_id(value: Any, name: str) -> str:
    if not isinstance(value, str | int) or isinstance(value, bool) or not 1 <= len(str(value)) <= 256:
        raise ValueError(f"field {name!r}: an id is a number or 1 to 256 characters (got {value!r:.80})")
    return str(value)


def _given_source(value: Any, name: str) -> str:
    if not isinstance(value, str) or not 1 <= len(value) <= 128:
        raise ValueError(f"field {name!r}: a source is 1 to 128 characters (got {value!r:.80})")
    return value


def _content_id(messages: list[Message], reference: Reference | None) -> str:
    content = [[m.role, m.content] for m in messages], reference.model_dump() if reference else None
    return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]


def _distinct(located: Iterable[tuple[str, Task]], id_column: str | None) -> list[Task]:
    """Refuses an id that occurs twice in the id column; rows of the same content are told apart by a number."""
    first_at: dict[str, str] = {}
    found = []
    for where, task in located:
        if task.task_id in first_at and id_column:
            raise DataError(f"{where}: field {id_column!r}: id {task.task_id!r} is taken by {first_at[task.task_id]}")
        copy, task_id = 1, task.task_id
        while task_id in first_at:
            copy += 1
            task_id = f"{task.task_id}-{copy}"
        first_at[task_id] = where
        found.append(task if copy == 1 else task.model_copy(update={"task_id": task_id}))
    return found
