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
from trainer.packing import Family, Packed

PAD = 0
"""What the row of an empty micro-batch is made of: any id of the vocabulary will do, its weight is 0."""

CPU_TOKENS = 4096
"""A CPU gains nothing from larger micro-batches, and loses where the activations leave its caches."""


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


def budget(micro_batch_tokens: int, device: torch.device) -> int:
    """Tokens of one forward on this device."""
    return micro_batch_tokens if device.type == "cuda" else min(micro_batch_tokens, CPU_TOKENS)


def deal(batch: Sequences, ranks: int, budget: int) -> list[list[np.ndarray]]:
    """Which sequences go into which micro-batch: [rank][micro-batch] -> indices, the same number for every rank.

    Completions of one prompt stay together, so that the prompt is computed once, in parts of at most `budget` tokens
    (with several ranks, of at most a quarter of a rank's share, so that these can be balanced). Largest first, each
    part goes to the rank with the fewest tokens so far, and there to the first micro-batch with room for it. A single
    sequence longer than the budget goes alone. Ranks that need fewer micro-batches get empty ones, because every rank
    must take part in the same number of collectives.
    """
    families = _families(batch)
    whole = sum(_size(batch, family) for family in families)
    most = budget if ranks == 1 else min(budget, max(1, whole // (4 * ranks)))
    parts = [part for family in families for part in _parts(batch, family, most)]
    sizes = [_size(batch, part) for part in parts]
    loads = [(0, rank) for rank in range(ranks)]
    plan: list[list[tuple[int, list[np.ndarray]]]] = [[] for _ in range(ranks)]
    for number in sorted(range(len(parts)), key=lambda number: -sizes[number]):
        load, rank = heapq.heappop(loads)
        heapq.heappush(loads, (load + sizes[number], rank))
        _put(plan[rank], parts[number], sizes[number], budget)
    count = max(1, *(len(share) for share in plan))
    empty = [np.zeros(0, int)]
    return [[np.concatenate(indices) for _, indices in share] + empty * (count - len(share)) for share in plan]


@dataclass(frozen=True)
class MicroBatch:
    """One forward: a packed row, T completion tokens to be trained on in all.

    `positions` int64 [T], into the row: where the logits that produced a token stand (one before it); `targets` int64
    [T]; `segments` int64 [T], which of the micro-batch's sequences a token is of, from 0; `rollout`, `advantages`,
    `temperatures`, `weights` float32 [T]. A weight is 0 only for the filler of an empty micro-batch.
    """

    packed: Packed
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
    """The sequences at `indices` as tensors, on the CPU, token by token in that order, with the weights they have in
    all of `batch`; neighbours with the same prompt share it. Without indices: one two-token row of weight 0."""
    if len(indices) == 0:
        none = torch.zeros(1)
        at = torch.zeros(1, dtype=torch.long)
        nothing = Packed(torch.full((1, 2), PAD), torch.arange(2)[None], (Family(2, ()),))
        return MicroBatch(nothing, at, torch.full((1,), PAD), at, none, none, none + 1, none)
    weights = token_weights(batch.completions, aggregation, constant)[indices]
    completions = batch.completions[indices]
    packed, positions = _packed(batch, indices)
    answers = _spans(_starts(batch.lengths)[indices] + batch.prompts[indices], completions)
    return MicroBatch(
        packed=packed,
        positions=torch.from_numpy(positions),
        targets=torch.from_numpy(batch.tokens[answers].astype(np.int64)),
        segments=torch.from_numpy(np.repeat(np.arange(len(indices)), completions)),
        rollout=torch.from_numpy(batch.logprobs[batch.completion_tokens(indices)]),
        advantages=torch.from_numpy(np.repeat(batch.advantages[indices], completions)),
        temperatures=torch.from_numpy(np.repeat(batch.temperatures[indices], completions)),
        weights=torch.from_numpy(np.repeat(weights, completions).astype(np.float32)),
    )


def _packed(batch: Sequences, indices: np.ndarray) -> tuple[Packed, np.ndarray]:
    """The row of these sequences, and where in it the logits of each of their completion tokens stand."""
    starts = _starts(batch.lengths)
    tokens, places, positions = [], [], []
    families: list[Family] = []
    shared = batch.tokens[:0]
    at = last = 0
    for index in indices:
        prompt, length = int(batch.prompts[index]), int(batch.completions[index]) - 1
        own = batch.tokens[starts[index] : starts[index] + prompt]
        if not np.array_equal(own, shared):
            shared = own
            tokens.append(own)
            places.append(np.arange(prompt))
            families.append(Family(prompt, ()))
            at += prompt
            last = at - 1
        first = starts[index] + prompt
        tokens.append(batch.tokens[first : first + length])
        places.append(np.arange(prompt, prompt + length))
        positions += [np.asarray([last]), np.arange(at, at + length)]
        families[-1] = Family(prompt, (*families[-1].completions, length))
        at += length
    ids, numbers = (torch.from_numpy(np.concatenate(x).astype(np.int64))[None] for x in (tokens, places))
    return Packed(ids, numbers, tuple(families)), np.concatenate(positions)


def _families(batch: Sequences) -> list[list[int]]:
    """Indices by prompt, each family's longest completion first: the attention of neighbours is padded alike."""
    starts = _starts(batch.lengths)
    found: dict[bytes, list[int]] = {}
    for index, (start, length) in enumerate(zip(starts, batch.prompts, strict=True)):
        found.setdefault(batch.tokens[start : start + length].tobytes(), []).append(index)
    return [sorted(family, key=lambda index: -batch.completions[index]) for family in found.values()]


def _size(batch: Sequences, family: Sequence[int] | np.ndarray) -> int:
    """Tokens of the row that these completions of one prompt make."""
    return int(batch.prompts[family[0]] + (batch.completions[np.asarray(family)] - 1).sum())


def _parts(batch: Sequences, family: list[int], most: int) -> list[np.ndarray]:
    """A family cut into runs of at most `most` tokens each, or of one sequence."""
    parts: list[list[int]] = []
    for index in family:
        if parts and _size(batch, [*parts[-1], index]) <= most:
            parts[-1].append(index)
        else:
            parts.append([index])
    return [np.asarray(part) for part in parts]


def _put(share: list[tuple[int, list[np.ndarray]]], part: np.ndarray, size: int, budget: int) -> None:
    for number, (load, indices) in enumerate(share):
        if load + size <= budget:
            indices.append(part)
            share[number] = (load + size, indices)
            return
    share.append((size, [part]))


def _flat(rows: list[list[int]] | list[list[float]], dtype: str) -> np.ndarray:
    return np.concatenate([np.asarray(row, dtype) for row in rows]) if rows else np.zeros(0, dtype)


def _starts(lengths: np.ndarray) -> np.ndarray:
    return np.cumsum(lengths, dtype=np.int64) - lengths


def _spans(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, ... for each of `lengths`, one after the other."""
    return np.repeat(starts - _starts(lengths), lengths) + np.arange(int(lengths.sum()))
