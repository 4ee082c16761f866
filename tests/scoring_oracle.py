"""The slow obvious way in float64: full logits, softmax, sums. What the scorer is compared with."""

import math

import torch


def distribution_oracle(logits: torch.Tensor, chosen: torch.Tensor) -> dict[str, torch.Tensor]:
    """Per row of float64 logits [T, V]: the four per-token numbers, straight from their definitions."""
    assert logits.dtype == torch.float64
    p = torch.softmax(logits, -1)
    log_p = torch.log_softmax(logits, -1)
    vocab_size = logits.shape[1]
    return {
        "self_certainty": -(log_p + math.log(vocab_size)).sum(-1) / vocab_size,
        "raw_certainty": torch.logsumexp(logits, -1) - logits.mean(-1),
        "token_entropy": -(p * log_p).sum(-1),
        "logprob": log_p[torch.arange(len(chosen)), chosen],
    }


@torch.no_grad()
def model_oracle(model, prompt: list[int], completion: list[int], temperature: float = 1.0, preset: str = "paper"):
    """Per-token numbers of one completion by the whole model in float64, alone, without padding."""
    logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0]
    assert logits.dtype == torch.float64
    start, count = len(prompt), len(completion)
    chosen = torch.tensor(completion)
    out = distribution_oracle(logits[start - 1 : start - 1 + count] / temperature, chosen)
    if preset == "verl":
        out["self_certainty"] = out["raw_certainty"]
    if preset == "open_r1":
        out["self_certainty"] = distribution_oracle(logits[start : start + count], chosen)["raw_certainty"]
    return out
