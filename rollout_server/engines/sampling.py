"""Drawing one token a row from logits: temperature, top-k, top-p, greedy. Pure tensor functions."""

from dataclasses import dataclass

import torch

from services.contract import Sampling


@dataclass(frozen=True)
class Rows:
    """Sampling parameters, one a row. Greedy rows have `temperature` 1, so their logprobs are the plain model's."""

    temperature: torch.Tensor
    top_p: torch.Tensor
    top_k: torch.Tensor
    greedy: torch.Tensor
    any_greedy: bool
    all_greedy: bool
    any_filter: bool
    all_plain: bool

    @classmethod
    def of(cls, samplings: list[Sampling], vocab_size: int, device: torch.device) -> "Rows":
        greedy = [sampling.temperature == 0 for sampling in samplings]
        temperature = [sampling.temperature or 1.0 for sampling in samplings]
        top_k = [min(sampling.top_k or vocab_size, vocab_size) for sampling in samplings]
        top_p = [sampling.top_p for sampling in samplings]
        return cls(
            temperature=torch.tensor(temperature, dtype=torch.float32, device=device),
            top_p=torch.tensor(top_p, dtype=torch.float64, device=device),
            top_k=torch.tensor(top_k, device=device),
            greedy=torch.tensor(greedy, device=device),
            any_greedy=any(greedy),
            all_greedy=all(greedy),
            any_filter=min(top_k) < vocab_size or min(top_p) < 1,
            all_plain=all(value == 1 for value in temperature),
        )

    def select(self, kept: torch.Tensor) -> "Rows":
        return Rows(
            self.temperature[kept],
            self.top_p[kept],
            self.top_k[kept],
            self.greedy[kept],
            self.any_greedy,
            self.all_greedy,
            self.any_filter,
            self.all_plain,
        )


def choose(logits: torch.Tensor, rows: Rows, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token a row.

    `logits` [R, V], `uniforms` [R] float64 in [0, 1). Returns tokens [R] int64 and log-probabilities [R, V] float32 at
    the sampling temperature, before top-k and top-p.
    """
    logits = logits.float()
    scaled = logits if rows.all_plain else logits / rows.temperature[:, None]
    logprobs = torch.log_softmax(scaled, -1)
    if rows.all_greedy:
        return logits.argmax(-1), logprobs
    if rows.any_filter:
        tokens = draw_filtered(logprobs.exp(), rows.top_k, rows.top_p, uniforms)
    else:
        tokens = draw(logprobs.exp(), uniforms)
    if rows.any_greedy:
        tokens = torch.where(rows.greedy, logits.argmax(-1), tokens)
    return tokens, logprobs


def draw(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Invert the cumulative distribution of `weights` [R, V] (non-negative, any positive sum) at `uniforms` [R].

    One number a row makes a draw independent of what else is in the batch. The sums are float64: in float32 the tail of
    a large vocabulary could never be drawn.
    """
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1]
    # Rounding may lift the threshold to the total, and the search would then run past the last token with any weight.
    threshold = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, threshold[:, None], right=True).squeeze(1)


def draw_filtered(
    probabilities: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, uniforms: torch.Tensor
) -> torch.Tensor:
    """Draw from the `top_k` likeliest tokens and, of those renormalised, the fewest that hold `top_p` of the mass."""
    ordered, ids = probabilities.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(ordered.shape[1], device=ordered.device)
    ordered = ordered * (rank < top_k[:, None])
    before = ordered.cumsum(-1, dtype=torch.float64) - ordered
    total = before[:, -1:] + ordered[:, -1:]
    ordered = ordered * ((before < top_p[:, None] * total) | (rank == 0))
    return ids.gather(1, draw(ordered, uniforms)[:, None]).squeeze(1)
