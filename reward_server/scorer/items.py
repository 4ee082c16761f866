"""What a scorer is asked and what it answers, whichever engine runs the model. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from reward_server.scorer.metrics import METRICS, MOST_TOP_K, PRESETS, TOP_K, Preset, fields

if TYPE_CHECKING:
    from reward_server.scorer.statistics import Statistics


@dataclass(frozen=True)
class TokenItem:
    """One completion to score, and how. Tokens after the completion's first EOS are left out.

    `temperature` divides the logits. Preset `open_r1` reads self-certainty from the row *of* each token instead of the
    row before it, without temperature and without log V; `verl` leaves out log V alone. `top_k`: how many of the
    likeliest tokens `topk_confidence` looks at.
    """

    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]
    metrics: tuple[str, ...] = ("self_certainty",)
    temperature: float = 1.0
    preset: Preset = "paper"
    top_k: int = TOP_K

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)

    @property
    def fields(self) -> dict[str, int]:
        """The fields of Statistics that the metrics read, and how many numbers a row has of each."""
        return fields(self.metrics, self.top_k)

    @property
    def unshifted(self) -> frozenset[str]:
        """The metrics that are read from the rows *of* the tokens; the others from the rows before them."""
        return frozenset(name for name in self.metrics if self.preset == "open_r1" and METRICS[name].has_presets)

    @property
    def needs_reference(self) -> bool:
        return any(METRICS[name].needs_reference for name in self.metrics)

    def scored_length(self, eos_ids: frozenset[int]) -> int:
        """Completion tokens up to and including the first EOS."""
        ends = (place + 1 for place, token in enumerate(self.completion_ids) if token in eos_ids)
        return next(ends, len(self.completion_ids))


@dataclass(frozen=True)
class ItemScores:
    """`n_tokens` tokens were scored; `per_token` holds float64 [n_tokens] by metric. Without tokens, no values.

    A value is NaN when the model's own logits are not finite.
    """

    n_tokens: int
    scores: dict[str, float] = field(default_factory=dict)
    per_token: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Span:
    """Where the rows of an item lie in the statistics of a batch; none where no metric reads them."""

    shifted: slice | None
    unshifted: slice | None


def collect(item: TokenItem, statistics: "Statistics", span: Span) -> ItemScores:
    """The scores of an item of at least one token; the statistics lie in main memory."""
    scores, per_token = {}, {}
    for name in item.metrics:
        metric = METRICS[name]
        part = span.unshifted if name in item.unshifted else span.shifted
        assert part is not None
        values = metric.per_token(statistics.rows(part), item.preset, item.top_k).numpy()
        scores[name], per_token[name] = metric.total(values), values
    return ItemScores(len(values), scores, per_token)


class Abandoned(Exception):
    """The scores are not wanted any more, so they were not computed to the end."""


def check_item(item: TokenItem, vocab_size: int, max_length: int | None, has_reference: bool = False) -> None:
    """Raises ValueError naming the field, the value and what would be valid."""
    unknown = [name for name in item.metrics if name not in METRICS]
    if unknown or not item.metrics:
        raise ValueError(f"metrics: unknown {unknown!r}; known: {', '.join(METRICS)}")
    compared = [name for name in item.metrics if METRICS[name].needs_reference]
    if compared and not has_reference:
        raise ValueError(f"metrics: {compared[0]} needs a reference model, and the scorer has none (--reference-model)")
    if not 1 <= item.top_k <= MOST_TOP_K:
        raise ValueError(f"top_k: must be 1 to {MOST_TOP_K} (got {item.top_k})")
    if item.preset not in PRESETS:
        raise ValueError(f"preset: {item.preset!r} is not one of {', '.join(PRESETS)}")
    if not item.temperature > 0:
        raise ValueError(f"temperature: must be positive (got {item.temperature})")
    if not len(item.prompt_ids):
        raise ValueError("prompt: is empty, so nothing predicts the completion's first token; give it a BOS token")
    if max_length is not None and len(item) > max_length:
        raise ValueError(
            f"completion: with its prompt it has {len(item)} tokens, more than the model's {max_length} positions"
        )
    for name, ids in (("prompt_token_ids", item.prompt_ids), ("completion_token_ids", item.completion_ids)):
        if len(ids) and not (0 <= min(ids) and max(ids) < vocab_size):
            wrong = next(token for token in ids if not 0 <= token < vocab_size)
            raise ValueError(f"{name}: {wrong} is not a token id of this model (0 to {vocab_size - 1})")


def eos_ids(*owners: Any) -> frozenset[int]:
    """Every id that ends a text, by the generation config, the model config or the tokenizer (each may be none)."""
    ids: set[int] = set()
    for owner in owners:
        value = getattr(owner, "eos_token_id", None)
        ids.update(value if isinstance(value, list) else [] if value is None else [value])
    return frozenset(ids)
