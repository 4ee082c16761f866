"""Versions of low-rank adapters: two thin matrices a layer, from which every follower makes the layer's weights.

W + scale * B A is computed element by element in one order of float32 operations, each of which IEEE 754 rounds in one
way only. So trainer and followers get the same bits, whatever their processors, threads and libraries.
"""

from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from services.contract import Adapter, TensorEntry
from services.weights import disk
from services.weights.disk import DamagedWeights

STEM = "adapter"
"""Of the file names of a version."""
DOWN, UP = ".lora_A.weight", ".lora_B.weight"
"""What follows a layer's name in the names of its A [rank, in] and B [out, rank]."""
BLOCK = 2**18
"""Elements that are computed at a time: what lies between the operations stays in the processor's caches."""


def merged(weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: float) -> torch.Tensor:
    """W + scale * B A in W's dtype, on the CPU. [out, in], [rank, in], [out, rank].

    In float32: products are added in the order of the rank, their sum is scaled, then added to W.
    """
    result, rows = torch.empty_like(weight), max(1, BLOCK // weight.shape[1])
    down = down.float()
    for start in range(0, len(weight), rows):
        left = up[start : start + rows].float()
        total = left[:, :1] * down[0]
        product = torch.empty_like(total)
        for number in range(1, len(down)):
            torch.mul(left[:, number : number + 1], down[number], out=product)
            total.add_(product)
        result[start : start + rows] = total.mul_(scale).add_(weight[start : start + rows].float())
    return result


def base_tensors(folder: Path, dtype: str, only: Container[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a model folder (`only`: those of these names), floating-point numbers in `dtype`, on the CPU.
    Raises OSError."""
    to = getattr(torch, dtype)
    for file in _files(folder):
        try:
            with safe_open(file, framework="pt", device="cpu") as opened:
                for name in opened.keys():
                    if only is None or name in only:
                        tensor = opened.get_tensor(name)
                        yield name, tensor.to(to) if tensor.is_floating_point() else tensor
        except SafetensorError as error:
            raise OSError(f"{file}: {error}") from error


def checksum(tensors: Iterable[TensorEntry]) -> str:
    """xxh3-128 (hex) of a model: of its tensors' names, shapes, dtypes and checksums, in whichever files they lie."""
    digest = xxhash.xxh3_128()
    for entry in sorted(tensors, key=lambda entry: entry.name):
        digest.update(f"{entry.name} {entry.shape} {entry.dtype} {entry.checksum}\n".encode())
    return digest.hexdigest()


def of(folder: Path, dtype: str, scale: float) -> Adapter:
    """What versions are made of that stand on the model in `folder`, all of which is read. Raises OSError."""
    entries = [
        TensorEntry(
            name=name, shape=list(tensor.shape), dtype=disk.dtype_name(tensor), file="", checksum=disk.checksum(tensor)
        )
        for name, tensor in base_tensors(folder, dtype)
    ]
    return Adapter(base=checksum(entries), dtype=dtype, scale=scale)


def apply(
    directory: Path, manifest: list[TensorEntry], adapter: Adapter, base: Path, into: dict[str, NDArray[Any]]
) -> None:
    """Put the merged weights of every adapted layer of the model in `base` into the bit patterns `into`.

    Raises DamagedWeights: the adapter's files are not what the manifest says, or not of these layers; OSError.
    """
    halves = dict(disk.read_tensors(directory, manifest))
    layers = {name.removesuffix(DOWN) for name in halves if name.endswith(DOWN)}
    if halves.keys() != {layer + half for layer in layers for half in (DOWN, UP)}:
        raise DamagedWeights(f"{directory}: an adapter's tensors come in pairs of A and B, these do not")
    wanted = {f"{layer}.weight": layer for layer in layers}
    if missing := wanted.keys() - into.keys():
        raise DamagedWeights(f"{directory}: {base} has no {min(missing)}, which the adapter is for")
    for name, weight in base_tensors(base, adapter.dtype, wanted):
        layer = wanted[name]
        down, up = halves[layer + DOWN], halves[layer + UP]
        if down.dim() != 2 or up.dim() != 2 or (*weight.shape, len(down)) != (len(up), down.shape[1], up.shape[1]):
            shapes = f"{list(down.shape)} and {list(up.shape)}"
            raise DamagedWeights(f"{directory}: {layer}: {shapes} do not go with a weight {list(weight.shape)}")
        bits = into[name]
        bits[:] = merged(weight, down, up, adapter.scale).reshape(-1).view(torch.uint8).numpy().view(bits.dtype)


def _files(folder: Path) -> list[Path]:
    """Raises OSError where there are none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder}: has no safetensors files, which adapters need")
    return files
