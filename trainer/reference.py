"""The policy that the KL term is taken to: the frozen base model, or a moving average of what is trained."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from services.recipe import Model, Recipe, RecipeError
from trainer import engine as engines
from trainer import policy as policies
from trainer.batch import MicroBatch
from trainer.pieces import AVERAGE, Pieces
from trainer.policy import Policy
from trainer.ranks import Ranks


class Reference:
    """`module` is called like the policy, inside `at_hand`. With a `decay` it follows the trained weights: each rank
    with what it holds of them, its share with ZeRO stage 3, else all."""

    def __init__(
        self,
        module: nn.Module,
        at_hand: Callable[[], AbstractContextManager[Any]] = nullcontext,
        decay: float | None = None,
    ) -> None:
        self.module, self.at_hand, self.decay = module, at_hand, decay
        self._forget = getattr(module, "empty_partition_cache", None)
        """With ZeRO stage 3: gathered weights that are older than the shares are not used again."""
        own: Any = module.module if self._forget is not None else module
        self._parameters = dict(own.named_parameters()) if decay is not None else {}
        # In bfloat16 a small share of a small change rounds to nothing: the average itself is kept in float32.
        self.average = {name: _held(parameter).float() for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def logprobs(self, micro: MicroBatch) -> Tensor:
        """float32 [T]; to be called inside `at_hand`, for all of a step's micro-batches at once."""
        return self.module(micro.packed, micro.positions, micro.targets, micro.temperatures)[0]

    @torch.no_grad()
    def follow(self, trained: nn.Module) -> None:
        """After a step: take up 1 - decay of the trained weights. Nothing where the reference is frozen."""
        if self.decay is None:
            return
        for name, parameter in trained.named_parameters():
            average = self.average[name]
            average.lerp_(_held(parameter).to(average.device, torch.float32), 1 - self.decay)
        self._take_average()

    def parts(self, ranks: Ranks) -> Iterator[tuple[str, int, str, Tensor]]:
        """What this rank writes into a checkpoint, as (kind, start, name, float32 [n]); nothing where the reference is
        frozen, and where every rank has the same, nothing but on the first."""
        for name, parameter in self._parameters.items():
            start, count = _place(parameter)
            if count and (hasattr(parameter, "ds_tensor") or ranks.first):
                yield AVERAGE, start, name, self.average[name].view(-1)[:count]

    @torch.no_grad()
    def load(self, saved: Pieces, folder: Path) -> None:
        """Go on from a checkpoint, on every rank; `saved` is what the ranks wrote into it, however many they were.
        Raises RecipeError when it holds no moving average."""
        if self.decay is None:
            return
        if next(saved.names(AVERAGE), None) is None:
            raise RecipeError(
                f"trainer.reference.kind: ema, but checkpoint {folder} was saved with a frozen reference or none; "
                "go on with kind: frozen"
            )
        for name, parameter in self._parameters.items():
            start, count = _place(parameter)
            if count:
                self.average[name].view(-1)[:count] = saved.read(name, AVERAGE, start, count)
        self._take_average()

    def _take_average(self) -> None:
        if self._forget is not None:
            self._forget()
        for name, parameter in self._parameters.items():
            _held(parameter).copy_(self.average[name])


def _held(parameter: nn.Parameter) -> Tensor:
    """What this rank has of a parameter: its share, flattened and padded, with ZeRO stage 3, else the whole."""
    return getattr(parameter, "ds_tensor", parameter).data


def _place(parameter: nn.Parameter) -> tuple[int, int]:
    """Where in the flattened parameter that begins, and how many elements of it are no padding."""
    if not hasattr(parameter, "ds_tensor"):
        return 0, parameter.numel()
    share: Any = parameter
    start = share.partition_numel() * share.ds_zero_partition_rank
    return start, max(0, min(share.partition_numel(), share.ds_numel - start))


def start(recipe: Recipe, ranks: Ranks, trained: Policy, begun: Model | None = None) -> Reference | None:
    """The reference of a recipe, ready on this rank; none without a KL term. Where only adapters are trained, it is
    the `trained` model with these switched off. `begun`: what training begins with, where that is not the recipe's
    model; a moving average begins there, too."""
    trainer = recipe.trainer
    if trainer.kl_beta == 0:
        return None
    if recipe.model.lora is not None:
        return Reference(policies.WithoutAdapters(trained))
    decay = trainer.reference.decay if trainer.reference.kind == "ema" else None
    base = policies.reference(recipe.model if decay is None or begun is None else begun)
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
