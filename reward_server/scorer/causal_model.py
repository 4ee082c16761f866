"""A Hugging Face causal language model as the scorer reads it: hidden states of its decoder, and its LM head."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from reward_server.scorer.head import Head, check_head, head_of
from services.model_folder import attention_for

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class CausalModel:
    """`head` belongs to the weights that the model has now. `max_length`: positions, or none."""

    model: Any
    decoder: Any
    head: Head
    config: Any
    tokenizer: Any

    @classmethod
    def load(
        cls, path: str, dtype: str, device: torch.device, attn_implementation: str = "sdpa", **source: Any
    ) -> "CausalModel":
        """`source`: revision and trust_remote_code. Raises ValueError: an unknown dtype, a folder without tokenizer, or
        a model whose logits cannot be reproduced; OSError: no such model."""
        if dtype not in DTYPES:
            raise ValueError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
        tokenizer: Any = AutoTokenizer.from_pretrained(path, **source)
        if len(tokenizer) < 2:  # what transformers makes up for a folder that has no tokenizer
            raise ValueError("has no tokenizer files")
        auto: Any = AutoModelForCausalLM
        model = auto.from_pretrained(path, dtype=DTYPES[dtype], attn_implementation=attn_implementation, **source)
        model.set_attn_implementation(attention_for(model.config, attn_implementation))
        model.to(device).eval().requires_grad_(False)
        decoder, head = model.get_decoder(), head_of(model)
        check_head(model, decoder, head)
        return cls(model, decoder, head, model.config.get_text_config(), tokenizer)

    @property
    def max_length(self) -> int | None:
        return getattr(self.config, "max_position_embeddings", None)

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """[sequences, tokens, H] of ids [sequences, tokens], padded on the right."""
        return self.decoder(input_ids=ids, use_cache=False).last_hidden_state


def check_same_vocabulary(model: CausalModel, reference: CausalModel) -> None:
    """Raises ValueError when a token id means something else to the reference: a divergence would be of nothing."""
    if model.head.vocab_size != reference.head.vocab_size:
        sizes = f"{reference.head.vocab_size} entries, the scorer's {model.head.vocab_size}"
        raise ValueError(f"its vocabulary has {sizes}")
    own, other = model.tokenizer.get_vocab(), reference.tokenizer.get_vocab()
    for token in own.keys() & other.keys():
        if own[token] != other[token]:
            raise ValueError(f"its tokenizer has {token!r} as id {other[token]}, the scorer's as {own[token]}")
