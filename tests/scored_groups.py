"""Scored groups for trainer tests, and the logprobs of their tokens in the slow way."""

import random

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


def token_distributions(model, prompt: list[int], answer: list[int], temperature: float):
    """The slow way: one sequence at a time, all logits -> log-probabilities [n, V] where each token was chosen."""
    import torch

    logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0] / temperature
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def token_logprobs(model, prompt: list[int], answer: list[int], temperature: float):
    import torch

    rows = token_distributions(model, prompt, answer, temperature)
    return torch.stack([rows[t][token] for t, token in enumerate(answer)])
