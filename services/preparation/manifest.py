"""What a prepared file is made of, beside it: its source, its rows, every filter's count, and its checksum."""

import hashlib
import json
from pathlib import Path
from typing import Any

from services.rows import DataError


def beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.manifest.json")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(path: str) -> dict[str, Any] | None:
    """The manifest of a file; none when it has none. Raises DataError: it cannot be read."""
    place = beside(Path(path))
    if not place.is_file():
        return None
    try:
        found = json.loads(place.read_text())
        return {**found, "rows": dict(found["rows"]), "sha256": str(found["sha256"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"data.path: {place} is no manifest of `rlif data prepare`: {error!r}") from error


def check(path: str) -> None:
    """Raises DataError when the file is not the one that its manifest, if it has one, was written for."""
    found = read(path)
    if found is None or not Path(path).is_file():
        return
    try:
        checksum = sha256(Path(path))
    except OSError as error:
        raise DataError(f"data.path: {path!r} cannot be read: {error.strerror}") from error
    if checksum != found["sha256"]:
        raise DataError(
            f"data.path: {path!r} has changed since it was prepared: its SHA-256 is not that of "
            f"{beside(Path(path)).name}; prepare it again, or remove the manifest of a file that you edited"
        )
