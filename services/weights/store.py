"""Where the versions of a run lie: a folder that every machine sees, or a bucket of an object store that speaks S3.

A version is a set of files under the name `<lineage>-<version>`. In a folder it has that name once it is whole; in
a bucket, where nothing can be renamed, it is whole when its `manifest.json` is there, which is uploaded last. Addresses
and secrets of a bucket are taken from the environment alone, as AWS' own tools have them (AWS_ENDPOINT_URL, AWS_REGION,
AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, or a role of the machine or the pod).
"""

import importlib.util
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from services.contract import Version
from services.startup import StartupError

SCHEME = "s3://"
MANIFEST = "manifest.json"
NAME = re.compile(r"^(\d{1,15})-(\d{1,15})$")
READ_PATIENCE_SECONDS = 10.0
"""How long a follower outlasts a store that is away before it refuses the version, which is tried again later."""
PART = 2**24
"""Bytes of one request for a part of a file."""
AT_ONCE = 8
REQUEST_SECONDS = 120.0


class StoreError(OSError):
    """An object store that does not do what it was asked for; the message names it and says why."""


class ObjectMissing(StoreError, FileNotFoundError):
    """The store answered: there is no such object."""


class Store(Protocol):
    """`name` is of a version's files, `<lineage>-<version>`. Everything raises OSError."""

    def location(self, name: str) -> str:
        """What `store_of` takes."""

    def versions(self) -> list[tuple[Version, set[str]]]:
        """The versions there, whole or not, in their order, each with the names of its files."""

    def keep(self, draft: Path, name: str) -> None:
        """Store the files of the folder `draft`, which is gone then. When it returns they are durable."""

    def remove(self, name: str) -> None:
        """Whatever there is of a version."""

    def read(self, name: str, file: str) -> bytes: ...

    def sizes(self, name: str) -> dict[str, int]:
        """Bytes of each of a version's files; empty where there are none."""

    def fetch(self, name: str, into: Path) -> None:
        """Copy a version's files, without its manifest."""


def is_url(place: str | Path) -> bool:
    return str(place).startswith(SCHEME)


def require(place: str | Path) -> None:
    """Raises StartupError: versions lie in a bucket, and the client for it is not installed."""
    if is_url(place) and importlib.util.find_spec("obstore") is None:
        raise StartupError(f"weights.dir: {place} needs the package obstore; install rlif[s3]")


def store_at(place: str | Path, patience_seconds: float = READ_PATIENCE_SECONDS) -> Store:
    """`patience_seconds`: how long each request outlasts a store that is away. Raises StartupError (see `require`)."""
    require(place)
    return Bucket(str(place), patience_seconds) if is_url(place) else Folder(Path(place))


def store_of(location: str) -> tuple[Store, str]:
    """The store of a version, and its name there."""
    parent, _, name = location.rpartition("/")
    return store_at(parent), name


@contextmanager
def at_hand(location: str, parent: Path | None = None) -> Iterator[Path]:
    """A folder with a version's files: its own, or a copy under `parent` for as long as the context lasts."""
    if not is_url(location):
        yield Path(location)
        return
    store, name = store_of(location)
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        store.fetch(name, Path(folder))
        yield Path(folder)


class Folder:
    def __init__(self, directory: Path):
        self.directory = directory.resolve()

    def location(self, name: str) -> str:
        return str(self.directory / name)

    def versions(self) -> list[tuple[Version, set[str]]]:
        found = {}
        for folder in self.directory.iterdir() if self.directory.is_dir() else ():
            if NAME.match(folder.name):
                found[folder.name] = {file.name for file in folder.iterdir()}
        return _in_order(found)

    def keep(self, draft: Path, name: str) -> None:
        from services.weights.disk import sync

        sync(draft)
        draft.rename(self.directory / name)
        sync(self.directory)

    def remove(self, name: str) -> None:
        shutil.rmtree(self.directory / name, ignore_errors=True)

    def read(self, name: str, file: str) -> bytes:
        return (self.directory / name / file).read_bytes()

    def sizes(self, name: str) -> dict[str, int]:
        folder = self.directory / name
        return {file.name: file.stat().st_size for file in folder.iterdir()} if folder.is_dir() else {}

    def fetch(self, name: str, into: Path) -> None:
        for file in (self.directory / name).iterdir():
            if file.is_file() and file.name != MANIFEST:
                shutil.copyfile(file, into / file.name)


