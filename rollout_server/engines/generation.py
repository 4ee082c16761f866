"""Batched generation: one prefill per distinct prompt, then one token a step for every unfinished row."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from rollout_server.engines.base import Aborted, Prompt
from rollout_server.engines.cache import BufferCache
from rollout_server.engines.sampling import Rows, choose
from rollout_server.engines.stopping import StopStrings
from services.contract import Sampling


@dataclass(frozen=True)
class Row:
    """One completion to make. `number` counts over the whole request. `uniforms` [limit] float64 are its randomness."""

    number: int
    prompt: list[int]
    sampling: Sampling
    limit: int
    uniforms: torch.Tensor


@dataclass(frozen=True)
class Drawn:
    """What was drawn for one row. `stopped`: by EOS (included) or a stop string, not by the token limit."""

    token_ids: list[int]
    logprobs: list[float]
    stopped: bool


class Token(NamedTuple):
    """One token, its log-probability at the sampling temperature, and the likeliest (token, logprob) beside it."""

    id: int
    logprob: float
    top: list[tuple[int, float]]


Emit = Callable[[list[tuple[int, Token]]], None]
"""Told after every step: the number of each row that drew, and the token it drew."""


def rows_of(prompts: list[Prompt], max_model_len: int) -> list[Row]:
    """A prompt's rows share one generator, seeded by the prompt's seed: nothing else in the request can change them."""
    rows: list[Row] = []
    for prompt in prompts:
        limit = min(prompt.sampling.max_tokens, max_model_len - len(prompt.token_ids))
        generator = torch.Generator()
        if prompt.sampling.seed is None:
            generator.seed()
        else:
            generator.manual_seed(prompt.sampling.seed)
        uniforms = torch.rand(prompt.n, limit, generator=generator, dtype=torch.float64)
        rows += [
            Row(len(rows) + copy, prompt.token_ids, prompt.sampling, limit, uniforms[copy]) for copy in range(prompt.n)
        ]
    return rows


class Batch:
    """The rows that are generated together, and how far they are. Rows that are done leave when that pays."""

    def __init__(self, rows: list[Row], vocab_size: int, device: torch.device):
        self.rows, self.device = rows, device
        steps = max(row.limit for row in rows)
        self.uniforms = torch.zeros(len(rows), steps, dtype=torch.float64)
        for place, row in enumerate(rows):
            self.uniforms[place, : row.limit] = row.uniforms
        self.uniforms = self.uniforms.to(device)
        self.limits = torch.tensor([row.limit for row in rows], device=device)
        self.sampling = Rows.of([row.sampling for row in rows], vocab_size, device)
        self.tokens = torch.zeros(len(rows), steps, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(len(rows), steps, dtype=torch.float32, device=device)
        self.lengths = torch.zeros(len(rows), dtype=torch.int64, device=device)
        self.stopped = torch.zeros(len(rows), dtype=torch.bool, device=device)
        # `place[i]` is where the i-th row still computed lies in the tensors above.
        self.place = torch.arange(len(rows), device=device)
        self.running = torch.ones(len(rows), dtype=torch.bool, device=device)

    def drawn(self) -> list[Drawn]:
        lengths = self.lengths.tolist()
        stopped, tokens, logprobs = self.stopped.tolist(), self.tokens.cpu(), self.logprobs.cpu()
        return [
            Drawn(tokens[place, :length].tolist(), logprobs[place, :length].tolist(), stopped[place])
            for place, length in enumerate(lengths)
        ]


@torch.inference_mode()
def generate(
    model: Any,
    rows: list[Row],
    eos_token_ids: list[int],
    stop_strings: StopStrings,
    aborted: Callable[[], bool],
    emit: Emit | None = None,
    top_logprobs: int = 0,
    swapped: Callable[[int], bool] = lambda _step: False,
) -> list[Drawn]:
    """Complete all rows as one batch. What comes out depends on the arguments and the weights alone.

    `emit` is called after every step, with the `top_logprobs` likeliest tokens of each row. `swapped(step)` is asked
    before token `step` of all rows; after True it and those that follow are made by the weights that the model has now.
    Raises Aborted when `aborted()` turns true.
    """
    device = model.device
    vocab_size = model.get_output_embeddings().weight.shape[0]
    batch = Batch(rows, vocab_size, device)
    eos = torch.tensor(eos_token_ids, device=device)
    cache = BufferCache(model.config)
    logits, mask, positions = _prefill(model, cache, rows, device)
    sampling, step = batch.sampling, 0
    while True:
        tokens, logprobs = choose(logits, sampling, batch.uniforms[batch.place, step])
        chosen = logprobs.gather(1, tokens[:, None]).squeeze(1)
        batch.tokens[batch.place, step] = tokens
        batch.logprobs[batch.place, step] = chosen
        step += 1
        stops = (tokens[:, None] == eos).any(1)
        if stop_strings or emit:
            numbers = [rows[place].number for place in batch.place.tolist()]
            alive, token_ids = batch.running.tolist(), tokens.tolist()
            if stop_strings:
                found = [
                    is_alive and stop_strings.push(number, token_id)
                    for number, token_id, is_alive in zip(numbers, token_ids, alive, strict=True)
                ]
                stops |= torch.tensor(found, device=device)
            if emit:
                fresh = _tokens(token_ids, chosen, logprobs, top_logprobs)
                emit([pair for pair, is_alive in zip(zip(numbers, fresh, strict=True), alive, strict=True) if is_alive])
        over = batch.running & (stops | (batch.limits[batch.place] <= step))
        batch.lengths[batch.place[over]] = step
        batch.stopped[batch.place[over]] = stops[over]
        batch.running &= ~over
        left = int(batch.running.sum())
        if not left:
            return batch.drawn()
        if aborted():
            raise Aborted(f"stopped after {step} tokens with {left} of {len(rows)} completions unfinished")
        if left <= len(batch.place) * 3 // 4:
            # Copying the cache costs about one step's attention; a quarter fewer rows repay it within a few steps.
            kept = batch.running.nonzero().squeeze(1)
            cache.take(kept)
            batch.place, batch.running, sampling = batch.place[kept], batch.running[kept], sampling.select(kept)
            tokens, positions = tokens[kept], positions[kept]
            mask = None if mask is None else mask[kept]
        if swapped(step):
            cache = BufferCache(model.config)
            begun = [(rows[place], batch.tokens[place, :step].tolist()) for place in batch.place.tolist()]
            begun_rows = [replace(row, prompt=row.prompt + token_ids) for row, token_ids in begun]
            logits, mask, positions = _prefill(model, cache, begun_rows, device)
            continue
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        logits = model(
            input_ids=tokens[:, None],
            attention_mask=mask,
            position_ids=positions[:, None],
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
        positions = positions + 1


def _prefill(
    model: Any, cache: BufferCache, rows: list[Row], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Run each distinct prompt once, left-padded, then repeat its cache for its rows.

    Returns logits [R, V] after the prompts, the attention mask [R, length] (none without padding) and the position of
    the next token [R].
    """
    distinct: dict[tuple[int, ...], int] = {}
    owner = torch.tensor([distinct.setdefault(tuple(row.prompt), len(distinct)) for row in rows], device=device)
    lengths = torch.tensor([len(prompt) for prompt in distinct], device=device)
    longest = int(lengths.max())
    padded = [[0] * (longest - len(prompt)) + list(prompt) for prompt in distinct]
    mask = torch.arange(longest, device=device) >= longest - lengths[:, None]
    is_padded = int(lengths.min()) < longest
    logits = model(
        input_ids=torch.tensor(padded, device=device),
        attention_mask=mask if is_padded else None,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]
    cache.take(owner)
    return logits[owner], mask[owner] if is_padded else None, lengths[owner]


def _tokens(token_ids: list[int], chosen: torch.Tensor, logprobs: torch.Tensor, top_logprobs: int) -> list[Token]:
    values, ids = logprobs.topk(top_logprobs, -1)
    top = [list(zip(*pair, strict=True)) for pair in zip(ids.tolist(), values.tolist(), strict=True)]
    return [Token(*token) for token in zip(token_ids, chosen.tolist(), top, strict=True)]
