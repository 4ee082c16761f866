"""What a scorer is asked and what it answers, whichever engine runs the model."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from reward_server.scorer.metrics import METRICS, PRESETS, Preset


@dataclass(frozen=True)
class TokenItem:
    """One completion to score, and how. Tokens after the completion's first EOS are left out.

    `temperature` divides the logits. Preset `open_r1` reads self-certainty from the row *of* each token instead of the
    row before it, without temperature and without log V; `verl` leaves out log V alone.
    """

    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]
    metrics: tuple[str, ...] = ("self_certainty",)
    temperature: float = 1.0
    preset: Preset = "paper"

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)

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


class Abandoned(Exception):
    """The scores are not wanted any more, so they were not computed to the end."""


def check_item(item: TokenItem, vocab_size: int, max_length: int | None) -> None:
    """Raises ValueError naming the field, the value and what would be valid."""
    unknown = [name for name in item.metrics if name not in METRICS]
    if unknown or not item.metrics:
        raise ValueError(f"metrics: unknown {unknown!r}; known: {', '.join(METRICS)}")
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
