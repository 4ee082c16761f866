"""Run as one of several ranks (or alone) by test_trainer.py: `trainer_worker.py CASES.json`.

Each case names a recipe, batches of packed groups and an output folder: trains on them without a queue, and writes the
results and, from rank 0, the final weights.
"""

import dataclasses
import json
import sys
from pathlib import Path

import psutil
import torch
from safetensors.torch import save_file

from services import codec, recipe
from services.contract import ScoredGroup
from trainer import checkpoint
from trainer import engine as engines
from trainer import policy as policies
from trainer import ranks as rank_groups
from trainer import reference as references
from trainer.batch import sequences
from trainer.step import train_step


def run(case: dict, ranks: rank_groups.Ranks) -> None:
    settings = recipe.parse(case["recipe"])
    engines.check(settings)
    policy = policies.load(settings.model, settings.trainer.gradient_checkpointing)
    if case.get("tile_elements"):
        policy.head.tile_elements = case["tile_elements"]
    engine = engines.start(policy, settings, ranks)
    reference = references.start(settings, ranks, policy)
    results = []
    for step, batch in enumerate(case["batches"]):
        groups = [codec.unpack_as(ScoredGroup, bytes.fromhex(text)) for text in batch]
        result = train_step(
            engine, reference, sequences(groups, policy.vocab_size), step, settings.trainer, ranks, settings.run.seed
        )
        results.append(dataclasses.asdict(result))
    weights = dict(policies.tensors(policy, partitioned=settings.trainer.zero_stage == 3, adapters=settings.model.lora))
    halves = dict(policies.adapters(policy, partitioned=settings.trainer.zero_stage == 3))
    if ranks.first:
        out = Path(case["out"])
        out.mkdir(parents=True)
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, out / "weights.safetensors")
        if halves:
            save_file({name: tensor.contiguous() for name, tensor in halves.items()}, out / "adapter.safetensors")
        (out / "results.json").write_text(json.dumps(results))
    if case.get("checkpoint"):
        checkpoint.save(engine, Path(case["checkpoint"]), checkpoint.Progress(len(results)), settings, ranks)
    engine.destroy()


def main(path: str) -> None:
    cases = json.loads(Path(path).read_text())
    torch.use_deterministic_algorithms(True)
    with rank_groups.join(recipe.parse(cases[0]["recipe"]).trainer) as ranks:
        for case in cases:
            run(case, ranks)
        listening = [one.laddr.ip for one in psutil.Process().net_connections("inet") if one.status == "LISTEN"]
        Path(path).with_name(f"listening-{ranks.rank}.json").write_text(json.dumps(listening))


if __name__ == "__main__":
    main(sys.argv[1])
