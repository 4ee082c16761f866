"""The scorer model on transformers: one forward of the decoder, then the tiled pass over the LM head.

Only completion rows go through the head. Items are sorted by length and padded on the right up to a token budget; a
causal model never looks right, so rows of real tokens are what they would be without padding and need no mask.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from reward_server.scorer.causal_model import CausalModel, check_same_vocabulary
from reward_server.scorer.head import Head, head_of
from reward_server.scorer.items import Abandoned, ItemScores, Span, TokenItem, check_item, collect, eos_ids
from reward_server.scorer.metrics import Wanted
from reward_server.scorer.statistics import Reference, tiled_statistics
from services.contract import Version

log = logging.getLogger(__name__)

CPU_BATCH_TOKENS = 2048
"""A CPU gains nothing from more, and loses much where the activations leave its caches."""


class TransformersScorer:
    """Scores token ids with a Hugging Face causal model. Not thread-safe: one thread calls `score` and `swap`.

    `max_batch_tokens` bounds the padded tokens of one forward; a single longer item still runs, by itself.
    `reference_model`: a frozen model beside it, for `kl_to_reference`.
    `ema_decay`: serve the moving average of the weights that were loaded (decay per version) instead of the newest.
    `version` is the newest version that is part of the served weights; (0, 0) is the model as it was given.
    """

    def __init__(
        self,
        path: str,
        dtype: str = "bfloat16",
        device: str = "auto",
        max_batch_tokens: int = 16384,
        revision: str | None = None,
        trust_remote_code: bool = False,
        attn_implementation: str = "sdpa",
        ema_decay: float | None = None,
        reference_model: str | None = None,
    ):
        """Raises ValueError: unknown dtype, a model whose logits cannot be reproduced, or a reference model that cannot
        be compared with it; OSError: no such model."""
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError("device: PyTorch sees no GPU here; use cpu")
        self.path, self.device = path, torch.device(device)
        self.max_batch_tokens = min(max_batch_tokens, CPU_BATCH_TOKENS) if device == "cpu" else max_batch_tokens
        how: dict[str, Any] = {"attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code}
        self.causal = CausalModel.load(path, dtype, self.device, revision=revision, **how)
        self.model, self.decoder, self.tokenizer = self.causal.model, self.causal.decoder, self.causal.tokenizer
        self.vocab_size = self.causal.head.vocab_size
        self.max_length = self.causal.max_length
        self.eos_ids = eos_ids(self.model.generation_config, self.causal.config, self.tokenizer)
        self.reference: CausalModel | None = None
        if reference_model is not None:
            self.reference = _reference(self.causal, reference_model, dtype, self.device, how)
        self.version = Version(lineage=0, version=0)
        self.ema_decay = ema_decay
        self._average: dict[str, torch.Tensor] = {}
        if ema_decay is not None:
            self._average = {name: tensor.float().cpu().clone() for name, tensor in self._tensors().items()}
        log.info("scorer %s: %s on %s, vocabulary %d", path, dtype, self.device, self.vocab_size)

    @property
    def head(self) -> Head:
        return self.causal.head

    @property
    def has_reference(self) -> bool:
        return self.reference is not None

    # ---- scoring -----------------------------------------------------------------------------------------------

    def check(self, item: TokenItem) -> None:
        """Raises ValueError naming the field, the value and what would be valid."""
        longest = self.max_length
        if self.reference is not None and item.needs_reference and self.reference.max_length is not None:
            longest = min(self.reference.max_length, longest or self.reference.max_length)
        check_item(item, self.vocab_size, longest, self.has_reference)

    @torch.inference_mode()
    def score(self, items: Sequence[TokenItem], unwanted: Callable[[], bool] = lambda: False) -> list[ItemScores]:
        """Scores in the order of the items. Raises ValueError (see `check`) before anything is computed.

        `unwanted` is asked before every batch; Abandoned is raised when nobody waits for the scores any more.
        """
        for item in items:
            self.check(item)
        results = [ItemScores(0)] * len(items)
        for sequences in _sequences(items, self.eos_ids):
            for batch in _batches(sequences, self.max_batch_tokens):
                if unwanted():
                    raise Abandoned
                for place, result in self._score_batch(batch):
                    results[place] = result
        return results

    def _score_batch(self, batch: list["_Sequence"]) -> Iterator[tuple[int, ItemScores]]:
        """Scores, each with the place of its item."""
        ids = torch.zeros(len(batch), len(batch[0].ids), dtype=torch.int64)
        rows = _Rows()
        asked: list[tuple[int, TokenItem, Span]] = []
        for number, sequence in enumerate(batch):
            ids[number, : len(sequence.ids)] = torch.tensor(sequence.ids)
            asked += [(place, item, rows.add(number, item, sequence.end)) for place, item in sequence.items]
        ids = ids.to(self.device)
        places = rows.sequence, rows.position
        reference = None
        if self.reference is not None and any(item.needs_reference for _, item, _ in asked):
            reference = Reference(self.reference.hidden(ids)[places], self.reference.head)
        statistics = tiled_statistics(
            self.causal.hidden(ids)[places],
            self.head,
            torch.tensor(rows.chosen, device=self.device),
            torch.tensor(rows.temperature, dtype=torch.float64, device=self.device),
            Wanted.of(item.fields for _, item, _ in asked),
            reference,
        ).cpu()
        for place, item, span in asked:
            yield place, collect(item, statistics, span)

    # ---- weights -----------------------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Parameters and saved buffers, a tied one under its first name alone."""
        places: set[int] = set()
        tensors = {}
        for name, tensor in self.model.state_dict().items():
            if tensor.data_ptr() not in places:
                places.add(tensor.data_ptr())
                tensors[name] = tensor
        return tensors

    def stage(self, version: Version, directory: Path) -> dict[str, torch.Tensor]:
        """Read a Hugging Face folder's safetensors into memory; the served model is not touched. May run in any thread.

        With `ema_decay` the result is the average after this version; versions that were skipped count as equal to it.
        Raises ValueError: a tensor is missing, unknown, of another shape, or a file is unreadable.
        """
        own = self._tensors()
        aliases = self.model.state_dict().keys() - own.keys()
        staged: dict[str, torch.Tensor] = {}
        for file in sorted(directory.glob("*.safetensors")):
            try:
                with safe_open(file, "pt") as tensors:
                    for name in tensors.keys():
                        if name in own:
                            staged[name] = tensors.get_tensor(name)
                        elif name not in aliases:
                            raise ValueError(f"{file}: the model has no tensor {name!r}")
            except SafetensorError as error:
                raise ValueError(f"{file}: not readable: {error}") from error
        for name, tensor in own.items():
            if name not in staged:
                raise ValueError(f"{directory}: tensor {name!r} is missing")
            if staged[name].shape != tensor.shape:
                raise ValueError(f"{directory}: {name!r} is {list(staged[name].shape)}, needs {list(tensor.shape)}")
        if self.ema_decay is None:
            return staged
        same_lineage = version.lineage == self.version.lineage
        steps = max(1, version.version - self.version.version) if same_lineage else 1
        keep = self.ema_decay**steps
        return {name: self._average[name] * keep + tensor.float() * (1 - keep) for name, tensor in staged.items()}

    @torch.inference_mode()
    def swap(self, version: Version, staged: dict[str, torch.Tensor]) -> None:
        """Make staged weights the served ones."""
        for name, tensor in self._tensors().items():
            tensor.copy_(staged[name])
        if self.ema_decay is not None:
            self._average = staged
        self.causal.head = head_of(self.model)
        self.version = version

    def load(self, version: Version, directory: Path) -> None:
        """`stage`, then `swap`."""
        self.swap(version, self.stage(version, directory))


