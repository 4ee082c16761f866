"""How good and how sure the served model is on held-out problems, asked over HTTP as any user would."""

import asyncio
import math
from collections.abc import Iterator, Sequence
from typing import TypeVar

from pydantic import BaseModel, ConfigDict

from services.api import RolloutGroup, RolloutRequest, ScoreItem
from services.clients import RewardClient, RolloutClient
from services.contract import Message, Sampling, Version, group_seed
from services.demo.task import Problem, Way, held_out, is_right, way
from services.separation import best_of_n

SAMPLES = 8
BATCH = 256
"""Completions in one request."""
MAX_TOKENS = 48


Item = TypeVar("Item")


class Figures(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class WayFigures(Figures):
    """The completions that took one way of answering. Without any, accuracy and self-certainty are none."""

    share: float
    accuracy: float | None = None
    self_certainty: float | None = None


class Evaluation(Figures):
    """Accuracies and shares from 0 to 1; self-certainty and entropy in nats per token, length in tokens (with EOS).

    All but `greedy_accuracy` come from `samples` completions of each problem drawn at temperature 1; means are over
    completions, `entropy` over their tokens (as the trainer logs it). The errors are standard errors, of the mean over
    problems, since the completions of one problem are not independent. `surest_accuracy`: of each problem's samples,
    the one with the highest self-certainty is taken. `stopped`: the share that ended by itself.
    """

    problems: int
    samples: int
    sampled_accuracy: float
    sampled_error: float
    greedy_accuracy: float
    greedy_error: float
    surest_accuracy: float
    surest_error: float
    self_certainty: float
    entropy: float
    length: float
    stopped: float
    ways: dict[Way, WayFigures]
    weight_version: Version


def _batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _standard_error(values: Sequence[float]) -> float:
    """Of the mean: sqrt(variance (ddof 1) / n); 0 for one value."""
    mean = _mean(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1) / len(values))


async def _answers(
    client: RolloutClient,
    problems: Sequence[Problem],
    n: int,
    temperature: float,
    seed: int,
    version: Version | None,
    deadline: float,
) -> list[RolloutGroup]:
    requests = []
    for problem in problems:
        group_id = f"evaluation-{temperature:g}-{problem.prompt}"
        requests.append(
            RolloutRequest(
                group_id=group_id,
                messages=[Message(role="user", content=problem.prompt)],
                n=n,
                sampling=Sampling(temperature=temperature, max_tokens=MAX_TOKENS, seed=group_seed(seed, group_id)),
                min_weight_version=version,
            )
        )
    groups = []
    for batch in _batches(requests, max(1, BATCH // n)):
        response = await client.rollouts(list(batch), deadline_seconds=deadline)
        groups += response.groups
    return groups


async def _scores(
    client: RewardClient, groups: Sequence[RolloutGroup], version: Version | None, deadline: float
) -> list[dict[str, float]]:
    """Self-certainty and entropy of every completion, the groups' one after another."""
    items = [
        ScoreItem(prompt_token_ids=group.prompt_token_ids, completion_token_ids=completion.token_ids)
        for group in groups
        for completion in group.completions
    ]
    scores = []
    for batch in _batches(items, BATCH):
        response = await client.score(
            list(batch), ["self_certainty", "token_entropy"], deadline_seconds=deadline, min_weight_version=version
        )
        scores += [result.scores for result in response.results]
    return scores


def _ways(texts: Sequence[str], right: Sequence[float], certainty: Sequence[float]) -> dict[Way, WayFigures]:
    ways: dict[Way, WayFigures] = {}
    taken = [way(text) for text in texts]
    names: tuple[Way, ...] = ("step_by_step", "guess", "other")
    for name in names:
        places = [place for place, other in enumerate(taken) if other == name]
        ways[name] = WayFigures(
            share=len(places) / len(texts),
            accuracy=_mean([right[place] for place in places]) if places else None,
            self_certainty=_mean([certainty[place] for place in places]) if places else None,
        )
    return ways


def measure(
    problems: Sequence[Problem],
    sampled: Sequence[RolloutGroup],
    greedy: Sequence[RolloutGroup],
    scores: Sequence[dict[str, float]],
) -> Evaluation:
    """The figures of answers that are already there: groups parallel to `problems`, `scores` to their completions."""
    samples = len(sampled[0].completions)
    completions = [completion for group in sampled for completion in group.completions]
    texts = [completion.text for completion in completions]
    lengths = [len(completion.token_ids) for completion in completions]
    right = [
        float(is_right(problem, completion.text))
        for problem, group in zip(problems, sampled, strict=True)
        for completion in group.completions
    ]
    certainty = [score["self_certainty"] for score in scores]
    surest = [
        best_of_n(those, rights) or 0.0
        for those, rights in zip(_batches(certainty, samples), _batches(right, samples), strict=True)
    ]
    greedy_right = [
        float(is_right(problem, group.completions[0].text)) for problem, group in zip(problems, greedy, strict=True)
    ]
    return Evaluation(
        problems=len(problems),
        samples=samples,
        sampled_accuracy=_mean(right),
        sampled_error=_standard_error([_mean(rights) for rights in _batches(right, samples)]),
        greedy_accuracy=_mean(greedy_right),
        greedy_error=_standard_error(greedy_right),
        surest_accuracy=_mean(surest),
        surest_error=_standard_error(surest),
        self_certainty=_mean(certainty),
        entropy=sum(score["token_entropy"] * length for score, length in zip(scores, lengths, strict=True))
        / sum(lengths),
        length=_mean(lengths),
        stopped=_mean([float(completion.finish_reason == "stop") for completion in completions]),
        ways=_ways(texts, right, certainty),
        weight_version=min(completion.weight_version for completion in completions),
    )


async def evaluate(
    rollout_url: str,
    reward_url: str,
    problems: int = 400,
    samples: int = SAMPLES,
    seed: int = 0,
    min_weight_version: Version | None = None,
    token: str | None = None,
    deadline_seconds: float = 300.0,
) -> Evaluation:
    """Ask for `samples` drawn and one greedy answer to each of `problems` held-out problems, and have them scored.

    With the same seed, problems and sampling seeds are the same before and after training. `min_weight_version` makes
    both servers wait until they serve at least that version. Raises what `services.clients` raises; `deadline_seconds`
    bounds the whole evaluation (TimeoutError).
    """
    chosen = held_out(problems)
    async with (
        asyncio.timeout(deadline_seconds),
        RolloutClient(rollout_url, token) as rollouts,
        RewardClient(reward_url, token) as rewards,
    ):
        sampled = await _answers(rollouts, chosen, samples, 1.0, seed, min_weight_version, deadline_seconds)
        greedy = await _answers(rollouts, chosen, 1, 0.0, seed, min_weight_version, deadline_seconds)
        scores = await _scores(rewards, sampled, min_weight_version, deadline_seconds)
    return measure(chosen, sampled, greedy, scores)
