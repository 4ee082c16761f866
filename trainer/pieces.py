"""A checkpoint's tensors: written by each rank as its fragments, read back by name, in whatever parts are asked for."""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from services.contract import TensorEntry
from services.weights import disk
from trainer.fragments import MASTER, Fragment

ENTRIES = "tensors.json"
BUFFER = "buffer"
STEP = "step"
"""A kind of one number, which is the same for every part of a parameter."""
AVERAGE = "average"
"""The kind of a moving reference's weights, which are no part of the optimizer's state. A frozen reference is the base
model, which the recipe names."""


def write(folder: Path, tensors: Iterable[tuple[str, int, str, Tensor]]) -> None:
    """Write (kind, start, name, tensor) into the new folder as safetensors and `tensors.json`, durably.

    They are consumed as they are written.
    """
    folder.mkdir()
    entries = disk.write_tensors(folder, ((f"{kind}/{start}/{name}", tensor) for kind, start, name, tensor in tensors))
    (folder / ENTRIES).write_text(json.dumps([entry.model_dump() for entry in entries]))
    disk.sync(folder / ENTRIES)
    disk.sync(folder)


def entries(folder: Path) -> list[TensorEntry]:
    """What `write` wrote. Raises OSError and ValueError."""
    return [TensorEntry.model_validate(entry) for entry in json.loads((folder / ENTRIES).read_text())]


class Pieces:
    """The tensors of the ranks' folders of one checkpoint, which was verified before."""

    def __init__(self, folders: list[Path]) -> None:
        self._parts: dict[str, dict[str, list[tuple[int, int, Path, str]]]] = defaultdict(lambda: defaultdict(list))
        for folder in folders:
            for entry in entries(folder):
                kind, start, name = entry.name.split("/", 2)
                count = entry.shape[0] if entry.shape else 1
                self._parts[name][kind].append((int(start), count, folder / entry.file, entry.name))
        self._open = cache(lambda file: safe_open(file, framework="pt", device="cpu"))

    def names(self, kind: str) -> Iterator[str]:
        return (name for name, kinds in self._parts.items() if kind in kinds)

    def one(self, kind: str, name: str) -> Tensor:
        """A tensor that was written as it is. Raises KeyError."""
        (_, _, file, key), *_ = self._parts[name][kind]
        return self._open(file).get_tensor(key)

    def read(self, name: str, kind: str, start: int, count: int) -> Tensor:
        """Elements [start, start + count) of a flattened parameter. Raises ValueError where some were not written."""
        found, have = torch.empty(count), 0
        for begin, size, file, key in self._parts[name][kind]:
            first, last = max(start, begin), min(start + count, begin + size)
            if first < last:
                found[first - start : last - start] = self._open(file).get_slice(key)[first - begin : last - begin]
                have += last - first
        if have != count:
            raise ValueError(f"{name}: {have} of the {count} elements from {start} on are in the checkpoint ({kind})")
        return found

    def of(self, fragment: Fragment) -> dict[str, Tensor]:
        """Everything that was saved of a fragment's state, by kind."""
        kinds = self._parts[fragment.name].keys() - {STEP, AVERAGE}
        parts = {kind: self.read(fragment.name, kind, fragment.start, fragment.count) for kind in kinds}
        return parts | ({STEP: self.one(STEP, fragment.name)} if STEP in self._parts[fragment.name] else {})

    def whole(self, name: str, shape: list[int]) -> Tensor:
        """A parameter's float32 weights. Raises ValueError where some were not written."""
        count = int(torch.Size(shape).numel())
        return self.read(name, MASTER, 0, count).view(shape)


def verify(folder: Path) -> None:
    """Read every byte and compare. Raises ValueError (DamagedWeights) and OSError."""
    disk.verify(folder, entries(folder))


def buffers(module: Any) -> dict[str, Tensor]:
    """The buffers that belong to a model's state, by name."""
    persistent = module.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in module.named_buffers() if name in persistent}
