"""A KV cache in buffers that are written in place: appending a token does not copy what is there."""

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer

ROOM = 64
"""Tokens of head-room in a fresh buffer; it grows by half when that is used up."""


class BufferLayer(DynamicLayer):
    """One layer's keys and values, [rows, heads, length, width]; `keys` and `values` are views of longer buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.key_buffer = _widened(key_states[:, :, :0], key_states.shape[2] + ROOM)
        self.value_buffer = _widened(value_states[:, :, :0], value_states.shape[2] + ROOM)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[2]
        if self.length > self.key_buffer.shape[2]:
            size = self.length + max(ROOM, self.length // 2)
            self.key_buffer = _widened(self.key_buffer[:, :, :start], size)
            self.value_buffer = _widened(self.value_buffer[:, :, :start], size)
        self.key_buffer[:, :, start : self.length] = key_states
        self.value_buffer[:, :, start : self.length] = value_states
        self.keys = self.key_buffer[:, :, : self.length]
        self.values = self.value_buffer[:, :, : self.length]
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.length

    def take(self, rows: torch.Tensor) -> None:
        """Keep (or repeat) `rows`, in that order."""
        size = self.length + ROOM
        self.key_buffer = _widened(self.key_buffer[rows, :, : self.length], size)
        self.value_buffer = _widened(self.value_buffer[rows, :, : self.length], size)
        self.keys = self.key_buffer[:, :, : self.length]
        self.values = self.value_buffer[:, :, : self.length]


def _widened(states: torch.Tensor, size: int) -> torch.Tensor:
    rows, heads, length, width = states.shape
    buffer = states.new_empty(rows, heads, size, width)
    buffer[:, :, :length] = states
    return buffer


def fits(config: PreTrainedConfig) -> bool:
    """Whether every layer of the model attends over keys and values (no recurrent or convolution states)."""
    kinds = getattr(config.get_text_config(), "layer_types", None) or ["full_attention"]
    return set(kinds) <= {"full_attention", "sliding_attention", "chunked_attention"}


class BufferCache(Cache):
    """An empty cache for a model whose layers all attend (see `fits`)."""

    def __init__(self, config: PreTrainedConfig):
        self.buffers = [BufferLayer() for _ in range(config.get_text_config().num_hidden_layers)]
        super().__init__(layers=[*self.buffers])

    def take(self, rows: torch.Tensor) -> None:
        """Keep (or repeat) `rows` in every layer, in that order."""
        for layer in self.buffers:
            layer.take(rows)
