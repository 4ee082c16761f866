"""The scorer model on transformers: one forward of the decoder, then the tiled pass over the LM head.

Only completion rows go through the head. Items are sorted by length and padded on the right up to a token budget; a
causal model never looks right, so rows of real tokens are what they would be without padding and need no mask.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from reward_server.scorer.head import Head, check_head, head_of
from reward_server.scorer.items import Abandoned, ItemScores, Span, TokenItem, check_item, collect, eos_ids
from reward_server.scorer.metrics import Wanted
from reward_server.scorer.statistics import tiled_statistics
from services.contract import Version

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class TransformersScorer:
    """Scores token ids with a Hugging Face causal model. Not thread-safe: one thread calls `score` and `swap`.

    `max_batch_tokens` bounds the padded tokens of one forward; a single longer item still runs, by itself.
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
    ):
        """Raises ValueError: unknown dtype, or a model whose logits cannot be reproduced; OSError: no such model."""
        if dtype not in DTYPES:
            raise ValueError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError("device: PyTorch sees no GPU here; use cpu")
        source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        self.path, self.device, self.max_batch_tokens = path, torch.device(device), max_batch_tokens
        self.tokenizer = AutoTokenizer.from_pretrained(path, **source)
        if len(self.tokenizer) < 2:  # what transformers makes up for a folder that has no tokenizer
            raise ValueError("has no tokenizer files")
        model: Any = AutoModelForCausalLM
        self.model = model.from_pretrained(path, dtype=DTYPES[dtype], attn_implementation=attn_implementation, **source)
        self.model.to(self.device).eval().requires_grad_(False)
        self.decoder = self.model.get_decoder()
        self.head: Head = head_of(self.model)
        check_head(self.model, self.decoder, self.head)
        config = self.model.config.get_text_config()
        self.vocab_size: int = config.vocab_size
        self.max_length: int | None = getattr(config, "max_position_embeddings", None)
        self.eos_ids = eos_ids(self.model.generation_config, config, self.tokenizer)
        self.version = Version(lineage=0, version=0)
        self.ema_decay = ema_decay
        self._average: dict[str, torch.Tensor] = {}
        if ema_decay is not None:
            self._average = {name: tensor.float().cpu().clone() for name, tensor in self._tensors().items()}
        log.info("scorer %s: %s on %s, vocabulary %d", path, dtype, self.device, self.vocab_size)

    # ---- scoring -----------------------------------------------------------------------------------------------

    def check(self, item: TokenItem) -> None:
        """Raises ValueError naming the field, the value and what would be valid."""
        check_item(item, self.vocab_size, self.max_length)

    @torch.inference_mode()
    def score(self, items: Sequence[TokenItem], unwanted: Callable[[], bool] = lambda: False) -> list[ItemScores]:
        """Scores in the order of the items. Raises ValueError (see `check`) before anything is computed.

        `unwanted` is asked before every batch; Abandoned is raised when nobody waits for the scores any more.
        """
        for item in items:
            self.check(item)
        ends = [item.scored_length(self.eos_ids) for item in items]
        results = [ItemScores(0)] * len(items)
        full = sorted((index for index, end in enumerate(ends) if end), key=lambda index: (-len(items[index]), index))
        for batch in _batches(full, [len(item) for item in items], self.max_batch_tokens):
            if unwanted():
                raise Abandoned
            scores = self._score_batch([items[index] for index in batch], [ends[index] for index in batch])
            for index, result in zip(batch, scores, strict=True):
                results[index] = result
        return results

    def _score_batch(self, items: list[TokenItem], ends: list[int]) -> list[ItemScores]:
        ids = torch.zeros(len(items), max(map(len, items)), dtype=torch.int64)
        for row, item in enumerate(items):
            ids[row, : len(item)] = torch.tensor([*item.prompt_ids, *item.completion_ids])
        hidden = self.decoder(input_ids=ids.to(self.device), use_cache=False).last_hidden_state

        rows = _Rows()
        spans = [rows.add(number, item, end) for number, (item, end) in enumerate(zip(items, ends, strict=True))]
        statistics = tiled_statistics(
            hidden[rows.sequence, rows.position],
            self.head,
            torch.tensor(rows.chosen, device=self.device),
            torch.tensor(rows.temperature, dtype=torch.float64, device=self.device),
            Wanted.of(item.fields for item in items),
        ).cpu()
        return [collect(item, statistics, span) for item, span in zip(items, spans, strict=True)]

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
        self.head = head_of(self.model)
        self.version = version

    def load(self, version: Version, directory: Path) -> None:
        """`stage`, then `swap`."""
        self.swap(version, self.stage(version, directory))


class _Rows:
    """The rows of a batch that go through the head: where they lie, which token they are asked about, temperature."""

    def __init__(self) -> None:
        self.sequence: list[int] = []
        self.position: list[int] = []
        self.chosen: list[int] = []
        self.temperature: list[float] = []

    def add(self, number: int, item: TokenItem, end: int) -> Span:
        """Rows of sequence `number` that predict its first `end` completion tokens, rows of the tokens, or both."""
        start = len(item.prompt_ids)
        only_unshifted = item.unshifted == set(item.metrics)
        shifted = None if only_unshifted else self._extend(number, start - 1, item, end, item.temperature)
        unshifted = self._extend(number, start, item, end, 1.0) if item.unshifted else None
        return Span(shifted, unshifted)

    def _extend(self, number: int, first: int, item: TokenItem, end: int, temperature: float) -> slice:
        before = len(self.sequence)
        self.sequence += [number] * end
        self.position += range(first, first + end)
        self.chosen += list(item.completion_ids[:end])
        self.temperature += [temperature] * end
        return slice(before, before + end)


def _batches(order: list[int], lengths: list[int], budget: int) -> list[list[int]]:
    """Consecutive runs of `order` (longest first) whose padded size stays within the budget, at least one item each."""
    batches: list[list[int]] = []
    for index in order:
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
