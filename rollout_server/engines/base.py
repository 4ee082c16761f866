"""What a rollout engine is: prompts in, completions out, weights swapped between completions."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from fastapi import FastAPI

from services.contract import Completion, Sampling, Version, WeightVersion
from services.weights.meeting import Meet

InFlight = Literal["wait", "keep", "abort"]


@dataclass(frozen=True)
class Prompt:
    """`n` completions of one prompt. Sampling depends on `sampling.seed` and the weights alone (no seed: random)."""

    request_id: str
    token_ids: list[int]
    n: int
    sampling: Sampling


@dataclass(frozen=True)
class EngineSettings:
    """`model` is a local folder. `threads`: CPU threads (none: what the library takes). An engine over several `nodes`
    (vLLM) has one process a node; number 0 serves, and the others join it at the host `leader`. `in_flight`: what is to
    become of completions that are being made when new weights come; `wait` finishes them first, `keep` goes on with
    the new weights (keys and values are computed anew), `abort` begins them again (once: the next weights wait).
    `broadcasts`: whether weights may come that way."""

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
    nodes: int = 1
    node_rank: int = 0
    leader: str = "127.0.0.1"
    in_flight: InFlight = "wait"
    broadcasts: bool = False


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
        """Swap in the weights of a folder. Running completions are treated as `settings.in_flight` says, new ones wait.

        Raises WeightsMismatch before anything changed when they are not this model's.
        """

    async def stop(self) -> None:
        """Abort what still runs and free the model."""

    def state(self) -> str:
        """ "ok", or the reason why the engine cannot generate."""

    def death(self) -> str:
        """Why the engine will never generate again; empty while it can."""

    async def attach(self, app: FastAPI) -> None:
        """Add the OpenAI-compatible routes; called after `start`."""


@runtime_checkable
class Receiver(Protocol):
    """An engine to which weights can be broadcast."""

    async def receive(self, weights: WeightVersion, meet: Meet) -> WeightVersion:
        """Take part in a broadcast of these weights, or of newer ones; returns which. Otherwise as `Engine.load`.

        Raises NotCalled, and WeightsMismatch, before anything changed.
        """


class Aborted(Exception):
    """The engine cannot finish (or begin) these completions; the message says why."""
