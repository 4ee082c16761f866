"""Run as ranks by test_reshard.py: `reshard_worker.py CASES.json`.

Each case trains a toy on `batches` (from step `first` on), restored from the checkpoint `load` when given, saves the
checkpoint `save`, writes the moving reference to `average`, trains the step after it, and writes its weights to `out`;
with `again` it goes back to `save` on the same engine and trains that step once more, into `again`.
"""

import dataclasses
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from services import recipe
from trainer import checkpoint
from trainer import engine as engines
from trainer import ranks as rank_groups
from trainer.checkpoint import Progress
from trainer.pieces import Pieces
from trainer.reference import Reference


class Toy(nn.Module):
    """Sizes that no number of ranks divides; returns the loss of a batch."""

    head_parameters = ()

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.model = nn.Sequential(nn.Linear(7, 13), nn.Tanh(), nn.LayerNorm(13), nn.Linear(13, 3), nn.Linear(3, 1))
        self.model.register_buffer("scale", torch.ones(()))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        dtype = self.model[0].weight.dtype
        return (self.model(inputs.to(dtype)).float().squeeze(-1) * self.model.scale - inputs[:, 0]).square().mean()


def batch(step: int, ranks: rank_groups.Ranks) -> torch.Tensor:
    """This rank's share of step number `step`."""
    whole = torch.randn(8, 7, generator=torch.Generator().manual_seed(step))
    return whole.view(ranks.size, -1, 7)[ranks.rank]


def train(engine, step: int, ranks: rank_groups.Ranks) -> None:
    engine.set_gradient_accumulation_boundary(True)
    engine.backward(engine(batch(step, ranks)), scale_wrt_gas=False)
    engine.step()


def write(engine, path: str, ranks: rank_groups.Ranks) -> None:
    import deepspeed

    module = getattr(engine, "module", engine)
    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        if ranks.first:
            save_file({name: p.detach().clone() for name, p in module.named_parameters()}, path)


def run(case: dict, ranks: rank_groups.Ranks) -> None:
    settings = recipe.parse(case["recipe"])
    toy = Toy().to(getattr(torch, settings.model.dtype))
    base = Toy().to(getattr(torch, settings.model.dtype)).requires_grad_(False)
    engine = engines.start(toy, settings, ranks)
    reference = Reference(engines.start_frozen(base, settings, ranks), decay=0.5)
    first = 0
    if case.get("load"):
        with torch.no_grad():
            toy.model.scale.zero_()
        checkpoint.load(engine, Path(case["load"]), ranks)
        reference.load(Pieces(checkpoint.rank_folders(Path(case["load"]))), Path(case["load"]))
        first = checkpoint.state(Path(case["load"]))["step"]
    for step in range(first, case["steps"]):
        train(engine, step, ranks)
        reference.follow(toy)
    progress = Progress(step=case["steps"], lineage=case["lineage"])
    saved = checkpoint.save(engine, Path(case["checkpoints"]), progress, settings, ranks, reference)
    write(reference.module, case["average"], ranks)
    train(engine, case["steps"], ranks)
    write(engine, case["out"], ranks)
    checkpoint.load(engine, saved, ranks)
    train(engine, case["steps"], ranks)
    write(engine, case["again"], ranks)
    engine.destroy()


def main(path: str) -> None:
    cases = json.loads(Path(path).read_text())
    torch.use_deterministic_algorithms(True)
    with rank_groups.join(recipe.parse(cases[0]["recipe"]).trainer) as ranks:
        for case in cases:
            run(case, dataclasses.replace(ranks))


if __name__ == "__main__":
    main(sys.argv[1])
