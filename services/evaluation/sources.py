"""Records of a benchmark, from a local file or the hub, as items."""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from services import rows
from services.evaluation.benchmark import Benchmark, Hub, Item, Record
from services.startup import StartupError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Questions:
    """`source` says where the items are from, `sha256` is of the records that were read; `left_out` counts those that
    were not, beyond a limit."""

    items: list[Item]
    source: str
    sha256: str
    left_out: int


def _local(folder: Path, file: str) -> tuple[list[Record], str]:
    for path in (folder / file, (folder / file).with_suffix(".parquet")):
        if path.is_file():
            table = rows.table(str(path))
            return [row for _, row in table.read(table.columns)], str(path)
    raise StartupError(f"--data {folder}: no {file} (nor .parquet); without --data the hub is read")


def _hub(hub: Hub) -> list[Record]:
    """Raises DataError."""
    if not hub.files:
        table = rows.table(hub.path, hub.config, hub.split)
        return [row for _, row in table.read(table.columns)]
    import datasets

    files = [f"hf://datasets/{hub.path}/{name}" for name in hub.files]
    try:
        return list(datasets.load_dataset("json", data_files=files, split="train"))
    except Exception as error:  # whatever the hub client or Arrow raises, it is this data set that cannot be read
        raise rows.DataError(f"{hub.path!r} cannot be read from the hub: {error}") from error


def _records(file: str, hub: Hub, data: Path | None) -> tuple[list[Record], str]:
    """Raises StartupError."""
    if data is not None:
        return _local(data, file)
    try:
        return _hub(hub), f"{hub.path} ({hub.split})"
    except ImportError as error:
        raise StartupError("data sets of the hub need the package datasets (pip install 'rlif[data]')") from error
    except rows.DataError as error:
        raise StartupError(str(error).removeprefix("data.path: ")) from error


def load(benchmark: Benchmark, data: Path | None, limit: int | None) -> Questions:
    """The first `limit` items. Raises StartupError naming file, record and what is wrong with it."""
    records, source = _records(benchmark.file, benchmark.hub, data)
    examples: list[Record] = []
    if benchmark.examples:
        examples, _ = _records(*benchmark.examples, data)
    items: dict[str, Item] = {}
    digest = hashlib.sha256()
    for number, record in enumerate(records[:limit], 1):
        try:
            item = benchmark.read(record, examples)
            item.judged_by()
        except (KeyError, TypeError, ValueError) as error:
            fault = f"no field {error}" if isinstance(error, KeyError) else str(error)
            raise StartupError(f"{source}, record {number}: not a record of {benchmark.name}: {fault}") from error
        digest.update(_bytes(record))
        if item.id in items:
            log.warning("%s, record %d repeats record %r: it counts once", source, number, item.id)
        items.setdefault(item.id, item)
    if not items:
        raise StartupError(f"{source}: no records")
    return Questions(list(items.values()), source, digest.hexdigest(), len(records[limit or len(records) :]))


def _bytes(record: Record) -> bytes:
    def plain(value: Any) -> Any:
        return value.tolist() if hasattr(value, "tolist") else str(value)

    return orjson.dumps(record, default=plain, option=orjson.OPT_SORT_KEYS)
