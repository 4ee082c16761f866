"""Whether a folder's tensors are those of the model that is to take them, told from the file headers alone."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.contract import TensorEntry


class WeightsMismatch(ValueError):
    """A weight version whose tensors are not those of the served model; the message names the first differences."""


def tensor_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in a folder's safetensors files (headers only). Empty where there are none."""
    from safetensors import safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}
    return shapes


def check_shapes(
    given: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]], optional: Iterable[str] = ()
) -> None:
    """Raises WeightsMismatch unless `given` has exactly the tensors `wanted` (those in `optional` may be left out)."""
    missing = wanted.keys() - given.keys() - set(optional)
    unknown = given.keys() - wanted.keys() - set(optional)
    reshaped = [
        f"{name} is {list(given[name])}, the model's is {list(wanted[name])}"
        for name in sorted(given.keys() & wanted.keys())
        if given[name] != wanted[name]
    ]
    faults = [f"{name} is missing" for name in sorted(missing)]
    faults += [f"{name} is not of this model" for name in sorted(unknown)]
    if faults := faults + reshaped:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise WeightsMismatch("; ".join(faults[:3]) + more)


@dataclass(frozen=True)
class Tensors:
    """What a model consists of: `shapes` by name (empty: not known), of which those in `optional` may be left out."""

    shapes: dict[str, tuple[int, ...]]
    optional: frozenset[str]

    @classmethod
    def of(cls, folder: Path, text_config: Any) -> "Tensors":
        """Of a Hugging Face folder; `text_config` is its language model's."""
        shapes = tensor_shapes(folder)
        # Old checkpoints hold the rotary table, which is a constant.
        optional = {name for name in shapes if name.endswith("rotary_emb.inv_freq")}
        if getattr(text_config, "tie_word_embeddings", False):
            optional.add("lm_head.weight")
        return cls(shapes, frozenset(optional))

    def check_manifest(self, manifest: Iterable[TensorEntry]) -> None:
        """Raises WeightsMismatch unless the manifest names these tensors."""
        if self.shapes:
            check_shapes({entry.name: tuple(entry.shape) for entry in manifest}, self.shapes, self.optional)

    def check(self, folder: Path) -> None:
        """Raises WeightsMismatch unless the folder holds these tensors."""
        if self.shapes:
            check_shapes(tensor_shapes(folder), self.shapes, self.optional)
