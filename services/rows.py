"""Rows of a data set, each with the place it is from: of a JSONL or Parquet file, a folder that `datasets` saved, or a
data set on the Hugging Face hub."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from services.startup import StartupError

FILES = {".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".pq": "parquet"}
Row = dict[str, Any]


class DataError(StartupError):
    """The data cannot be used as it should be; the message names the file, the row and the field."""


@dataclass(frozen=True)
class Table:
    """`columns` are all there are (JSONL: those of the first row); `read` gives (where, row) with at least the columns
    that it is asked for. Raises DataError."""

    columns: list[str]
    read: Callable[[list[str]], Iterator[tuple[str, Row]]]


def is_file(path: str) -> bool:
    """Whether `path` means a file, be it there or not, and neither a folder nor a name on the hub."""
    return Path(path).suffix in FILES or Path(path).is_file()


def is_local(path: str) -> bool:
    """Whether `path` means a file or a folder, be it there or not, and no name on the hub."""
    looks_so = Path(path).is_absolute() or path.startswith((".", "~")) or path.count("/") > 1
    return looks_so or is_file(path) or Path(path).is_dir()


def table(path: str, config: str | None = None, split: str = "train", revision: str | None = None) -> Table:
    """Raises DataError, which begins with `data.path` or `data.split`: there is no such thing."""
    if not is_file(path):
        if is_local(path) and not Path(path).is_dir():
            raise DataError(f"data.path: there is no file or folder {path!r}")
        return _dataset(path, config, split, revision)
    kind = FILES.get(Path(path).suffix)
    if kind is None:
        raise DataError(f"data.path: {path!r}: a file must end in {', '.join(FILES)}")
    if not Path(path).is_file():
        raise DataError(f"data.path: there is no file {path!r}")
    return _jsonl(Path(path)) if kind == "jsonl" else _parquet(Path(path))


def check_columns(where: str, columns: list[str], present: Sequence[str], kind: str = "column") -> None:
    for name in columns:
        if name not in present:
            raise DataError(f"{where}: no {kind} {name!r}; it has {', '.join(map(repr, present))}")


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"data.path: {str(path)!r} cannot be read: {error.strerror}") from error


def _lines(path: Path) -> Iterator[tuple[str, Row]]:
    with _opened(path) as lines:
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
            yield where, row


def _jsonl(path: Path) -> Table:
    def read(columns: list[str]) -> Iterator[tuple[str, Row]]:
        for where, row in _lines(path):
            check_columns(where, columns, list(row), "field")
            yield where, row

    _, first = next(_lines(path), ("", {}))
    return Table(list(first), read)


def _parquet(path: Path) -> Table:
    import pyarrow
    from pyarrow import parquet

    def opened() -> parquet.ParquetFile:
        try:
            return parquet.ParquetFile(path)
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise DataError(f"{path}: not a Parquet file: {error}") from error

    def read(columns: list[str]) -> Iterator[tuple[str, Row]]:
        with opened() as file:
            check_columns(str(path), columns, file.schema_arrow.names)
            number = 0
            for batch in file.iter_batches(columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row

    with opened() as file:
        return Table(list(file.schema_arrow.names), read)


def _dataset(path: str, config: str | None, split: str, revision: str | None) -> Table:
    import datasets

    local = Path(path).is_dir()
    try:
        if local:
            loaded = datasets.load_from_disk(path)
        else:
            loaded = datasets.load_dataset(path, config, split=split, revision=revision)
    except Exception as error:  # whatever the hub client or Arrow raises, it is this path that cannot be read
        what = "a folder that `datasets` saved" if local else "a data set of the Hugging Face hub, nor a file or folder"
        reason = str(error).strip() or type(error).__name__
        raise DataError(f"data.path: {path!r} is not {what}: {reason}") from error
    if isinstance(loaded, dict):
        if split not in loaded:
            raise DataError(f"data.split: {path!r} has no split {split!r}; it has {', '.join(loaded)}")
        loaded = loaded[split]

    def read(columns: list[str]) -> Iterator[tuple[str, Row]]:
        check_columns(path, columns, loaded.column_names)
        for number, row in enumerate(loaded.select_columns(columns), 1):
            yield f"{path} row {number}", row

    return Table(list(loaded.column_names), read)
