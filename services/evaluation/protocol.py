"""How a benchmark is asked: sampling, prompt, how often. The presets are published protocols."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import orjson
from pydantic import Field

from services.contract import Message, Sampling, Temperature, Wire, group_seed
from services.evaluation.benchmark import Benchmark, Item, content_id
from services.prompts import named


class Protocol(Wire):
    """`prompt` names the prompt that is put around mathematical problems (services/prompts.yaml), none: the bare
    problem. `plain`: no chat template, turns joined by blank lines. `max_tokens` none: the benchmark's own.

    Each item is answered `samples` times for each of `seeds`; a seed is one repetition of the whole evaluation.
    """

    preset: str
    prompt: str | None = "intuitor-3b@1"
    plain: bool = False
    temperature: Temperature = 0.0
    top_p: float = Field(1.0, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    samples: int = Field(1, ge=1, le=1024)
    seeds: list[int] = Field(default=[0], min_length=1)


PRESETS = {
    # arXiv 2505.19590: greedy everywhere, the training prompt (3B's here; --prompt names another). It gives no limit on
    # tokens: those of training are taken.
    "paper": Protocol(preset="paper"),
    # What the code base that it started from evaluates with.
    "open_r1": Protocol(preset="open_r1", temperature=0.6, top_p=0.95, max_tokens=32768),
}


def described(protocol: Protocol) -> str:
    """The preset, and in what it was departed from."""
    base = PRESETS[protocol.preset]
    words = {
        "prompt": "no prompt around problems" if protocol.prompt is None else f"prompt {protocol.prompt}",
        "plain": "no chat template" if protocol.plain else "chat template",
        "temperature": f"temperature {protocol.temperature:g}",
        "top_p": f"top-p {protocol.top_p:g}",
        "max_tokens": f"at most {protocol.max_tokens} tokens",
        "samples": f"{protocol.samples} answers to each question",
        "seeds": f"{len(protocol.seeds)} seeds",
    }
    changes = [text for name, text in words.items() if getattr(protocol, name) != getattr(base, name)]
    return protocol.preset + (f", but {', '.join(changes)}" if changes else "")


@dataclass(frozen=True)
class Asked:
    """One answer to be had. `key` names it in the ledger: whatever decides the answer is in it, and nothing else."""

    benchmark: Benchmark
    item: Item
    seed: int
    sample: int
    messages: list[Message] | None
    prompt: str | None
    sampling: Sampling
    key: str


def _turns(benchmark: Benchmark, item: Item, protocol: Protocol) -> list[Message]:
    if benchmark.math and protocol.prompt is not None:
        return named(protocol.prompt).messages(item.prompt)
    return [Message(role="user", content=item.prompt)]


def asked(benchmark: Benchmark, items: list[Item], protocol: Protocol, identity: str) -> Iterator[Asked]:
    """Everything that the protocol asks of a model, item by item."""
    for item in items:
        turns = _turns(benchmark, item, protocol)
        is_plain = protocol.plain or not benchmark.chat
        prompt = "\n\n".join(turn.content for turn in turns) if is_plain else None
        for seed in protocol.seeds:
            for sample in range(protocol.samples):
                sampling = Sampling(
                    temperature=protocol.temperature,
                    top_p=protocol.top_p,
                    max_tokens=protocol.max_tokens or benchmark.max_tokens,
                    seed=group_seed(seed, f"{benchmark.name}/{item.id}/{sample}"),
                    stop=list(benchmark.stop),
                )
                decides: list[Any] = [
                    identity,
                    None if is_plain else [turn.model_dump() for turn in turns],
                    prompt,
                    sampling.model_dump(),
                ]
                key = content_id(benchmark.name, item.id, orjson.dumps(decides).decode())
                messages = None if is_plain else turns
                yield Asked(benchmark, item, seed, sample, messages, prompt, sampling, key)