@dataclass(frozen=True)
class _Sequence:
    """What one forward computes, for all items that ask about it; `end` completion tokens are scored."""

    ids: tuple[int, ...]
    end: int
    items: list[tuple[int, TokenItem]]
    """With their places among those of the call."""


class _Rows:
    """The rows of a batch that go through the head: where they lie, which token they are asked about, temperature."""

    def __init__(self) -> None:
        self.sequence: list[int] = []
        self.position: list[int] = []
        self.chosen: list[int] = []
        self.temperature: list[float] = []
        self._slices: dict[tuple[int, int, float], slice] = {}

    def add(self, number: int, item: TokenItem, end: int) -> Span:
        """Rows of sequence `number` that predict its first `end` completion tokens, rows of the tokens, or both."""
        start = len(item.prompt_ids)
        only_unshifted = item.unshifted == set(item.metrics)
        shifted = None if only_unshifted else self._slice(number, start - 1, item, end, item.temperature)
        unshifted = self._slice(number, start, item, end, 1.0) if item.unshifted else None
        return Span(shifted, unshifted)

    def _slice(self, number: int, first: int, item: TokenItem, end: int, temperature: float) -> slice:
        """Items of one sequence that differ in something else share their rows."""
        key = (number, first, temperature)
        if key not in self._slices:
            self._slices[key] = slice(len(self.sequence), len(self.sequence) + end)
            self.sequence += [number] * end
            self.position += range(first, first + end)
            self.chosen += list(item.completion_ids[:end])
            self.temperature += [temperature] * end
        return self._slices[key]


def _sequences(items: Sequence[TokenItem], eos_ids: frozenset[int]) -> list[list[_Sequence]]:
    """The sequences that have tokens to score, longest first; apart from each other those that go without the reference
    model and those that need it."""
    parts: tuple[dict[Any, _Sequence], ...] = ({}, {})
    for place, item in enumerate(items):
        end = item.scored_length(eos_ids)
        if end:
            key = tuple(item.prompt_ids), tuple(item.completion_ids)
            new = _Sequence((*key[0], *key[1]), end, [])
            parts[item.needs_reference].setdefault(key, new).items.append((place, item))
    return [sorted(part.values(), key=lambda sequence: -len(sequence.ids)) for part in parts]


def _batches(sequences: list[_Sequence], budget: int) -> list[list[_Sequence]]:
    """Consecutive runs (longest first) whose padded size stays within the budget, at least one sequence each."""
    batches: list[list[_Sequence]] = []
    for sequence in sequences:
        if batches and (len(batches[-1]) + 1) * len(batches[-1][0].ids) <= budget:
            batches[-1].append(sequence)
        else:
            batches.append([sequence])
    return batches


def _reference(own: CausalModel, path: str, dtype: str, device: torch.device, how: dict[str, Any]) -> CausalModel:
    try:
        reference = CausalModel.load(path, dtype, device, **how)
        check_same_vocabulary(own, reference)
    except (ValueError, OSError) as error:
        raise ValueError(f"the reference model {path}: {error}") from error
    return reference
