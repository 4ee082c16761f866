"""Tensors laid out in buckets of bytes, one broadcast each; sender and receiver do it alike, from one manifest."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from services.contract import TensorEntry

BUCKET_BYTES = 2**28
ALIGNMENT = 16
"""Bytes. Views of any dtype begin at a multiple of it, and a bucket ends at one."""


@dataclass(frozen=True)
class Place:
    """A tensor's bytes within its bucket: `start` to `start + size`."""

    entry: TensorEntry
    start: int
    size: int


@dataclass(frozen=True)
class Bucket:
    places: list[Place]
    size: int


def plan(manifest: Sequence[TensorEntry], most: int = BUCKET_BYTES) -> list[Bucket]:
    """The manifest's tensors in its order, in buckets of at most `most` bytes; one that is larger has its own."""
    buckets: list[Bucket] = []
    places: list[Place] = []
    filled = 0
    for entry in manifest:
        size = math.prod(entry.shape) * getattr(torch, entry.dtype).itemsize
        if places and filled + size > most:
            buckets.append(Bucket(places, filled))
            places, filled = [], 0
        places.append(Place(entry, filled, size))
        filled += max(ALIGNMENT, -(-size // ALIGNMENT) * ALIGNMENT)
    return [*buckets, Bucket(places, filled)] if places else buckets


def views(bucket: Bucket, buffer: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of all tensors in `buffer`, a uint8 [bucket.size]; they share its memory."""
    for place in bucket.places:
        piece = buffer[place.start : place.start + place.size]
        yield place.entry.name, piece.view(getattr(torch, place.entry.dtype)).view(place.entry.shape)


def received(
    broadcast: Callable[[torch.Tensor], None],
    manifest: Sequence[TensorEntry],
    most: int,
    sums: Sequence[int],
    device: torch.device,
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Each bucket's tensors as they come: `broadcast` fills a buffer on `device`, a new one for every bucket. Raises
    RuntimeError: a bucket's sum is another one."""
    buckets = plan(manifest, most)
    for number, (bucket, expected) in enumerate(zip(buckets, sums, strict=True)):
        buffer = torch.empty(bucket.size, dtype=torch.uint8, device=device)
        broadcast(buffer)
        if (found := words_sum(buffer)) != expected:
            raise RuntimeError(f"bucket {number} of {len(buckets)} adds up to {found}, not to {expected}")
        yield list(views(bucket, buffer))


def words_sum(buffer: torch.Tensor) -> int:
    """The sum of a bucket's bytes as 32-bit integers: what tells stale or torn bytes at the price of reading them."""
    return int(buffer.view(torch.int32).sum(dtype=torch.int64))