class Bucket:
    def __init__(self, url: str, patience_seconds: float):
        from obstore.store import S3Store

        self.url = url.rstrip("/")
        bucket, _, prefix = self.url.removeprefix(SCHEME).partition("/")
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
        self._store = S3Store(
            bucket,
            prefix=prefix or None,
            client_options={
                "allow_http": endpoint.startswith("http://"),
                "timeout": timedelta(seconds=REQUEST_SECONDS),
            },
            retry_config={
                "max_retries": 10**6,
                "retry_timeout": timedelta(seconds=patience_seconds),
                "backoff": {
                    "init_backoff": timedelta(seconds=0.1),
                    "max_backoff": timedelta(seconds=2),
                    "base": 2,
                },
            },
        )

    def location(self, name: str) -> str:
        return f"{self.url}/{name}"

    def versions(self) -> list[tuple[Version, set[str]]]:
        found: dict[str, set[str]] = {}
        for key, _ in self._listed(""):
            name, _, file = key.partition("/")
            if file and NAME.match(name):
                found.setdefault(name, set()).add(file)
        return _in_order(found)

    def keep(self, draft: Path, name: str) -> None:
        import obstore

        files = sorted(draft.iterdir(), key=lambda file: (file.name == MANIFEST, file.name))
        with self._errors(name):
            for file in files:
                obstore.put(self._store, f"{name}/{file.name}", file, chunk_size=PART)
        shutil.rmtree(draft)

    def remove(self, name: str) -> None:
        import obstore

        # The manifest first: what is left when this is cut short is no version any more.
        keys = sorted((key for key, _ in self._listed(name)), key=lambda key: not key.endswith(MANIFEST))
        with self._errors(name):
            for part in (keys[:1], keys[1:]):
                if part:
                    obstore.delete(self._store, part)

    def read(self, name: str, file: str) -> bytes:
        import obstore

        with self._errors(f"{name}/{file}"):
            return bytes(obstore.get(self._store, f"{name}/{file}").bytes())

    def sizes(self, name: str) -> dict[str, int]:
        return {key.removeprefix(f"{name}/"): size for key, size in self._listed(name)}

    def fetch(self, name: str, into: Path) -> None:
        """In parts, several at a time."""
        files = [(key, size) for key, size in self._listed(name) if key != f"{name}/{MANIFEST}"]
        if not files:
            raise StoreError(f"{self.location(name)}: there are no files")
        for key, _ in files:
            (into / Path(key).name).touch()
        parts = [(key, start, min(PART, size - start)) for key, size in files for start in range(0, size, PART)]
        with ThreadPoolExecutor(AT_ONCE) as threads:
            for _ in threads.map(lambda part: self._fetch_part(into, *part), parts):
                pass

    def _fetch_part(self, into: Path, key: str, start: int, length: int) -> None:
        import obstore

        with self._errors(key):
            content = memoryview(obstore.get_range(self._store, key, start=start, length=length))
        if len(content) != length:
            raise StoreError(f"{self.location(key)}: gave {len(content)} of {length} bytes from {start} on")
        with (into / Path(key).name).open("r+b") as file:
            file.seek(start)
            file.write(content)

    def _listed(self, name: str) -> list[tuple[str, int]]:
        """(key, bytes) of every object under a name."""
        import obstore

        with self._errors(name):
            batches: Any = obstore.list(self._store, prefix=name or None)
            return [(item["path"], item["size"]) for batch in batches for item in batch]

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        from obstore.exceptions import BaseError

        try:
            yield
        except (BaseError, FileNotFoundError) as error:
            reason = str(error).partition("\n\nDebug source")[0]
            kind = ObjectMissing if isinstance(error, FileNotFoundError) else StoreError
            raise kind(f"{self.location(key)}: {' '.join(reason.split())}") from error


def _in_order(found: dict[str, set[str]]) -> list[tuple[Version, set[str]]]:
    versions = []
    for name, files in found.items():
        lineage, _, version = name.partition("-")
        versions.append((Version(lineage=int(lineage), version=int(version)), files))
    return sorted(versions, key=lambda item: item[0])
