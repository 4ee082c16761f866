"""The metrics of `POST /v1/score`: a number per token, of the statistics of its distribution, and one per completion.

Metrics keep their natural sign (entropy and perplexity are >= 0 and grow with doubt). Imports no torch.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    import torch

    from reward_server.scorer.statistics import Statistics

Preset = Literal["paper", "open_r1", "verl"]
PRESETS: tuple[Preset, ...] = ("paper", "open_r1", "verl")

TOP_K = 20
"""As in DeepConf (arXiv 2508.15260)."""
MOST_TOP_K = 256
HIGHEST_EXPONENT = 700.0
"""e to a little more than this is no float64."""


@dataclass(frozen=True)
class Wanted:
    """Which statistics are asked for beside logsumexp, the mean logit and the chosen token's log-probability.

    `top_k`: how many of the largest log-probabilities of each row.
    """

    entropy: bool = False
    varentropy: bool = False
    kl_to_reference: bool = False
    top_k: int = 0

    @classmethod
    def of(cls, asked: Iterable[Mapping[str, int]]) -> "Wanted":
        """What several `fields` need together."""
        parts = list(asked)
        return cls(
            entropy=any("entropy" in part for part in parts),
            varentropy=any("varentropy" in part for part in parts),
            kl_to_reference=any("kl_to_reference" in part for part in parts),
            top_k=max((part.get("top_logprobs", 0) for part in parts), default=0),
        )


PLAIN = Wanted()


@dataclass(frozen=True)
class Metric:
    """`per_token(statistics, preset, top_k)` is float64 [T]; `reduce` makes a completion's tokens one number.

    `reads`: the fields of Statistics that it is made of; `columns`: how many of the top log-probabilities it needs
    (none: as many as the item's `top_k`). `has_presets`: the definition depends on the preset; the `open_r1` preset
    then reads unshifted rows.
    """

    description: str
    per_token_description: str
    per_token: "Callable[[Statistics, Preset, int], torch.Tensor]"
    reads: tuple[str, ...]
    reduce: Literal["mean", "sum", "perplexity"] = "mean"
    columns: int | None = 0
    has_presets: bool = False

    @property
    def needs_reference(self) -> bool:
        return "kl_to_reference" in self.reads

    def total(self, values: np.ndarray) -> float:
        """One number of the values of at least one token."""
        if self.reduce == "sum":
            return float(values.sum())
        mean = float(values.mean())
        return math.exp(min(-mean, HIGHEST_EXPONENT)) if self.reduce == "perplexity" else mean

    def describe(self, name: str) -> dict[str, Any]:
        return {
            "name": name,
            "description": self.description,
            "per_token": self.per_token_description,
            "needs_reference_model": self.needs_reference,
        }


# ---- per token -------------------------------------------------------------------------------------------------


def _field(name: str) -> "Callable[[Statistics, Preset, int], torch.Tensor]":
    return lambda statistics, _preset, _k: getattr(statistics, name)


def _self_certainty(statistics: "Statistics", preset: Preset, _k: int) -> "torch.Tensor":
    gap = statistics.lse - statistics.mean_logit
    return (gap - math.log(statistics.vocab_size)).clamp(min=0) if preset == "paper" else gap


def _probability(statistics: "Statistics", _preset: Preset, _k: int) -> "torch.Tensor":
    assert statistics.chosen_logprob is not None
    return statistics.chosen_logprob.exp()


def _topk_confidence(statistics: "Statistics", _preset: Preset, k: int) -> "torch.Tensor":
    assert statistics.top_logprobs is not None
    return -statistics.top_logprobs[:, :k].mean(1)


def _margin(statistics: "Statistics", _preset: Preset, _k: int) -> "torch.Tensor":
    assert statistics.top_logprobs is not None
    return statistics.top_logprobs[:, 0] - statistics.top_logprobs[:, 1]


def _probability_margin(statistics: "Statistics", _preset: Preset, _k: int) -> "torch.Tensor":
    assert statistics.top_logprobs is not None
    first, second = statistics.top_logprobs[:, 0].exp(), statistics.top_logprobs[:, 1].exp()
    return first - second


LOGPROB = "log-probability of the token, <= 0"

METRICS: dict[str, Metric] = {
    "self_certainty": Metric(
        "mean KL(uniform || p), natural log; 0 only for a uniform p; grows with confidence",
        "KL(uniform || p) of the distribution that the token was drawn from",
        _self_certainty,
        ("lse", "mean_logit"),
        has_presets=True,
    ),
    "token_entropy": Metric(
        "mean entropy of p, natural log, >= 0; falls with confidence",
        "entropy of p",
        _field("entropy"),
        ("entropy",),
    ),
    "sequence_logprob": Metric(
        "log-probability of the whole completion", LOGPROB, _field("chosen_logprob"), ("chosen_logprob",), "sum"
    ),
    "mean_logprob": Metric(
        "mean log-probability of the completion's tokens", LOGPROB, _field("chosen_logprob"), ("chosen_logprob",)
    ),
    "perplexity": Metric(
        "exp(-mean log-probability) of the completion's tokens, >= 1; falls with confidence (at most e^700)",
        LOGPROB,
        _field("chosen_logprob"),
        ("chosen_logprob",),
        "perplexity",
    ),
    "mean_probability": Metric(
        "mean probability of the completion's tokens, 0 to 1",
        "probability of the token",
        _probability,
        ("chosen_logprob",),
    ),
    "topk_confidence": Metric(
        "mean of minus the mean log-probability of the top_k likeliest tokens (DeepConf); grows with confidence",
        "-(1/k) sum of the k largest log-probabilities, >= log k (k at most the vocabulary)",
        _topk_confidence,
        ("top_logprobs",),
        columns=None,
    ),
    "margin": Metric(
        "mean difference of the two largest log-probabilities, >= 0; grows with confidence",
        "log p of the likeliest token less that of the second",
        _margin,
        ("top_logprobs",),
        columns=2,
    ),
    "probability_margin": Metric(
        "mean difference of the two largest probabilities, 0 to 1; grows with confidence",
        "p of the likeliest token less that of the second",
        _probability_margin,
        ("top_logprobs",),
        columns=2,
    ),
    "varentropy": Metric(
        "mean variance of log p under p, >= 0; 0 for a uniform p and for a certain one",
        "variance of log p under p",
        _field("varentropy"),
        ("varentropy",),
    ),
    "kl_to_reference": Metric(
        "mean KL(p || p of the reference model) over the whole vocabulary, >= 0",
        "KL(p || p of the reference model)",
        _field("kl_to_reference"),
        ("kl_to_reference",),
    ),
}


def fields(names: Iterable[str], top_k: int) -> dict[str, int]:
    """The fields of Statistics that metrics read, and how many numbers a row has of each."""
    found: dict[str, int] = {}
    for name in names:
        metric = METRICS[name]
        for field in metric.reads:
            count = 1 if field != "top_logprobs" else top_k if metric.columns is None else metric.columns
            found[field] = max(count, found.get(field, 0))
    return found
