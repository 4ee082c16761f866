"""What changed between two versions, lossless: places and differences of the bit patterns that are not the same.

A delta is two files. `changes.zst` is one zstd frame a block of a tensor (at most `BLOCK` elements; blocks without a
change have none), `changes.json` says whose they are. Inside a frame: the places (the gaps between changed elements,
or one bit an element where that is smaller), then the differences, as signed numbers folded into unsigned ones. Both
are laid out byte plane by byte plane: the upper ones are almost all zero, and vanish.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from services.contract import Count, TensorEntry, Wire
from services.weights import disk
from services.weights.disk import DamagedWeights

CHANGES = "changes.zst"
INDEX = "changes.json"
BLOCK = 2**22
LEVEL = 3

Bits = NDArray[Any]
"""A tensor's elements as unsigned integers [n], whatever numbers they stand for."""


class Block(Wire):
    """`count` changed elements among `size`, from element `start` of a tensor on; its frame is `bytes` long."""

    tensor: str
    start: Count
    size: Count
    count: Count
    places: Literal["gaps", "bits"]
    bytes: Count


BLOCKS = TypeAdapter(list[Block])


def bits_of(tensor: torch.Tensor) -> Bits:
    """The bit patterns of a contiguous CPU tensor [n]; nothing is copied."""
    return tensor.reshape(-1).view(torch.uint8).numpy().view(f"<u{tensor.element_size()}")


def encode(old: Bits, new: Bits) -> tuple[Literal["gaps", "bits"], NDArray[np.intp], bytes]:
    """How the places are given, the places themselves [c], and the frame's content."""
    differs = old != new
    places = np.flatnonzero(differs)
    signed = (new[places] - old[places]).view(f"<i{new.itemsize}")
    folded = (signed << 1) ^ (signed >> (8 * new.itemsize - 1))
    if 8 * len(places) > len(new):  # a byte each is the least that gaps take
        return "bits", places, np.packbits(differs).tobytes() + _planes(folded)
    return "gaps", places, _planes(np.diff(places, prepend=-1).astype("<u4")) + _planes(folded)


def decode(block: Block, content: bytes, bits: Bits) -> None:
    """Apply a frame's content to the block's elements [size] in place. Raises DamagedWeights; then none has changed."""
    width = 4 * block.count if block.places == "gaps" else -(-block.size // 8)
    if len(content) != width + bits.itemsize * block.count:
        raise DamagedWeights(f"the block of {block.tensor} at {block.start} has {len(content)} bytes")
    raw = np.frombuffer(content, np.uint8)
    if block.places == "gaps":
        places = np.cumsum(_joined(raw[:width], 4), dtype=np.int64) - 1
    else:
        places = np.flatnonzero(np.unpackbits(raw[:width], count=block.size))
    if len(places) != block.count or (len(places) and not 0 <= places[0] <= places[-1] < block.size):
        raise DamagedWeights(f"the block of {block.tensor} at {block.start} names other elements than it has")
    folded = _joined(raw[width:], bits.itemsize)
    bits[places] += (folded >> 1) ^ (~(folded & 1) + 1)


def write(
    directory: Path, tensors: Iterable[tuple[str, torch.Tensor]], before: dict[str, Bits], base: list[TensorEntry]
) -> list[TensorEntry]:
    """Write what turns `before` into `tensors`, which are consumed one at a time; `before` becomes them as it goes.

    Returns the manifest of the result: names, files and order of `base`, checksums of the tensors. Raises ValueError
    when the tensors are not those of `base` (names, dtypes, shapes), OSError from the disk.
    """
    entries = {entry.name: entry for entry in base}
    checksums: dict[str, str] = {}
    blocks: list[Block] = []
    compressor = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True)
    with (directory / CHANGES).open("wb") as file:
        for name, given in tensors:
            tensor = given.detach().to("cpu").contiguous()
            entry = entries.get(name)
            found = (disk.dtype_name(tensor), list(tensor.shape))
            if entry is None or found != (entry.dtype, entry.shape) or name in checksums:
                raise ValueError(f"tensor {name} {found} is not the base's, or was given twice")
            new, old = bits_of(tensor), before[name]
            for start in range(0, len(new), BLOCK):
                part, into = new[start : start + BLOCK], old[start : start + BLOCK]
                form, places, content = encode(into, part)
                if not len(places):
                    continue
                frame = compressor.compress(content)
                file.write(frame)
                into[places] = part[places]
                blocks.append(
                    Block(tensor=name, start=start, size=len(part), count=len(places), places=form, bytes=len(frame))
                )
            checksums[name] = disk.checksum(tensor)
    if missing := entries.keys() - checksums.keys():
        raise ValueError(f"tensor {min(missing)} of the base was not given")
    disk.sync(directory / CHANGES)
    (directory / INDEX).write_bytes(BLOCKS.dump_json(blocks))
    disk.sync(directory / INDEX)
    return [entry.model_copy(update={"checksum": checksums[entry.name]}) for entry in base]


def apply(directory: Path, tensors: dict[str, Bits]) -> None:
    """Change `tensors` in place by the delta in `directory`. Raises DamagedWeights, midway too: what the tensors are
    after it is for checksums to say."""
    try:
        blocks = BLOCKS.validate_json((directory / INDEX).read_bytes())
    except (OSError, ValidationError) as error:
        raise DamagedWeights(f"{directory / INDEX}: {str(error).splitlines()[0]}") from error
    decompressor = zstandard.ZstdDecompressor()
    try:
        with (directory / CHANGES).open("rb") as file:
            for block in blocks:
                bits = tensors.get(block.tensor, np.empty(0, np.uint8))[block.start : block.start + block.size]
                if not 0 < block.count <= block.size == len(bits) <= BLOCK:
                    raise DamagedWeights(f"there are no {block.size} elements of {block.tensor} at {block.start}")
                most = (4 + bits.itemsize) * block.size
                if block.bytes > 2 * most + 1024:
                    raise DamagedWeights(f"{block.bytes} bytes are too many for {block.size} elements")
                frame = file.read(block.bytes)
                content = decompressor.decompress(frame, max_output_size=most, allow_extra_data=False)
                decode(block, content, bits)
    except (OSError, zstandard.ZstdError, DamagedWeights) as error:
        raise DamagedWeights(f"{directory / CHANGES}: {error}") from error


def _planes(numbers: Bits) -> bytes:
    return numbers.view(np.uint8).reshape(-1, numbers.itemsize).T.tobytes()


def _joined(planes: NDArray[np.uint8], width: int) -> Bits:
    return np.ascontiguousarray(planes.reshape(width, -1).T).view(f"<u{width}").reshape(-1)
