"""The policy: a causal language model that returns the logprobs of given tokens, never the logits of a whole batch."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from services.model_folder import attention_for
from services.recipe import Model, RecipeError
from services.recipe_sections import Lora
from services.weights.adapter import DOWN, UP, merged
from trainer import lora, packing
from trainer.head import Head
from trainer.packing import Packed

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

PACKED = {"sdpa": packing.SDPA, "flash_attention_2": packing.FLASH}

UNSUPPORTED = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Configuration keys of models whose logits are not the plain product of hidden state and LM head."""


class Policy(nn.Module):
    """`forward(packed, positions [T], targets [T], temperatures [T])` -> float32 (logprobs, entropies) [T].

    `positions` index the row's L hidden states and name those that produced `targets`. Logits are divided by the
    temperature first, as they were for sampling; both results, in nats and with gradients, are of that distribution.
    A model that cannot take packed rows is given padded ones.
    """

    def __init__(self, model: "PreTrainedModel", tile_elements: int | None = None) -> None:
        super().__init__()
        self.model = model
        self.vocab_size: int = model.config.vocab_size
        self.packs = model.config._attn_implementation in (packing.SDPA, packing.FLASH)
        self.head = Head(cast(nn.Linear, model.get_output_embeddings()), self.vocab_size, tile_elements)

    def forward(
        self, packed: Packed, positions: Tensor, targets: Tensor, temperatures: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.packs:
            inputs = {"input_ids": packed.input_ids, "position_ids": packed.position_ids, "packed": packed}
            hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state[0]
        else:
            # Padding stands to the right, where causal attention never looks back at it: no mask is needed.
            rows, places = packed.rows()
            hidden = self.model.base_model(input_ids=rows, use_cache=False).last_hidden_state.flatten(0, 1)
            positions = places[positions]
        return self.head(hidden[positions], targets, temperatures)

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
            attn_implementation=_attention(config, settings),
            **where,
        )
    except (OSError, ValueError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"model.path: cannot load {settings.path!r}: {error}") from error
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if settings.lora is not None:
        lora.attach(model, settings.lora)
    return Policy(model.train())


def _attention(config: "PreTrainedConfig", settings: Model) -> str:
    """The packed form of what the recipe asks for, where the model can; plain attention over padded rows otherwise."""
    wanted = attention_for(config, settings.attn_implementation)
    packs = packing.fits(config.model_type, getattr(config, "layer_types", None)) and not settings.trust_remote_code
    if not packs or wanted not in PACKED:
        return wanted
    if wanted == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise RecipeError("model.attn_implementation: flash_attention_2 needs the package flash-attn; use sdpa")
    packing.register()
    return PACKED[wanted]


def reference(settings: Model) -> Policy:
    """The frozen base model that the KL term is taken to."""
    return load(settings.model_copy(update={"lora": None})).requires_grad_(False).eval()


class WithoutAdapters(nn.Module):
    """Called like the policy, and is the base model that its adapters stand on: it needs no memory of its own."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        # In a list: the weights belong to the policy.
        self.policy = [policy]

    def forward(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        with lora.disabled(self.policy[0]):
            return self.policy[0](*inputs)


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


def tensors(policy: Policy, partitioned: bool, adapters: Lora | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every weight once, under its Hugging Face name, whole, on the CPU; tied weights under the first of their names,
    `adapters` merged into theirs.

    `partitioned` (ZeRO stage 3): each tensor is gathered when its turn comes, so every rank must run the whole
    iteration.
    """
    model = policy.model
    parameters = dict(model.named_parameters())
    for name in parameters:
        own, parts = lora.plain(name), lora.family(name)
        if own is None:
            continue
        whole = _whole([parameters[part] for part in parts or (name,)], partitioned)
        if parts is not None and adapters is not None:
            weight, down, up = whole
            yield own, merged(weight, down, up, lora.scale(adapters))
        else:
            yield own, whole[0]
    persistent = model.state_dict(keep_vars=True).keys()
    for name, buffer in model.named_buffers():
        if name in persistent:
            yield name, buffer.detach().cpu()


def adapters(policy: Policy, partitioned: bool) -> Iterator[tuple[str, Tensor]]:
    """A and B of every adapted layer, as versions of adapters name them; whole, on the CPU. `partitioned` as above."""
    parameters = dict(policy.model.named_parameters())
    for name in parameters:
        if (parts := lora.family(name)) is not None:
            _, *halves = parts
            for half, whole in zip((DOWN, UP), _whole([parameters[part] for part in halves], partitioned), strict=True):
                yield name.removesuffix(lora.BASE) + half, whole


def _whole(parameters: list[nn.Parameter], partitioned: bool) -> list[Tensor]:
    if not partitioned:
        return [parameter.detach().cpu() for parameter in parameters]
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        # Copies: the gathered buffers are partitioned again when this block ends.
        return [parameter.detach().to("cpu", copy=True) for parameter in parameters]
