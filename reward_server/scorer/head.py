"""A causal model's LM head, taken apart: weight, bias and whatever the model does to its logits afterwards."""

from dataclasses import dataclass
from typing import Any

import torch

PROBE_TOKENS = 4
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""Largest difference between our logits and the model's own, as a share of the largest logit."""


@dataclass(frozen=True)
class Head:
    """logits = softcap(scale * (hidden @ weight.T + bias)), softcap(z) = cap * tanh(z / cap).

    `weight` [V, H] holds the V rows that the model's config counts. `mean_weight` (float64 [H]) and `mean_bias` make
    the mean logit a dot product: mean_j z_j = scale * (hidden . mean_weight + mean_bias), when there is no softcap.
    """

    weight: torch.Tensor
    mean_weight: torch.Tensor
    bias: torch.Tensor | None = None
    mean_bias: float = 0.0
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(
        cls, weight: torch.Tensor, bias: torch.Tensor | None = None, scale: float = 1.0, softcap: float | None = None
    ) -> "Head":
        """Averages the rows in float64."""
        total = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
        for block in weight.split(1024):
            total += block.sum(0, dtype=torch.float64)
        mean_bias = 0.0 if bias is None else bias.double().mean().item()
        return cls(weight, total / weight.shape[0], bias, mean_bias, scale, softcap)

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]


def head_of(model: Any) -> Head:
    """The head of a transformers causal model. Raises ValueError for one this module cannot reproduce exactly."""
    config = model.config.get_text_config()
    linear = model.get_output_embeddings()
    weight = getattr(linear, "weight", None)
    if model.config.is_encoder_decoder or weight is None or weight.dim() != 2:
        raise ValueError(f"model: {type(model).__name__} has no causal LM head with a weight matrix")
    vocab_size = config.vocab_size
    if weight.shape[0] < vocab_size:
        raise ValueError(f"model: the LM head has {weight.shape[0]} rows but config.vocab_size is {vocab_size}")
    bias = getattr(linear, "bias", None)
    return Head.of(
        weight.detach()[:vocab_size],
        None if bias is None else bias.detach()[:vocab_size],
        _scale(config),
        getattr(config, "final_logit_softcapping", None),
    )


def _scale(config: Any) -> float:
    """The factor on the logits: Granite divides, HyperCLOVA X, Cohere and Falcon-H1 multiply."""

    def factor(name: str) -> float:
        value = getattr(config, name, None)
        return 1.0 if value is None else float(value)

    scaling = factor("logits_scaling")
    scaling = 1 / scaling if config.model_type.startswith("granite") else scaling
    return factor("logit_scale") * factor("lm_head_multiplier") * scaling


@torch.inference_mode()
def check_head(model: Any, decoder: Any, head: Head) -> None:
    """Compare with the model's own logits on a few tokens: an unknown step after the head is refused, not missed.

    Raises ValueError.
    """
    ids = torch.arange(PROBE_TOKENS, device=head.weight.device)[None] % head.vocab_size
    hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state[0]
    compare_logits(type(model).__name__, hidden, model(input_ids=ids, use_cache=False).logits[0], head)


def compare_logits(name: str, hidden: torch.Tensor, own: torch.Tensor, head: Head) -> None:
    """`own`: the logits that model `name` makes of `hidden` [T, H], from the head's first row on. Raises ValueError."""
    own = own[:, : head.vocab_size].float()
    logits = torch.nn.functional.linear(hidden, head.weight, head.bias).float() * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    error = (logits - own).abs().max().item()
    largest = own.abs().max().item()
    if not error <= PROBE_TOLERANCE[head.weight.dtype] * max(largest, 1e-3):
        raise ValueError(
            f"model: {name} does something to its logits that the scorer does not know "
            f"(largest logit {largest:.4g}, differs by {error:.4g}); it cannot be scored exactly"
        )
