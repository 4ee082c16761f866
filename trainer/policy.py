"""The policy: a causal language model that returns the logprobs of given tokens, never the logits of a whole batch."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from services.model_folder import attention_for
from services.recipe import Model, RecipeError
from trainer.head import Head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

UNSUPPORTED = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Configuration keys of models whose logits are not the plain product of hidden state and LM head."""


class Policy(nn.Module):
    """`forward(input_ids [R, W], positions [T], targets [T], temperatures [T])` -> float32 (logprobs, entropies) [T].

    Rows are padded on the right, and no attention mask is needed. `positions` index the flattened R*W hidden states and
    name those that produced `targets`. Logits are divided by the temperature first, as they were for sampling; both
    results, in nats and with gradients, are of that distribution.
    """

    def __init__(self, model: "PreTrainedModel", tile_elements: int | None = None) -> None:
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
