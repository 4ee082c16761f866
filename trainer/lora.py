"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) by peft: the base model is frozen, each target layer trains
W + alpha / rank * B A. Versions hold A and B alone; every follower, and `rlif export`, adds them to the base model."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from services.contract import Adapter
from services.model_folder import model_folder
from services.recipe import Model, RecipeError
from services.recipe_sections import Lora
from services.weights import adapter as adapters
from services.weights.shapes import tensor_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

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


def scale(settings: Lora) -> float:
    return settings.alpha / settings.rank


def published(model: nn.Module, settings: Model) -> Adapter | None:
    """What the versions of a `model` with adapters stand on: the base model's own files, which the servers have, too.

    None where those files name the adapted weights otherwise than the model does: then its merged weights are to be
    published. Raises StartupError: the files are not there. To be called before DeepSpeed has the model.
    """
    assert settings.lora is not None
    folder = model_folder(settings.path, settings.revision)
    there = tensor_shapes(folder)
    for name, parameter in model.named_parameters():
        own = plain(name)
        if family(name) is not None and there.get(str(own)) != tuple(parameter.shape):
            log.warning("%s has no %s of this shape: versions hold merged weights, not adapters", folder, own)
            return None
    return adapters.of(folder, settings.dtype, scale(settings.lora))
