"""Records of a benchmark, from a local file or the hub, as items."""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from services.evaluation.benchmark import Benchmark, Hub, Item, Record
from services.startup import StartupError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Questions:
    """`source` says where the items are from, `sha256` is of the records that were read."""

    items: list[Item]
    source: str
    sha256: str


def _local(path: Path) -> list[Record]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise StartupError(f"{path}: {error.strerror}") from error
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise StartupError(f"{path} line {number}: not valid JSON: {error}") from error
        if not isinstance(record, dict):
            raise StartupError(f"{path} line {number}: a record is a JSON object")
        records.append(record)
    return records


def _hub(hub: Hub) -> list[Record]:
    try:
        import datasets
    except ImportError as error:
        raise StartupError("data sets of the hub need the package datasets (pip install 'rlif[data]')") from error
    try:
        if hub.files:
            files = [f"hf://datasets/{hub.path}/{name}" for name in hub.files]
            return list(datasets.load_dataset("json", data_files=files, split="train"))
        return list(datasets.load_dataset(hub.path, hub.config, split=hub.split))
    except Exception as error:  # whatever the hub client or Arrow raises, it is this data set that cannot be read
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise StartupError(f"data set {hub.path!r} of the hub cannot be read: {reason}") from error


def _records(file: str, hub: Hub, data: Path | None) -> tuple[list[Record], str]:
    if data is None:
        return _hub(hub), f"{hub.path} ({hub.split})"
    path = data / file
    if not path.is_file():
        raise StartupError(f"--data {data}: no {file}; without --data, {hub.path} is read from the hub")
    return _local(path), str(path)


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
    return Questions(list(items.values()), source, digest.hexdigest())


def _bytes(record: Record) -> bytes:
    def plain(value: Any) -> Any:
        return value.tolist() if hasattr(value, "tolist") else str(value)

    return orjson.dumps(record, default=plain, option=orjson.OPT_SORT_KEYS)
