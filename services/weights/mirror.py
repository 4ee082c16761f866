"""A model folder of this process's own, brought from version to version in place: what deltas are made against and
applied to, and where adapters are merged."""

import fcntl
import json
import logging
import math
import os
import re
import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError

from services.contract import Adapter, Version, WeightVersion
from services.weights import adapter as adapters
from services.weights import delta, disk
from services.weights.disk import DamagedWeights
from services.weights.meeting import TRANSPORTS
from services.weights.store import MANIFEST, ObjectMissing, StoreError, at_hand, is_url, store_of

log = logging.getLogger(__name__)


def own_folder(owner: object, parent: Path | None, label: str) -> tuple[Path, Callable[[], object]]:
    """A new folder in `parent` (none: the system's for temporary files) that no other user can have made, and what
    removes it. It goes with its owner or the process; what a killed one of the same `label` left there is removed.
    Raises OSError."""
    place = Path(parent or tempfile.gettempdir())
    place.mkdir(parents=True, exist_ok=True)
    prefix = f"rlif-{label}-"
    for leftover in place.iterdir():
        if re.fullmatch(re.escape(prefix) + r"\w{8}", leftover.name):
            _remove_unless_used(leftover)
    path = Path(tempfile.mkdtemp(prefix=prefix, dir=place)).resolve()
    lock = os.open(path, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return path, weakref.finalize(owner, _remove, path, lock)


class Mirror:
    """`path` holds the weights of `version` (none: nothing that can be relied on). It is an `own_folder`, needs the
    model's size in `parent`, and goes with `close` or the process. `base` gives the folder of the model that adapters
    are added to. Not thread-safe. Raises OSError."""

    def __init__(self, parent: Path | None, label: str, base: Callable[[], Path] | None = None):
        self.path, self._remove = own_folder(self, parent, label)
        self.version: Version | None = None
        self._base = base
        self._base_folder: Path | None = None
        self._bases: dict[str, str] = {}
        """The base model's checksum by dtype."""
        self._merged: tuple[Adapter, frozenset[str]] | None = None
        """What the folder's base is, and which tensors are in place of the base's; none where it is no base."""

    def fill(self, location: str | Path, version: Version) -> None:
        """Become a copy of a whole version's files. Raises OSError."""
        self._empty()
        store, name = store_of(str(location))
        store.fetch(name, self.path)
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
        """Become `weights`: a `delta` by the versions since this one or since the newest snapshot, after which every
        tensor is checked; an `adapter` from the base model. Returns the folder. Raises DamagedWeights, OSError, and
        StartupError: the base model, or the client of the store, is not here."""
        if weights.adapter is not None:
            self._merge(weights, weights.adapter)
            return self.path
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
                self.fill(link.location, link.id)
            else:
                with at_hand(link.location, self.path) as folder:
                    delta.apply(folder, self.tensors())
        disk.verify(self.path, weights.manifest)
        self.version = weights.id
        return self.path

    def _merge(self, weights: WeightVersion, adapter: Adapter) -> None:
        if self._base is None:
            raise DamagedWeights("there is no model here that adapters could be added to")
        base = self._base_folder = self._base_folder or self._base()
        stands = adapter, frozenset(entry.name for entry in weights.manifest)
        if self._merged != stands:
            self._become_base(base, adapter)
            self._merged = stands
        self.version = None
        with at_hand(weights.location, self.path) as folder:
            adapters.apply(folder, weights.manifest, adapter, base, self.tensors())
        self.version = weights.id

    def _become_base(self, base: Path, adapter: Adapter) -> None:
        if self._bases.get(adapter.dtype, adapter.base) == adapter.base:
            self._empty()
            entries = disk.write_tensors(self.path, adapters.base_tensors(base, adapter.dtype))
            disk.copy_config(base, self.path, entries)
            self._bases[adapter.dtype] = adapters.checksum(entries)
        if self._bases[adapter.dtype] != adapter.base:
            raise DamagedWeights(
                f"the adapters are for another model than {base}, whose weights in {adapter.dtype} have the checksum "
                f"{self._bases[adapter.dtype]}, not {adapter.base}"
            )

    def _empty(self) -> None:
        self.version, self._merged = None, None
        for file in self.path.iterdir():
            file.unlink()

    def close(self) -> None:
        self._remove()


@contextmanager
def whole(
    weights: WeightVersion, base: Callable[[], Path] | None = None, mirror_dir: Path | None = None
) -> Iterator[Path]:
    """A model folder of a published version, every tensor checked, for as long as the context lasts; of one of adapters
    by their `base` model. Raises DamagedWeights, OSError, StartupError as `Mirror.reach` does."""
    if weights.transport == "disk" and not is_url(weights.location):
        disk.verify(Path(weights.location), weights.manifest)
        yield Path(weights.location)
        return
    mirror = Mirror(mirror_dir, f"{weights.run_id}-whole", base)
    try:
        yield mirror.reach(weights)
    finally:
        mirror.close()


def snapshot(weights: WeightVersion) -> WeightVersion:
    """The whole version that these weights are made from, or were published after; they themselves where they are
    whole. Raises DamagedWeights, StoreError."""
    return _chain(weights, None)[0]


def version_at(location: str) -> WeightVersion:
    """The version that lies there: it may have been moved since. Raises OSError, ValidationError."""
    store, name = store_of(location)
    weights = WeightVersion.model_validate_json(store.read(name, MANIFEST))
    return weights.model_copy(update={"location": location})


def check(weights: WeightVersion, mirror_dir: Path | None = None) -> None:
    """Whether what was published of a version is sound; of a broadcast one, the files before it. Files are read; of
    what lies in a bucket, manifests and listed sizes are: to fetch it takes as long as to follow it. Raises
    DamagedWeights, OSError."""
    if weights.transport in TRANSPORTS:
        weights = snapshot(weights)
    if is_url(weights.location):
        for link in _chain(weights, None):
            _check_listed(link)
        return
    if weights.adapter is not None:
        with at_hand(weights.location) as folder:
            disk.verify(folder, weights.manifest)
        return
    with whole(weights, mirror_dir=mirror_dir):
        pass


def _check_listed(weights: WeightVersion) -> None:
    """Whether a version's objects are there, and large enough for its tensors. Raises DamagedWeights, StoreError."""
    store, name = store_of(weights.location)
    least = Counter({MANIFEST: 1})
    if weights.base is not None:
        least.update({delta.INDEX: 1, delta.CHANGES: 0})
    else:
        for entry in weights.manifest:
            least[entry.file] += math.prod(entry.shape) * getattr(torch, entry.dtype).itemsize
    sizes = store.sizes(name)
    for file, size in least.items():
        if file not in sizes:
            raise DamagedWeights(f"{weights.location}/{file}: is missing")
        if sizes[file] < size:
            raise DamagedWeights(f"{weights.location}/{file}: has {sizes[file]} bytes, its tensors {size}")


def _chain(weights: WeightVersion, have: Version | None) -> list[WeightVersion]:
    """From what follows `have`, or from the newest snapshot, up to `weights`. Raises DamagedWeights, and StoreError: a
    bucket does not answer."""
    chain = [weights]
    while (base := chain[-1].base) is not None and base != have:
        store, _ = store_of(weights.location)
        location = store.location(f"{base.lineage}-{base.version}")
        try:
            link = version_at(location)
        except (OSError, ValidationError) as error:
            if isinstance(error, StoreError) and not isinstance(error, ObjectMissing):
                raise
            raise DamagedWeights(f"{location}/{MANIFEST}: {str(error).splitlines()[0]}") from error
        if (link.run_id, link.id) != (weights.run_id, base) or (link.base is not None and link.base >= base):
            raise DamagedWeights(f"{location}/{MANIFEST}: is of another version")
        chain.append(link)
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
