"""What a request asks of the pooler inside vLLM, and the layout of its answer: a sequence's rows, numbers in columns.

The server's side and the engine's side of one agreement; neither imports vLLM for it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from reward_server.scorer.statistics import Statistics


@dataclass(frozen=True)
class Pass:
    """Rows [first, last) of a sequence, their logits divided by `temperature`. Row t predicts token t + 1."""

    first: int
    last: int
    temperature: float

    def within(self, start: int, stop: int) -> range:
        """The rows of this pass that lie in [start, stop)."""
        first = max(self.first, start)
        return range(first, max(first, min(self.last, stop)))


@dataclass(frozen=True)
class Asked:
    """`columns`: the fields of `Statistics` that are wanted (`lse` and `mean_logit` among them), and how many numbers a
    row has of each."""

    passes: tuple[Pass, ...]
    columns: Mapping[str, int]

    @property
    def rows(self) -> int:
        return sum(part.last - part.first for part in self.passes)

    @property
    def width(self) -> int:
        return sum(self.columns.values())

    def to_wire(self) -> dict[str, Any]:
        """Plain values, for `PoolingParams.extra_kwargs`."""
        return {
            "passes": [(part.first, part.last, part.temperature) for part in self.passes],
            "columns": dict(self.columns),
        }

    @classmethod
    def from_wire(cls, values: Mapping[str, Any] | None, length: int) -> "Asked":
        """None: the requests that vLLM makes up to warm up; they ask for every row."""
        if values is None:
            return cls((Pass(0, length, 1.0),), {"lse": 1, "mean_logit": 1, "entropy": 1})
        return cls(tuple(Pass(*part) for part in values["passes"]), values["columns"])

    def table(self, statistics: Statistics) -> torch.Tensor:
        """float64 [T, width] of statistics of T rows."""
        parts = []
        for name, count in self.columns.items():
            values = getattr(statistics, name)
            parts.append(values[:, None] if values.dim() == 1 else values[:, :count])
        return torch.cat(parts, 1)

    def statistics(self, table: torch.Tensor, vocab_size: int) -> Statistics:
        """What `table` was made of."""
        parts = table.split(list(self.columns.values()), 1)
        fields = {
            name: part if name == "top_logprobs" else part[:, 0] for name, part in zip(self.columns, parts, strict=True)
        }
        return Statistics(vocab_size=vocab_size, **fields)
