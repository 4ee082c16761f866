"""A plain float64 trainer to compare with: one sequence at a time, all logits, torch's own optimizer."""

import math
from pathlib import Path

import numpy as np
import objective_oracle
import torch
from objective_oracle import Sequence
from scored_groups import token_distributions, token_logprobs, trained_pairs
from transformers import AutoModelForCausalLM

from services.contract import ScoredGroup


def oracle_sequence(model, reference, group, completion, advantage: float, old, settings) -> Sequence:
    asked = (group.prompt_token_ids, completion.token_ids, group.sampling.temperature)
    with torch.no_grad():
        known = token_logprobs(reference, *asked) if settings.kl_beta > 0 else None
    rows = token_distributions(model, *asked)
    own = torch.stack([rows[t][token] for t, token in enumerate(completion.token_ids)])
    rollout = torch.tensor(completion.logprobs, dtype=torch.float64)
    return Sequence(own, rollout, advantage, old=old, reference=known, entropies=-(rows.exp() * rows).sum(-1))


def plain_training(folder: Path, batches: list[list[ScoredGroup]], settings, learning_rate, seed: int = 0):
    """Plain torch in float64: -> (losses, gradient norms, final weights by name), losses and norms as means over a
    step's updates.

    Draws minibatches and their order as the trainer does: one permutation of the groups with something to train on,
    then one of the minibatches for each epoch, from a generator of (seed, step).
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).requires_grad_(False)
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.adam_eps,
    )
    losses, norms = [], []
    for step, groups in enumerate(batches):
        rng = np.random.default_rng([seed, step])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        triples = [(number, *pair) for number, group in enumerate(groups) for pair in trained_pairs([group])]
        advantages = white(triples) if settings.whiten else [score.advantage for *_, score in triples]
        old = [None] * len(triples)
        if settings.epochs_per_batch * settings.minibatches > 1:
            with torch.no_grad():
                old = [
                    token_logprobs(model, group.prompt_token_ids, c.token_ids, group.sampling.temperature)
                    for _, group, c, _ in triples
                ]
        shares = [list(range(len(triples)))]
        if settings.minibatches > 1:
            present = rng.permutation(sorted({number for number, *_ in triples}))
            shares = [
                [place for place, (number, *_) in enumerate(triples) if number in share]
                for share in np.array_split(present, settings.minibatches)
            ]
        step_losses, step_norms = [], []
        for _ in range(settings.epochs_per_batch):
            for chosen in rng.permutation(settings.minibatches):
                optimizer.zero_grad()
                loss = objective_oracle.loss(
                    [
                        oracle_sequence(model, reference, *triples[i][1:3], advantages[i], old[i], settings)
                        for i in shares[chosen]
                    ],
                    settings,
                )
                for parameter in model.parameters():
                    parameter.grad = torch.zeros_like(parameter)
                if loss.requires_grad:
                    loss.backward()
                step_norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)))
                optimizer.step()
                step_losses.append(float(loss.detach()))
        if settings.reference.kind == "ema":
            with torch.no_grad():
                for average, parameter in zip(reference.parameters(), model.parameters(), strict=True):
                    average += (1 - settings.reference.decay) * (parameter - average)
        losses.append(sum(step_losses) / len(step_losses))
        norms.append(sum(step_norms) / len(step_norms))
    return losses, norms, {name: p.detach() for name, p in model.named_parameters()}


def white(triples) -> list[float]:
    values = [score.advantage for _, _, completion, score in triples for _ in completion.token_ids]
    mean = sum(values) / max(len(values), 1)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / max(len(values), 1))
    return [(score.advantage - mean) / (deviation + 1e-8) for *_, score in triples]
