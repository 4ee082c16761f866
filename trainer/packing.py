"""Sequences end to end in one row: no padding, and a prompt that several completions share stands there once.

A family is a prompt and completions of it; its tokens lie one after the other. Of a completion the last token is left
out: nothing is predicted from it. A completion's positions go on from its prompt's, and it attends to its prompt and
itself. Everything but attention works token by token and need not know.
"""

from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

SDPA, FLASH = "rlif_packed_sdpa", "rlif_packed_varlen"
"""Names under which transformers finds these attentions; it looks for kernels of its own where a name has `flash`."""

MODELS = frozenset({"gemma", "granite", "llama", "mistral", "olmo2", "qwen2", "qwen2_moe", "qwen3", "smollm3"})
"""`model_type`s that pass what they do not know on to attention, and do nothing across tokens besides it."""


@dataclass(frozen=True)
class Family:
    """Lengths in the row: of the prompt (>= 1), and of each completion without its last token (>= 0)."""

    prompt: int
    completions: tuple[int, ...]

    @property
    def size(self) -> int:
        return self.prompt + sum(self.completions)


@dataclass(frozen=True)
class Varlen:
    """The same for a kernel of segments: queries in the row's order, keys gathered so that each completion has its
    prompt's before its own. `starts` int32 [segments + 1]; `keys` int64, into the row."""

    query_starts: Tensor
    key_starts: Tensor
    keys: Tensor
    longest_query: int
    longest_key: int


@dataclass(frozen=True)
class Packed:
    """`input_ids` and `position_ids` int64 [1, L]; `families` in the row's order, L tokens in all."""

    input_ids: Tensor
    position_ids: Tensor
    families: tuple[Family, ...]

    def to(self, device: torch.device, non_blocking: bool = False) -> "Packed":
        ids, places = (x.to(device, non_blocking=non_blocking) for x in (self.input_ids, self.position_ids))
        return Packed(ids, places, self.families)

    def __len__(self) -> int:
        return self.input_ids.shape[1]

    @cached_property
    def varlen(self) -> Varlen:
        queries: list[int] = []
        keys: list[Tensor] = []
        start = 0
        for family in self.families:
            prompt = torch.arange(start, start + family.prompt)
            queries.append(family.prompt)
            keys.append(prompt)
            start += family.prompt
            for length in filter(None, family.completions):
                queries.append(length)
                keys.append(torch.cat([prompt, torch.arange(start, start + length)]))
                start += length
        lengths = [len(each) for each in keys]
        device = self.input_ids.device
        query_starts, key_starts = (
            torch.tensor([0, *accumulate(x)], dtype=torch.int32, device=device) for x in (queries, lengths)
        )
        return Varlen(query_starts, key_starts, torch.cat(keys).to(device), max(queries), max(lengths))

    def rows(self) -> tuple[Tensor, Tensor]:
        """For models that cannot take it packed: padded rows [N, W], one a completion (one a family without any), and
        where each of the L tokens stands in the flattened rows; of a prompt, in its first completion's row."""
        ids, rows, places = self.input_ids[0], [], []
        start = 0
        for family in self.families:
            prompt = ids[start : start + family.prompt]
            start += family.prompt
            for number, length in enumerate(family.completions or (0,)):
                rows.append(torch.cat([prompt, ids[start : start + length]]))
                first = 0 if number == 0 else family.prompt
                places.append((len(rows) - 1, first, family.prompt + length))
                start += length
        padded = pad_sequence(rows, batch_first=True)
        width = padded.shape[1]
        where = torch.cat([torch.arange(row * width + first, row * width + end) for row, first, end in places])
        return padded, where.to(ids.device)


def attention_sdpa(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001 - transformers' signature
    scaling: float | None = None,
    packed: Packed | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Attention over a packed row by PyTorch's scaled_dot_product_attention, family by family.

    query [1, heads, L, width], key and value [1, key heads, L, width] -> [1, L, heads, width].
    """
    assert packed is not None
    _refuse(module, rest)
    attend = partial(F.scaled_dot_product_attention, scale=scaling, enable_gqa=query.shape[1] != key.shape[1])
    done, start = [], 0
    for family in packed.families:
        q, k, v = (x[:, :, start : start + family.size] for x in (query, key, value))
        start += family.size
        lengths = [length for length in family.completions if length]
        if len(lengths) <= 1:
            # Alone with its prompt a completion is a sequence like any other.
            done.append(attend(q, k, v, is_causal=True))
            continue
        prompt = family.prompt
        done.append(attend(q[:, :, :prompt], k[:, :, :prompt], v[:, :, :prompt], is_causal=True))
        q = _side_by_side(q[:, :, prompt:], lengths)
        k, v = (
            torch.cat([x[:, :, :prompt].expand(len(lengths), -1, -1, -1), _side_by_side(x[:, :, prompt:], lengths)], 2)
            for x in (k, v)
        )
        shape = (q.shape[2], k.shape[2])
        seen = torch.ones(shape, dtype=torch.bool, device=q.device).tril(prompt)
        out = attend(q, k, v, attn_mask=seen)
        done.append(torch.cat([row[:, :length] for row, length in zip(out, lengths, strict=True)], 1)[None])
    return torch.cat(done, 2).transpose(1, 2), None


def attention_flash(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001 - transformers' signature
    scaling: float | None = None,
    packed: Packed | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """The same by flash-attn's kernel for segments of any length; it aligns a shorter query with its keys' end."""
    from flash_attn import flash_attn_varlen_func

    assert packed is not None
    _refuse(module, rest)
    segments = packed.varlen
    out = flash_attn_varlen_func(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1)[segments.keys],
        value[0].transpose(0, 1)[segments.keys],
        cu_seqlens_q=segments.query_starts,
        cu_seqlens_k=segments.key_starts,
        max_seqlen_q=segments.longest_query,
        max_seqlen_k=segments.longest_key,
        softmax_scale=scaling,
        causal=True,
    )
    return out[None], None


def fits(model_type: str, layer_types: list[str] | None) -> bool:
    """Whether a model of transformers can be given packed rows."""
    return model_type in MODELS and set(layer_types or ["full_attention"]) == {"full_attention"}


def register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(SDPA, attention_sdpa)
    AttentionInterface.register(FLASH, attention_flash)


def _side_by_side(states: Tensor, lengths: list[int]) -> Tensor:
    """[1, heads, sum of lengths, width] -> [completions, heads, longest, width], padded at the end, where causal
    attention never looks back at it."""
    parts = [part.transpose(0, 1) for part in states[0].split(lengths, 1)]
    return pad_sequence(parts, batch_first=True).transpose(1, 2)


def _refuse(module: torch.nn.Module, rest: dict[str, Any]) -> None:
    for name in ("sliding_window", "softcap", "s_aux", "position_bias"):
        if rest.get(name) is not None:
            raise RuntimeError(f"{type(module).__name__}: {name} is not for packed rows")
