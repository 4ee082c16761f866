"""Scored groups -> flat sequences -> micro-batches of about equal work on every rank."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, fields

import msgpack
import numpy as np
import torch
from torch import Tensor

from services.algorithms import Aggregation
from services.contract import Completion, CompletionScore, ScoredGroup
from trainer.loss import token_weights

PAD = 0
"""Any id of the vocabulary will do: padding stands to the right, where causal attention never looks back at it."""


@dataclass(frozen=True)
class Sequences:
    """The completions of one step that are trained on, one after the other, as flat arrays.

    `tokens` int32 [sum of prompt + completion lengths], `prompts` and `completions` int32 [N] (lengths), `logprobs`
    float32 [sum of completion lengths] (the behaviour policy's), `advantages` and `temperatures` float32 [N], `groups`
    int32 [N] (which of the step's groups, from 0).
    """

    tokens: np.ndarray
    prompts: np.ndarray
    completions: np.ndarray
    logprobs: np.ndarray
    advantages: np.ndarray
    temperatures: np.ndarray
    groups: np.ndarray

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def lengths(self) -> np.ndarray:
        """Prompt and completion together, [N]."""
        return self.prompts + self.completions

    def take(self, indices: np.ndarray) -> "Sequences":
        """The sequences at `indices`, in that order."""
        return Sequences(
            tokens=self.tokens[_spans(_starts(self.lengths)[indices], self.lengths[indices])],
            prompts=self.prompts[indices],
            completions=self.completions[indices],
            logprobs=self.logprobs[self.completion_tokens(indices)],
            advantages=self.advantages[indices],
            temperatures=self.temperatures[indices],
            groups=self.groups[indices],
        )

    def completion_tokens(self, indices: np.ndarray) -> np.ndarray:
        """Where the completion tokens of the sequences at `indices` stand in arrays like `logprobs`."""
        return _spans(_starts(self.completions)[indices], self.completions[indices])

    def pack(self) -> bytes:
        """Raw little-endian arrays in msgpack: what rank 0 sends the other ranks."""
        arrays = {field.name: getattr(self, field.name) for field in fields(self)}
        return msgpack.packb({name: (array.dtype.str, array.tobytes()) for name, array in arrays.items()})

    @classmethod
    def unpack(cls, data: bytes) -> "Sequences":
        return cls(**{name: np.frombuffer(raw, dtype) for name, (dtype, raw) in msgpack.unpackb(data).items()})


def trained(completion: Completion, score: CompletionScore) -> bool:
    """Whether a completion gets a gradient: it has a valid reward, was not aborted, and has at least one token."""
    return score.valid and completion.finish_reason != "abort" and len(completion.token_ids) > 0


def sequences(groups: Sequence[ScoredGroup], vocab_size: int) -> Sequences:
    """The trained completions of `groups`, in order.

    Raises ValueError, naming the group, for token ids outside the vocabulary and for greedily sampled completions.
    """
    tokens: list[list[int]] = []
    prompts, completions, advantages, temperatures, numbers = [], [], [], [], []
    logprobs: list[list[float]] = []
    for number, group in enumerate(groups):
        for completion, score in zip(group.completions, group.scores, strict=True):
            if not trained(completion, score):
                continue
            ids = group.prompt_token_ids + completion.token_ids
            if min(ids) < 0 or max(ids) >= vocab_size:
                raise ValueError(
                    f"group {group.group_id}: token ids {min(ids)}..{max(ids)} do not fit the model's vocabulary "
                    f"(0..{vocab_size - 1})"
                )
            if group.sampling.temperature == 0:
                raise ValueError(f"group {group.group_id}: sampling.temperature 0 has no logprobs to train against")
            tokens.append(ids)
            prompts.append(len(group.prompt_token_ids))
            completions.append(len(completion.token_ids))
            logprobs.append(completion.logprobs)
            advantages.append(score.advantage)
            temperatures.append(group.sampling.temperature)
            numbers.append(number)
    return Sequences(
        tokens=_flat(tokens, "<i4"),
        prompts=np.asarray(prompts, "<i4"),
        completions=np.asarray(completions, "<i4"),
        logprobs=_flat(logprobs, "<f4"),
        advantages=np.asarray(advantages, "<f4"),
        temperatures=np.asarray(temperatures, "<f4"),
        groups=np.asarray(numbers, "<i4"),
    )


def deal(lengths: np.ndarray, ranks: int, budget: int) -> list[list[np.ndarray]]:
    """Which sequences go into which micro-batch: [rank][micro-batch] -> indices, the same number for every rank.

    Longest first, each to the rank with the fewest tokens so far; then, on each rank, filled in that order up to
    `budget` padded tokens (rows x longest). A sequence longer than the budget goes alone. Ranks that need fewer
    micro-batches get empty ones, because every rank must take part in the same number of collectives.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]
    for index in np.argsort(-lengths, kind="stable").tolist():
        load, rank = heapq.heappop(loads)
        shares[rank].append(index)
        heapq.heappush(loads, (load + int(lengths[index]), rank))
    plan: list[list[np.ndarray]] = []
    for share in shares:
        micro_batches, start = [], 0
        while start < len(share):
            rows = max(1, budget // int(lengths[share[start]]))
            micro_batches.append(np.asarray(share[start : start + rows]))
            start += rows
        plan.append(micro_batches)
    most = max(1, *(len(micro_batches) for micro_batches in plan))
    return [micro_batches + [np.zeros(0, int)] * (most - len(micro_batches)) for micro_batches in plan]


@dataclass(frozen=True)
class MicroBatch:
    """One forward. R rows padded on the right to W tokens, T completion tokens in all.

    `input_ids` int64 [R, W]; `positions` int64 [T], into the flattened R*W rows: where the logits that produced a token
    stand (one before it); `targets` int64 [T]; `segments` int64 [T], the row of a token's sequence; `rollout`,
    `advantages`, `temperatures`, `weights` float32 [T]. A weight is 0 only for the filler of an empty micro-batch.
    """

    input_ids: Tensor
    positions: Tensor
    targets: Tensor
    segments: Tensor
    rollout: Tensor
    advantages: Tensor
    temperatures: Tensor
    weights: Tensor

    def to(self, device: torch.device) -> "MicroBatch":
        return MicroBatch(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})


def micro_batch(
    batch: Sequences, indices: np.ndarray, aggregation: Aggregation, constant: int | None = None
) -> MicroBatch:
    """The sequences at `indices` as tensors, on the CPU, with the weights they have in the whole of `batch`. Without
    indices: one two-token row of weight 0."""
    if len(indices) == 0:
        none = torch.zeros(1)
        at = torch.zeros(1, dtype=torch.long)
        return MicroBatch(torch.full((1, 2), PAD), at, torch.full((1,), PAD), at, none, none, none + 1, none)
    weights = token_weights(batch.completions, aggregation, constant)[indices]
    prompts, completions, lengths = batch.prompts[indices], batch.completions[indices], batch.lengths[indices]
    width = int(lengths.max())
    row_starts = np.arange(len(indices)) * width
    token_starts = _starts(batch.lengths)[indices]
    ids = np.full(len(indices) * width, PAD, np.int64)
    ids[_spans(row_starts, lengths)] = batch.tokens[_spans(token_starts, lengths)]
    first = row_starts + prompts
    return MicroBatch(
        input_ids=torch.from_numpy(ids.reshape(len(indices), width)),
        positions=torch.from_numpy(_spans(first - 1, completions)),
        targets=torch.from_numpy(ids[_spans(first, completions)]),
        segments=torch.from_numpy(np.repeat(np.arange(len(indices)), completions)),
        rollout=torch.from_numpy(batch.logprobs[batch.completion_tokens(indices)]),
        advantages=torch.from_numpy(np.repeat(batch.advantages[indices], completions)),
        temperatures=torch.from_numpy(np.repeat(batch.temperatures[indices], completions)),
        weights=torch.from_numpy(np.repeat(weights, completions).astype(np.float32)),
    )


def _flat(rows: list[list[int]] | list[list[float]], dtype: str) -> np.ndarray:
    return np.concatenate([np.asarray(row, dtype) for row in rows]) if rows else np.zeros(0, dtype)


def _starts(lengths: np.ndarray) -> np.ndarray:
    return np.cumsum(lengths, dtype=np.int64) - lengths


def _spans(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, ... for each of `lengths`, one after the other."""
    return np.repeat(starts - _starts(lengths), lengths) + np.arange(int(lengths.sum()))
