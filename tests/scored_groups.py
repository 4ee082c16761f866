"""Scored groups for trainer tests, and a plain float64 trainer to compare with."""

import math
import random
from pathlib import Path

from services.contract import Completion, CompletionScore, Sampling, Score, ScoredGroup, Task, Version, group_id


def make_group(
    index: int,
    rng: random.Random,
    size: int = 4,
    vocab_size: int = 288,
    longest: int = 12,
    temperature: float = 1.0,
    version: int = 0,
    run: str = "test",
) -> ScoredGroup:
    """Random tokens; some completions empty, one-token, aborted or invalid. Logprobs look like a sharp model's."""
    completions, scores = [], []
    for place in range(size):
        length = rng.choice([0, 1, *range(2, longest + 1)])
        ids = [rng.randrange(vocab_size) for _ in range(length)]
        reason = rng.choice(["stop", "stop", "stop", "length", "abort"])
        completions.append(
            Completion(
                text=f"answer {place}",
                token_ids=ids,
                logprobs=[-5.5 + rng.gauss(0, 0.7) for _ in ids],
                finish_reason=reason,
                weight_version=Version(version=version),
            )
        )
        valid = rng.random() > 0.2
        component = Score.of(rng.random()) if valid else Score.failed("timeout", "slow")
        scores.append(
            CompletionScore(
                components={"certainty": component},
                reward=rng.random() if valid else None,
                advantage=rng.gauss(0, 1) if valid else 0.0,
                valid=valid,
            )
        )
    return ScoredGroup(
        group_id=group_id(run, 0, str(index)),
        index=index,
        task=Task(task_id=str(index), prompt="p"),
        prompt_token_ids=[rng.randrange(vocab_size) for _ in range(rng.randint(1, 9))],
        completions=completions,
        sampling=Sampling(temperature=temperature, max_tokens=longest),
        scores=scores,
        spec_id="spec",
    )


def make_groups(count: int, seed: int = 0, **options) -> list[ScoredGroup]:
    rng = random.Random(seed)
    return [make_group(index, rng, **options) for index in range(count)]


def trained_pairs(groups: list[ScoredGroup]):
    for group in groups:
        for completion, score in zip(group.completions, group.scores, strict=True):
            if score.valid and completion.finish_reason != "abort" and completion.token_ids:
                yield group, completion, score


def token_logprobs(model, prompt: list[int], answer: list[int], temperature: float):
    """The slow way: one sequence at a time, all logits."""
    import torch

    logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0] / temperature
    return torch.stack([logits[len(prompt) - 1 + t].log_softmax(-1)[token] for t, token in enumerate(answer)])


def objective(model, reference, groups: list[ScoredGroup], settings):
    """The loss of one step, written token by token from its definition."""
    import torch

    pairs = list(trained_pairs(groups))
    total_tokens = sum(len(completion.token_ids) for _, completion, _ in pairs)
    total = torch.zeros((), dtype=torch.float64)
    for group, completion, score in pairs:
        logp = token_logprobs(model, group.prompt_token_ids, completion.token_ids, group.sampling.temperature)
        with torch.no_grad():
            ref = token_logprobs(reference, group.prompt_token_ids, completion.token_ids, group.sampling.temperature)
        for t, rollout in enumerate(completion.logprobs):
            importance = 1.0
            if settings.old_logprobs == "recomputed":
                old = logp[t].detach()
                if settings.importance_cap is not None:
                    importance = min(math.exp(float(old) - rollout), settings.importance_cap)
            else:
                old = torch.tensor(rollout, dtype=torch.float64)
            ratio = torch.exp(logp[t] - old)
            clipped = torch.clamp(ratio, 1 - settings.clip_low, 1 + settings.clip_high)
            loss = -importance * torch.minimum(ratio * score.advantage, clipped * score.advantage)
            gap = ref[t] - logp[t]
            loss = loss + settings.kl_beta * (torch.exp(gap) - gap - 1)
            if settings.aggregation == "per_sequence":
                total = total + loss / len(completion.token_ids) / len(pairs)
            else:
                total = total + loss / total_tokens
    return total


def plain_training(folder: Path, batches: list[list[ScoredGroup]], settings, learning_rate):
    """Plain torch in float64: -> (losses, gradient norms, final weights by name)."""
    import torch
    from transformers import AutoModelForCausalLM

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
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        optimizer.zero_grad()
        loss = objective(model, reference, groups, settings)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        if loss.requires_grad:
            loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)))
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, norms, {name: p.detach() for name, p in model.named_parameters()}
