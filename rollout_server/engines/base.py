"""What a rollout engine is: prompts in, completions out, weights swapped between completions."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fastapi import FastAPI

from services.contract import Completion, Sampling, Version
from services.http import StartupError


@dataclass(frozen=True)
class Prompt:
    """`n` completions of one prompt. Sampling depends on `sampling.seed` and the weights alone (no seed: random)."""

    request_id: str
    token_ids: list[int]
    n: int
    sampling: Sampling


@dataclass(frozen=True)
class EngineSettings:
    """`model` is a local folder. `threads`: CPU threads (none: what the library takes)."""

    model: Path
    served_name: str
    dtype: str = "bfloat16"
    device: str = "auto"
    threads: int | None = None
    max_model_len: int | None = None
    max_batch_sequences: int = 256
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.85
    trust_remote_code: bool = False


class Engine(Protocol):
    """`tokenizer` and `vocab_size` (embedding rows) may be read from construction on, the rest after `start`."""

    name: str
    settings: EngineSettings
    tokenizer: Any
    vocab_size: int
    max_model_len: int
    version: Version

    async def start(self) -> None:
        """Load the model. Raises StartupError with one line for the person who started it."""

    async def generate(self, prompts: list[Prompt]) -> list[list[Completion]]:
        """Completions of each prompt, in order. Cancelling the call aborts them."""

    async def load(self, version: Version, directory: Path) -> None:
        """Swap in the weights of a folder: running completions finish first, new ones wait.

        Raises WeightsMismatch before anything changed when they are not this model's.
        """

    async def stop(self) -> None:
        """Abort what still runs and free the model."""

    def state(self) -> str:
        """ "ok", or the reason why the engine cannot generate."""

    async def attach(self, app: FastAPI) -> None:
        """Add the OpenAI-compatible routes; called after `start`."""


class WeightsMismatch(ValueError):
    """A weight version whose tensors are not those of the served model; the message names the first differences."""


class Aborted(Exception):
    """The engine cannot finish (or begin) these completions; the message says why."""


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


def model_folder(model: str, revision: str | None) -> Path:
    """The local folder of a model, fetched from the Hugging Face hub if `model` is a name. Raises StartupError."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise StartupError(f"--model {model}: the folder has no config.json, so it is not a Hugging Face model")
        return folder.resolve()
    if folder.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise StartupError(f"--model {model}: no such folder")
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py"]
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=wanted))
    except Exception as error:  # the hub client raises from half a dozen unrelated trees
        reason = str(error).strip().splitlines()[0]
        raise StartupError(f"--model {model}: neither a folder here nor to be had from the hub: {reason}") from error
