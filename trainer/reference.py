"""The policy that the KL term is taken to: the frozen base model, or a moving average of what is trained."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from services.recipe import Recipe, RecipeError
from trainer import engine as engines
from trainer import policy as policies
from trainer.batch import MicroBatch
from trainer.policy import Policy
from trainer.ranks import Ranks

FILE = "reference.safetensors"
"""In a checkpoint: the moving average. A frozen reference is the base model, which the recipe names."""


class Reference:
    """`module` is called like the policy, inside `at_hand`. With a `decay` it follows the trained weights."""

    def __init__(
        self,
        module: nn.Module,
        at_hand: Callable[[], AbstractContextManager[Any]] = nullcontext,
        decay: float | None = None,
    ) -> None:
        self.module, self.at_hand, self.decay = module, at_hand, decay
        # In bfloat16 a small share of a small change rounds to nothing: the average itself is kept in float32.
        self.average = {name: p.data.float() for name, p in module.named_parameters()} if decay is not None else {}

    @torch.no_grad()
    def logprobs(self, micro: MicroBatch) -> Tensor:
        """float32 [T]; to be called inside `at_hand`, for all of a step's micro-batches at once."""
        return self.module(micro.packed, micro.positions, micro.targets, micro.temperatures)[0]

    @torch.no_grad()
    def follow(self, trained: Policy) -> None:
        """After a step: take up 1 - decay of the trained weights. Nothing where the reference is frozen."""
        if self.decay is None:
            return
        weights = dict(trained.named_parameters())
        for name, own in self.module.named_parameters():
            average = self.average[name]
            average.lerp_(weights[name].detach().to(average.device, torch.float32), 1 - self.decay)
            own.data.copy_(average)

    def save(self, folder: Path) -> None:
        """Write `reference.safetensors` into a checkpoint's folder; nothing where the reference is frozen. For rank 0:
        every rank has the same."""
        if self.decay is not None:
            save_file({name: average.contiguous() for name, average in self.average.items()}, folder / FILE)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Go on from a checkpoint, on every rank. Raises RecipeError when it holds no moving average."""
        if self.decay is None:
            return
        if not (folder / FILE).exists():
            raise RecipeError(
                f"trainer.reference.kind: ema, but checkpoint {folder} was saved with a frozen reference or none; "
                "go on with kind: frozen"
            )
        for name, saved in load_file(folder / FILE).items():
            self.average[name].copy_(saved)
        for name, own in self.module.named_parameters():
            own.data.copy_(self.average[name])


def start(recipe: Recipe, ranks: Ranks, trained: Policy) -> Reference | None:
    """The reference of a recipe, ready on this rank; none without a KL term. Where only adapters are trained, it is
    the `trained` model with these switched off."""
    trainer = recipe.trainer
    if trainer.kl_beta == 0:
        return None
    if recipe.model.lora is not None:
        return Reference(policies.WithoutAdapters(trained))
    base = policies.reference(recipe.model)
    decay = trainer.reference.decay if trainer.reference.kind == "ema" else None
    if trainer.zero_stage == 3 or not trainer.reference.offload:
        return Reference(engines.start_frozen(base, recipe, ranks), decay=decay)
    _leave_at_home(base, ranks.device)
    return Reference(base, partial(_visiting, base, ranks.device), decay)


def _leave_at_home(model: nn.Module, device: torch.device) -> None:
    """Weights to the CPU's memory, ready for fast copies; buffers, which are small, to the device."""
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    for parameter in model.parameters():
        parameter.data = parameter.data.pin_memory() if device.type == "cuda" else parameter.data


@contextmanager
def _visiting(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The weights on the device: a copy in and none out, for they do not change there."""
    home = [(parameter, parameter.data) for parameter in model.parameters()]
    for parameter, data in home:
        parameter.data = data.to(device, non_blocking=True)
    try:
        yield
    finally:
        for parameter, data in home:
            parameter.data = data
