"""Weights as files: safetensors shards in a folder that transformers and vLLM load, and checks of every byte of them.

A checksum is xxh3-128 (hex) of a tensor's raw bytes: little-endian, row-major, as safetensors stores them.
"""

import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from services.contract import TensorEntry

SHARD_BYTES = 4 * 2**30
STEM = "model"
SINGLE = f"{STEM}.safetensors"
WEIGHT_FILES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf", ".h5")


class DamagedWeights(ValueError):
    """Files that are not what the manifest says; the message names file, tensor and fault."""


def dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def checksum(tensor: torch.Tensor) -> str:
    """xxh3-128 (hex) of the raw bytes of a contiguous CPU tensor; nothing is copied."""
    return xxhash.xxh3_128_hexdigest(tensor.reshape(-1).view(torch.uint8).numpy().data)


def sync(path: Path) -> None:
    """Make a file's content, or a folder's list of names, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class _Shard:
    """Tensors that are written together, no two of them in the same memory: safetensors refuses tied tensors."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.bytes = 0
        self.spans: dict[int, list[tuple[int, int]]] = {}

    def add(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach().to("cpu").contiguous()
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        spans = self.spans.setdefault(tensor.untyped_storage().data_ptr(), [])
        if any(start < other_end and other_start < end for other_start, other_end in spans):
            tensor = tensor.clone()
        else:
            spans.append((start, end))
        self.tensors[name] = tensor
        self.bytes += tensor.nbytes
        return tensor


def write_tensors(
    directory: Path, tensors: Iterable[tuple[str, torch.Tensor]], shard_bytes: int = SHARD_BYTES, *, stem: str = STEM
) -> list[TensorEntry]:
    """Write (name, tensor) pairs as `<stem>.safetensors`, or as numbered shards with an index when they are larger.

    `tensors` is consumed as it goes: at most one shard's tensors are kept at a time, and those already contiguous in
    CPU memory are written from where they lie. Returns the manifest. Raises ValueError: a name twice, or no tensor.
    """
    entries: dict[str, tuple[int, str, list[int], str]] = {}
    shard, count, total = _Shard(), 0, 0

    def flush() -> None:
        nonlocal shard, count, total
        count, total = count + 1, total + shard.bytes
        path = directory / f"shard-{count}"
        save_file(shard.tensors, path, metadata={"format": "pt"})
        sync(path)
        shard = _Shard()

    for name, tensor in tensors:
        if name in entries:
            raise ValueError(f"tensor {name} was given twice")
        if shard.tensors and shard.bytes + tensor.nbytes > shard_bytes:
            flush()
        written = shard.add(name, tensor)
        entries[name] = (count + 1, dtype_name(written), list(written.shape), checksum(written))
    if not entries:
        raise ValueError("no tensor was given")
    flush()
    numbered = [f"{stem}-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    files = [f"{stem}.safetensors"] if count == 1 else numbered
    for number, file in enumerate(files, 1):
        (directory / f"shard-{number}").rename(directory / file)
    if count > 1:
        weight_map = {name: files[entry[0] - 1] for name, entry in entries.items()}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        index_file = directory / f"{stem}.safetensors.index.json"
        index_file.write_text(json.dumps(index, indent=1))
        sync(index_file)
    return [
        TensorEntry(name=name, shape=shape, dtype=dtype, file=files[number - 1], checksum=digest)
        for name, (number, dtype, shape, digest) in entries.items()
    ]


def copy_config(source: Path, directory: Path, manifest: list[TensorEntry]) -> None:
    """Copy what makes a folder a model besides its weights: configuration, tokenizer, chat template, code.

    The copied config.json names the dtype that most of the manifest's numbers have: loaders that are given none take
    that one, and would round float32 weights to the base model's bfloat16.
    """
    for file in sorted(source.iterdir()):
        if not file.is_file() or file.name.endswith(WEIGHT_FILES) or file.name == "manifest.json":
            continue
        if file.name == "config.json":
            sizes = Counter[str]()
            for entry in manifest:
                sizes[entry.dtype] += math.prod(entry.shape)
            config = json.loads(file.read_text())
            config["torch_dtype" if "torch_dtype" in config else "dtype"] = sizes.most_common(1)[0][0]
            (directory / file.name).write_text(json.dumps(config, indent=2))
        else:
            shutil.copyfile(file, directory / file.name)
        sync(directory / file.name)


def read_tensors(directory: Path, manifest: list[TensorEntry]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of the manifest, file by file, on the CPU, each checked before it is yielded.

    Tensors are views of the mapped file: copy what is to be changed. Raises DamagedWeights at the first file that is
    missing, truncated or holds other tensors than the manifest says, and at the first tensor of another shape, dtype or
    content.
    """
    files: dict[str, list[TensorEntry]] = {}
    for entry in manifest:
        files.setdefault(entry.file, []).append(entry)
    for file, entries in files.items():
        if Path(file).name != file:
            raise DamagedWeights(f"{directory}: {file!r} is not a plain file name")
        if (directory / file).exists() and not (directory / file).is_file():  # opening a pipe would wait for ever
            raise DamagedWeights(f"{directory / file}: is not a regular file")
        try:
            handle = safe_open(directory / file, framework="pt", device="cpu")
        except (OSError, SafetensorError) as error:
            raise DamagedWeights(f"{directory / file}: {error}") from error
        with handle as opened:
            there, named = set(opened.keys()), {entry.name for entry in entries}
            if there != named:
                example = sorted(there ^ named)[0]
                where = "not in the manifest" if example in there else "missing"
                raise DamagedWeights(f"{directory / file}: tensor {example} is {where}")
            for entry in entries:
                tensor = opened.get_tensor(entry.name)
                found = (dtype_name(tensor), list(tensor.shape))
                if found != (entry.dtype, entry.shape):
                    raise DamagedWeights(
                        f"{directory / file}: tensor {entry.name} is {found}, not {(entry.dtype, entry.shape)}"
                    )
                if checksum(tensor) != entry.checksum:
                    raise DamagedWeights(f"{directory / file}: tensor {entry.name} has the wrong checksum")
                yield entry.name, tensor


def verify(directory: Path, manifest: list[TensorEntry]) -> None:
    """Read every byte and compare. Raises DamagedWeights, also for tensors in files that the manifest does not name:
    whoever loads the folder would read those, too."""
    unknown = {file.name for file in directory.glob("*.safetensors")} - {entry.file for entry in manifest}
    if unknown:
        raise DamagedWeights(f"{directory / min(unknown)}: is not in the manifest")
    for _ in read_tensors(directory, manifest):
        pass
