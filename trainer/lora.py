"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) by peft: the base model is frozen, each target layer trains
W + alpha / rank * B A. What leaves the trainer - published weights, exports - has them added to the base weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from services.recipe import RecipeError
from services.recipe_sections import Lora

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BASE, DOWN, UP = ".base_layer.weight", ".lora_A.default.weight", ".lora_B.default.weight"
"""What peft appends to a target layer's name."""


def attach(model: "PreTrainedModel", settings: Lora) -> None:
    """Freeze `model` and put adapters into it, in its dtype. B is 0: nothing changes yet.

    Raises RecipeError when a target names no linear layer of the model, or the LM head.
    """
    from peft import LoraConfig, inject_adapter_in_model

    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for target in settings.targets:
        if not any(name.split(".")[-1] == target for name in names) or target == "lm_head":
            there = sorted({name.split(".")[-1] for name in names} - {"lm_head"})
            raise RecipeError(f"model.lora.targets: {target!r} is none of the model's layers: {', '.join(there)}")
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=settings.targets, bias="none")
    model.requires_grad_(False)
    # The same A on every rank and at every start, without a trace in the random state.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith((DOWN, UP)))
        parameter.data = parameter.data.to(model.dtype)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within, `model` is the base model."""
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    for layer in layers:
        # peft's own switch would also stop the adapters' gradients.
        layer._disable_adapters = True  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False  # type: ignore[assignment]


def family(name: str) -> tuple[str, str, str] | None:
    """The names of a target layer's base weight, A and B, by the first of them; none for any other name."""
    if not name.endswith(BASE):
        return None
    layer = name.removesuffix(BASE)
    return name, layer + DOWN, layer + UP


def plain(name: str) -> str | None:
    """The Hugging Face name of a tensor; none for an adapter's, which has none."""
    return None if name.endswith((DOWN, UP)) else name.replace(".base_layer.", ".")


def merged(weight: Tensor, down: Tensor, up: Tensor, settings: Lora) -> Tensor:
    """W + alpha / rank * B A, multiplied and added in float32, in W's dtype. [out, in], [rank, in], [out, rank]."""
    return (weight.float() + settings.alpha / settings.rank * (up.float() @ down.float())).to(weight.dtype)


def merge(tensors: dict[str, Any], settings: Lora) -> dict[str, Tensor]:
    """All tensors of a model with adapters -> those of the model they make, under its Hugging Face names."""
    result = {}
    for name, tensor in tensors.items():
        if (own := plain(name)) is not None:
            parts = family(name)
            if parts is not None:
                weight, down, up = (tensors[part] for part in parts)
                tensor = merged(weight, down, up, settings)
            result[own] = tensor
    return result
