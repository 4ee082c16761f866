"""The slow obvious way in float64: full logits, softmax, sums. What the scorer is compared with."""

import math

import torch


def distribution_oracle(
    logits: torch.Tensor, chosen: torch.Tensor, reference: torch.Tensor | None = None, k: int = 20
) -> dict[str, torch.Tensor]:
    """Per row of float64 logits [T, V]: the per-token numbers, straight from their definitions.

    `reference` are another model's logits of the same rows.
    """
    assert logits.dtype == torch.float64
    p = torch.softmax(logits, -1)
    log_p = torch.log_softmax(logits, -1)
    vocab_size = logits.shape[1]
    entropy = -(p * log_p).sum(-1)
    ordered = log_p.sort(-1, descending=True).values
    chosen_logprob = log_p[torch.arange(len(chosen)), chosen]
    found = {
        "self_certainty": -(log_p + math.log(vocab_size)).sum(-1) / vocab_size,
        "raw_certainty": torch.logsumexp(logits, -1) - logits.mean(-1),
        "token_entropy": entropy,
        "varentropy": (p * (log_p + entropy[:, None]).square()).sum(-1),
        "sequence_logprob": chosen_logprob,
        "mean_logprob": chosen_logprob,
        "perplexity": chosen_logprob,
        "mean_probability": p[torch.arange(len(chosen)), chosen],
        "top_logprobs": ordered,
        "topk_confidence": -ordered[:, :k].mean(-1),
    }
    if vocab_size > 1:
        found["margin"] = ordered[:, 0] - ordered[:, 1]
        found["probability_margin"] = ordered[:, 0].exp() - ordered[:, 1].exp()
    if reference is not None:
        found["kl_to_reference"] = (p * (log_p - torch.log_softmax(reference, -1))).sum(-1)
    return found


def one_number(name: str, values: torch.Tensor) -> float:
    """A completion's score, of its tokens'."""
    if name == "sequence_logprob":
        return values.sum().item()
    return math.exp(-values.mean().item()) if name == "perplexity" else values.mean().item()


@torch.no_grad()
def model_oracle(
    model,
    prompt: list[int],
    completion: list[int],
    temperature: float = 1.0,
    preset: str = "paper",
    reference=None,
    k: int = 20,
):
    """Per-token numbers of one completion by the whole model in float64, alone, without padding."""

    def logits_of(of):
        logits = of(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0]
        assert logits.dtype == torch.float64
        return logits

    start, count = len(prompt), len(completion)
    chosen, shifted = torch.tensor(completion), slice(start - 1, start - 1 + count)
    logits = logits_of(model)
    compared = None if reference is None else logits_of(reference)[shifted] / temperature
    out = distribution_oracle(logits[shifted] / temperature, chosen, compared, k)
    if preset == "verl":
        out["self_certainty"] = out["raw_certainty"]
    if preset == "open_r1":
        out["self_certainty"] = distribution_oracle(logits[start : start + count], chosen)["raw_certainty"]
    return out
