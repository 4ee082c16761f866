"""A model folder of this process's own, brought from version to version in place: what deltas are made against and
applied to."""

import fcntl
import json
import logging
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from services.contract import Version, WeightVersion
from services.weights import delta, disk
from services.weights.disk import DamagedWeights

log = logging.getLogger(__name__)


class Mirror:
    """`path` holds the weights of `version` (none: nothing that can be relied on). It lies in `parent` (none: the
    system's folder for temporary files), needs the model's size there, and goes with `close` or the process; what a
    killed process of the same `label` left there is removed. Not thread-safe. Raises OSError."""

    def __init__(self, parent: Path | None, label: str):
        place = Path(parent or tempfile.gettempdir())
        place.mkdir(parents=True, exist_ok=True)
        prefix = f"rlif-{label}-"
        for leftover in place.iterdir():
            if re.fullmatch(re.escape(prefix) + r"\w{8}", leftover.name):
                _remove_unless_used(leftover)
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=place)).resolve()
        self._lock = os.open(self.path, os.O_RDONLY)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._remove = weakref.finalize(self, _remove, self.path, self._lock)
        self.version: Version | None = None

    def fill(self, folder: Path, version: Version) -> None:
        """Become a copy of a model folder. Raises OSError."""
        self.version = None
        for file in self.path.iterdir():
            file.unlink()
        for file in folder.iterdir():
            if file.is_file() and file.name != "manifest.json":
                shutil.copyfile(file, self.path / file.name)
        self.version = version

    def tensors(self) -> dict[str, delta.Bits]:
        """Every tensor's bit patterns [n]; changing them changes the files. Raises DamagedWeights."""
        found: dict[str, delta.Bits] = {}
        for file in sorted(self.path.glob("*.safetensors")):
            try:
                content = np.memmap(file, np.uint8, "r+")
                start = 8 + int.from_bytes(content[:8].tobytes(), "little")
                header = json.loads(content[8:start].tobytes())
                for name, tensor in header.items():
                    if name != "__metadata__":
                        first, end = tensor["data_offsets"]
                        width = (end - first) // (int(np.prod(tensor["shape"], dtype=np.int64)) or 1) or 1
                        found[name] = content[start + first : start + end].view(f"<u{width}")
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise DamagedWeights(f"{file}: {error}") from error
        return found

    def reach(self, weights: WeightVersion) -> Path:
        """Become `weights` (of transport `delta`), by the versions since this one or since the newest snapshot before
        it; every tensor is checked. Returns the folder. Raises DamagedWeights, OSError."""
        if self.version is not None and self.version != weights.id:
            try:
                return self._follow(weights)
            except DamagedWeights as error:
                log.warning("weights %s by way of %s: %s; starting from the snapshot", weights.id, self.version, error)
        self.version = None
        return self._follow(weights)

    def _follow(self, weights: WeightVersion) -> Path:
        chain = _chain(weights, self.version)
        self.version = None  # in between it is no version at all
        for link in chain:
            if link.base is None:
                self.fill(Path(link.location), link.id)
                disk.verify(self.path, link.manifest)
            else:
                delta.apply(Path(link.location), self.tensors())
        disk.verify(self.path, weights.manifest)
        self.version = weights.id
        return self.path

    def close(self) -> None:
        self._remove()


@contextmanager
def whole(weights: WeightVersion) -> Iterator[Path]:
    """A model folder of a published version, every tensor checked, for as long as the context lasts. Raises
    DamagedWeights, OSError."""
    if weights.base is None:
        disk.verify(Path(weights.location), weights.manifest)
        yield Path(weights.location)
        return
    mirror = Mirror(None, f"{weights.run_id}-whole")
    try:
        yield mirror.reach(weights)
    finally:
        mirror.close()


def snapshot(weights: WeightVersion) -> WeightVersion:
    """The whole version that these weights are made from, or were published after; they themselves where they are
    whole. Raises DamagedWeights."""
    return _chain(weights, None)[0]


def _chain(weights: WeightVersion, have: Version | None) -> list[WeightVersion]:
    """From what follows `have`, or from the newest snapshot, up to `weights`. Raises DamagedWeights."""
    chain = [weights]
    while (base := chain[-1].base) is not None and base != have:
        folder = Path(weights.location).parent / f"{base.lineage}-{base.version}"
        try:
            link = WeightVersion.model_validate_json((folder / "manifest.json").read_bytes())
        except (OSError, ValidationError) as error:
            raise DamagedWeights(f"{folder / 'manifest.json'}: {str(error).splitlines()[0]}") from error
        if (link.run_id, link.id) != (weights.run_id, base) or (link.base is not None and link.base >= base):
            raise DamagedWeights(f"{folder / 'manifest.json'}: is of another version")
        chain.append(link.model_copy(update={"location": str(folder)}))
    return chain[::-1]


def _remove(folder: Path, lock: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)


def _remove_unless_used(folder: Path) -> None:
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        log.debug("%s is in use", folder)
    finally:
        os.close(handle)
