"""The run's tasks, in an order that is a pure function of the recipe: index -> task, so that resuming needs no state.

Rows come from a JSONL or Parquet file, a folder that `datasets` saved, or a data set on the Hugging Face hub. Every
row is read and checked before the first is used: a fault is named with file, row and field.
"""

import hashlib
import json
import logging
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from pydantic import ValidationError

from services import prompts
from services.contract import Message, Reference, Task, group_id
from services.recipe import Data, Recipe
from services.startup import StartupError

log = logging.getLogger(__name__)

FILES = {".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".pq": "parquet"}
COUNT_BATCH = 1024


class DataError(StartupError):
    """The data cannot be used as the recipe says; the message names the file, the row and the field."""


# ---- rows ------------------------------------------------------------------------------------------------------


def _jsonl(path: Path, columns: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            try:
                row = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise DataError(f"{where}: not valid JSON: {error}") from error
            if not isinstance(row, dict):
                raise DataError(f"{where}: a row is a JSON object (got {line.strip()[:60].decode(errors='replace')!r})")
            for name in columns:
                if name not in row:
                    raise DataError(f"{where}: no field {name!r}; it has {', '.join(map(repr, row))}")
            yield where, row


def _check_columns(where: str, columns: list[str], present: Sequence[str]) -> None:
    for name in columns:
        if name not in present:
            raise DataError(f"{where}: no column {name!r}; it has {', '.join(map(repr, present))}")


def _parquet(path: Path, columns: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a Parquet file: {error}") from error
    with file:
        _check_columns(str(path), columns, file.schema_arrow.names)
        number = 0
        for batch in file.iter_batches(columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", row


def _dataset(data: Data, columns: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets

    local = Path(data.path).is_dir()
    try:
        if local:
            loaded = datasets.load_from_disk(data.path)
        else:
            loaded = datasets.load_dataset(data.path, data.config, split=data.split, revision=data.revision)
    except Exception as error:  # whatever the hub client or Arrow raises, it is this path that cannot be read
        what = "a folder that `datasets` saved" if local else "a data set of the Hugging Face hub, nor a file or folder"
        reason = str(error).strip() or type(error).__name__
        raise DataError(f"data.path: {data.path!r} is not {what}: {reason}") from error
    if isinstance(loaded, dict):
        if data.split not in loaded:
            raise DataError(f"data.split: {data.path!r} has no split {data.split!r}; it has {', '.join(loaded)}")
        loaded = loaded[data.split]
    _check_columns(data.path, columns, loaded.column_names)
    for number, row in enumerate(loaded.select_columns(columns), 1):
        yield f"{data.path} row {number}", row


def _rows(data: Data) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) with at least the columns the recipe names. Raises DataError."""
    columns = data.fields.columns
    path = Path(data.path)
    kind = FILES.get(path.suffix)
    if kind and not path.is_file():
        raise DataError(f"data.path: there is no file {data.path!r}")
    if kind == "jsonl":
        return _jsonl(path, columns)
    if kind == "parquet":
        return _parquet(path, columns)
    if path.is_file():
        raise DataError(f"data.path: {data.path!r}: a file must end in {', '.join(FILES)}")
    return _dataset(data, columns)


# ---- row -> task -----------------------------------------------------------------------------------------------


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


def _messages(row: dict[str, Any], data: Data, seed: int) -> list[Message]:
    prompt = None if data.prompt is None else prompts.named(data.prompt)
    if data.fields.prompt is not None:
        text = row[data.fields.prompt]
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"is text (got {text!r:.80})")
        messages = [Message(role="user", content=text if prompt is None else prompt.user(text, seed))]
    else:
        assert data.fields.messages is not None
        given = row[data.fields.messages]
        if not isinstance(given, list) or not given:
            raise ValueError(f'is a list of {{"role", "content"}} (got {given!r:.80})')
        messages = [Message.model_validate(message) for message in given]
    system = data.system_prompt if prompt is None else prompt.system
    if system is None:
        return messages
    if messages[0].role == "system":
        key = "system_prompt" if prompt is None else "prompt"
        raise ValueError(f"already starts with a system message: leave data.{key} out")
    return [Message(role="system", content=system), *messages]


def _task(row: dict[str, Any], data: Data, pattern: re.Pattern[str] | None, chat: bool, seed: int) -> Task:
    """Raises ValueError with a message that starts with the field's name."""
    fields = data.fields
    name: str | None = fields.prompt or fields.messages
    try:
        messages = _messages(row, data, seed)
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
    return Task(task_id=task_id, source=data.source, reference=reference, **prompt)


def _given_id(value: Any, name: str) -> str:
    if not isinstance(value, str | int) or isinstance(value, bool) or not 1 <= len(str(value)) <= 256:
        raise ValueError(f"field {name!r}: an id is a number or 1 to 256 characters (got {value!r:.80})")
    return str(value)


def _content_id(messages: list[Message], reference: Reference | None) -> str:
    content = [[m.role, m.content] for m in messages], reference.model_dump() if reference else None
    return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]


def _distinct(located: Iterable[tuple[str, Task]], data: Data) -> list[Task]:
    """Refuses an id that occurs twice in the id column; rows of the same content are told apart by a number."""
    first_at: dict[str, str] = {}
    tasks = []
    for where, task in located:
        if task.task_id in first_at and data.fields.id:
            raise DataError(
                f"{where}: field {data.fields.id!r}: id {task.task_id!r} is taken by {first_at[task.task_id]}"
            )
        copy, task_id = 1, task.task_id
        while task_id in first_at:
            copy += 1
            task_id = f"{task.task_id}-{copy}"
        first_at[task_id] = where
        tasks.append(task if copy == 1 else task.model_copy(update={"task_id": task_id}))
    return tasks


# ---- the model's own view of a prompt --------------------------------------------------------------------------


def load_tokenizer(recipe: Recipe) -> Any:
    """The model's tokenizer. Raises DataError naming `model.path`."""
    from transformers import AutoTokenizer

    model = recipe.model
    try:
        return AutoTokenizer.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise DataError(f"model.path: no tokenizer for {model.path!r}: {str(error).splitlines()[0]}") from error


def prompt_lengths(tasks: Sequence[Task], tokenizer: Any) -> Iterator[int]:
    """Tokens of each prompt as the rollout server will feed it (chat template, opened for the assistant's turn)."""
    for start in range(0, len(tasks), COUNT_BATCH):
        batch = tasks[start : start + COUNT_BATCH]
        if batch[0].messages is None:
            ids = tokenizer([task.prompt for task in batch])["input_ids"]
        else:
            chats = [[message.model_dump() for message in task.messages or []] for task in batch]
            text = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
            # The template writes the special tokens itself.
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        yield from map(len, ids)


# ---- the source ------------------------------------------------------------------------------------------------


def _rank(seed: int, epoch: int, number: int) -> bytes:
    return hashlib.blake2b(f"{seed}.{epoch}.{number}".encode(), digest_size=8).digest()


@dataclass
class TaskSource:
    """Tasks by index: epoch `index // len(tasks)`, each epoch in an order of its own that depends on the seed alone.

    The order comes from sorting hashes, so that no library's random number generator can change it.
    """

    tasks: list[Task]
    run_id: str
    seed: int = 0
    shuffle: bool = True
    _orders: dict[int, list[int]] = field(default_factory=dict, repr=False)

    def order(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(len(self.tasks)))
        if epoch not in self._orders:
            while len(self._orders) > 2:
                del self._orders[min(self._orders)]
            numbers = range(len(self.tasks))
            self._orders[epoch] = sorted(numbers, key=lambda number: _rank(self.seed, epoch, number))
        return self._orders[epoch]

    def task(self, index: int) -> Task:
        epoch, place = divmod(index, len(self.tasks))
        return self.tasks[self.order(epoch)[place]]

    def group_id(self, index: int) -> str:
        return group_id(self.run_id, index // len(self.tasks), self.task(index).task_id)


def load(recipe: Recipe, tokenizer: Any = None, data: Data | None = None) -> TaskSource:
    """Read, check and filter `data` (`limit` rows of it), the recipe's own by default.

    With a chat template in the tokenizer, tasks are `messages` (a text prompt becomes the user's turn); without one
    they are the plain `prompt`, the system prompt above it. Prompts longer than `data.max_prompt_tokens` are dropped.
    Raises DataError.
    """
    data = data or recipe.data
    started = time.monotonic()
    pattern = None if data.answer_pattern is None else re.compile(data.answer_pattern)
    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(recipe)
    chat = tokenizer.chat_template is not None
    if not chat and data.fields.messages is not None:
        raise DataError(
            f"data.fields.messages: the tokenizer of {recipe.model.path!r} has no chat template; use `prompt`"
        )

    def located() -> Iterator[tuple[str, Task]]:
        for number, (where, row) in enumerate(_rows(data)):
            if data.limit is not None and number >= data.limit:
                return
            try:
                yield where, _task(row, data, pattern, chat, recipe.run.seed)
            except ValueError as error:
                raise DataError(f"{where}: {error}") from error

    tasks = _distinct(located(), data)
    if not tasks:
        raise DataError(f"data.path: {data.path!r} holds no rows")
    kept = [
        task
        for task, length in zip(tasks, prompt_lengths(tasks, tokenizer), strict=True)
        if length <= data.max_prompt_tokens
    ]
    if not kept:
        raise DataError(
            f"data.max_prompt_tokens: every one of the {len(tasks)} prompts of {data.path!r} is longer than "
            f"{data.max_prompt_tokens} tokens"
        )
    if len(kept) < len(tasks):
        log.warning("dropped %d prompts of more than %d tokens", len(tasks) - len(kept), data.max_prompt_tokens)
    style = "as chat messages" if chat else "as plain text (the tokenizer has no chat template)"
    log.info("%d tasks from %s, %s, in %.1f s", len(kept), data.path, style, time.monotonic() - started)
    return TaskSource(kept, recipe.run.name, recipe.run.seed, data.shuffle)
