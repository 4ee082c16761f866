"""The policy: a causal language model that returns the logprobs of given tokens, never the logits of a whole batch."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from services.model_folder import attention_for
from services.recipe import Model, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TILE_ELEMENTS = 2**26
"""Logits held at a time: 256 MiB in float32."""

UNSUPPORTED = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Configuration keys of models whose logits are not the plain product of hidden state and LM head."""


class Head(nn.Module):
    """Hidden states -> logprob and entropy per token, tile by tile through the LM head of `vocab_size` rows."""

    def __init__(self, linear: nn.Linear, vocab_size: int, tile_elements: int = TILE_ELEMENTS) -> None:
        super().__init__()
        # In a list, so that the layer stays a child of the language model alone.
        self.linear = [linear]
        self.vocab_size = vocab_size
        self.tile_rows = max(1, tile_elements // vocab_size)

    def forward(self, hidden: Tensor, targets: Tensor, temperatures: Tensor) -> tuple[Tensor, Tensor]:
        linear = self.linear[0]
        weight = linear.weight[: self.vocab_size]
        bias = None if linear.bias is None else linear.bias[: self.vocab_size]
        if len(hidden) <= self.tile_rows:
            return _tile(hidden, weight, bias, targets, temperatures)
        tiles = [
            # Recomputed in the backward pass, so that only one tile of logits exists at any time.
            checkpoint(_tile, h, weight, bias, y, t, use_reentrant=False, preserve_rng_state=False)
            for h, y, t in zip(*(x.split(self.tile_rows) for x in (hidden, targets, temperatures)), strict=True)
        ]
        logprobs, entropies = zip(*tiles, strict=True)
        return torch.cat(logprobs), torch.cat(entropies)


def _tile(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperatures: Tensor
) -> tuple[Tensor, Tensor]:
    logits = F.linear(hidden, weight, bias).float() / temperatures[:, None]
    normaliser = logits.logsumexp(-1)
    logprobs = logits.gather(-1, targets[:, None])[:, 0] - normaliser
    entropies = normaliser - ((logits - normaliser[:, None]).exp() * logits).sum(-1)
    return logprobs, entropies


class Policy(nn.Module):
    """`forward(input_ids [R, W], positions [T], targets [T], temperatures [T])` -> float32 (logprobs, entropies) [T].

    Rows are padded on the right, and no attention mask is needed. `positions` index the flattened R*W hidden states and
    name those that produced `targets`. Logits are divided by the temperature first, as they were for sampling; both
    results, in nats, are of that distribution. Both carry a gradient.
    """

    def __init__(self, model: "PreTrainedModel", tile_elements: int = TILE_ELEMENTS) -> None:
        super().__init__()
        self.model = model
        self.vocab_size: int = model.config.vocab_size
        self.head = Head(cast(nn.Linear, model.get_output_embeddings()), self.vocab_size, tile_elements)

    def forward(
        self, input_ids: Tensor, positions: Tensor, targets: Tensor, temperatures: Tensor
    ) -> tuple[Tensor, Tensor]:
        hidden = self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        return self.head(hidden.flatten(0, 1)[positions], targets, temperatures)

    @property
    def head_parameters(self) -> list[nn.Parameter]:
        return list(self.head.linear[0].parameters())


def load(settings: Model, gradient_checkpointing: bool = False) -> Policy:
    """The model of a recipe, on the CPU, in its dtype, with every dropout off (rollouts know none).

    Raises RecipeError when it cannot be loaded or its logits are not a plain LM head's.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    where = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(settings.path, **where)
        for key in UNSUPPORTED:
            if getattr(config, key, None) not in (None, 0, 1, 1.0):
                raise RecipeError(f"model.path: {settings.path!r} scales its logits ({key}), which is not supported")
        for key, value in config.to_dict().items():
            if isinstance(value, float) and ("dropout" in key or key.endswith("_pdrop")):
                setattr(config, key, 0.0)
        model = AutoModelForCausalLM.from_pretrained(
            settings.path,
            config=config,
            dtype=getattr(torch, settings.dtype),
            attn_implementation=attention_for(config, settings.attn_implementation),
            **where,
        )
    except (OSError, ValueError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"model.path: cannot load {settings.path!r}: {error}") from error
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Policy(model.train())


def reference(settings: Model) -> Policy:
    """The frozen base model that the KL term is taken to."""
    return load(settings).requires_grad_(False).eval()


def save_files(settings: Model, directory: Path) -> None:
    """Write what a loadable model folder needs beside the weights: configuration, generation settings, tokenizer."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    where = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    config = AutoConfig.from_pretrained(settings.path, **where)
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(directory)
    AutoTokenizer.from_pretrained(settings.path, **where).save_pretrained(directory)
    try:
        GenerationConfig.from_pretrained(settings.path, revision=settings.revision or "main").save_pretrained(directory)
    except OSError:
        # Many models come without generation settings; then there are none to pass on.
        pass


def tensors(policy: Policy, partitioned: bool) -> Iterator[tuple[str, Tensor]]:
    """Every weight once, under its Hugging Face name, whole, on the CPU; tied weights under the first of their names.

    `partitioned` (ZeRO stage 3): each tensor is gathered when its turn comes, so every rank must run the whole
    iteration.
    """
    model = policy.model
    for name, parameter in model.named_parameters():
        if partitioned:
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                # A copy of its own: the gathered buffer is partitioned again when this block ends.
                whole = parameter.detach().to("cpu", copy=True)
            yield name, whole
        else:
            yield name, parameter.detach().cpu()
    persistent = model.state_dict(keep_vars=True).keys()
    for name, buffer in model.named_buffers():
        if name in persistent:
            yield name, buffer.detach().cpu()
