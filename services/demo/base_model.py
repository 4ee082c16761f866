"""The demo's base model: a tiny Llama, pretrained from scratch on the authors' text in about a minute of one thread.

243,168 parameters, a vocabulary of 32. It becomes an ordinary Hugging Face folder that AutoTokenizer,
AutoModelForCausalLM and vLLM load. (Llama, because transformers rebuilds the tokenizer of some model types, Qwen2 among
them, from its own class instead of taking the saved one; head size 32, because vLLM's CPU attention supports it.)
"""

import logging
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from services.demo.task import author, problems

log = logging.getLogger(__name__)

Progress = Callable[[int, int, float], None]
"""Called after each pretraining step with (steps done, steps in all, loss in nats per token)."""

SPECIALS = ["<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>"]
CHARACTERS = "0123456789+= -.,?:"
WORDS = ["units", "tens", "answer", "maybe"]
CHAT_TEMPLATE = (
    "<bos>{% for message in messages %}"
    "{% if message['role'] == 'user' %}<user>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}<assistant>{{ message['content'] }}<eos>"
    "{% else %}{{ raise_exception('the demo model knows user and assistant messages only') }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)

STEPS = 700
BATCH = 128
LEARNING_RATE = 4e-3
WARMUP = 50
PART = 32


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, or a word with or without the space before it."""
    tokens = [*SPECIALS, *CHARACTERS, *WORDS, *(f" {word}" for word in WORDS)]
    backend = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[a-z]+|\d|[^\da-z]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=SPECIALS[4:],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )


def make_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def _padded(rows: list[tuple[list[int], list[int]]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(token ids, labels) of (prompt, completion) rows, int64 [rows, longest]; labels: -100 on prompt and padding."""
    longest = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids = torch.full((len(rows), longest), pad)
    labels = torch.full((len(rows), longest), -100)
    for row, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        ids[row, :end] = torch.tensor(prompt + completion)
        labels[row, len(prompt) : end] = torch.tensor(completion)
    return ids, labels


def _batches(
    tokenizer: PreTrainedTokenizerFast, rng: random.Random
) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Endless batches of BATCH rows, each cut by length into parts of PART rows: less padding, same gradient."""
    pairs = problems("pretraining")
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    while True:
        rows = []
        for problem in rng.choices(pairs, k=BATCH):
            prompt = tokenizer.encode(f"<bos><user>{problem.prompt}<assistant>")
            rows.append((prompt, [*tokenizer.encode(author(problem, rng)), eos]))
        rows.sort(key=lambda row: len(row[1]))
        yield [_padded(rows[start : start + PART], pad) for start in range(0, BATCH, PART)]


@contextmanager
def _repeatable(seed: int) -> Iterator[None]:
    """One thread (sums of several differ in the last bits) and a random state of its own; both are put back after."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


def _learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then cosine down to 5 %."""
    if step < WARMUP:
        return LEARNING_RATE * (step + 1) / WARMUP
    done = (step - WARMUP) / max(1, steps - WARMUP)
    return LEARNING_RATE * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


def pretrain(
    tokenizer: PreTrainedTokenizerFast, seed: int, steps: int, progress: Progress | None = None
) -> LlamaForCausalLM:
    """Train from random weights on the authors' completions, float32 on the CPU. The same seed gives the same bits."""
    with _repeatable(seed):
        model = LlamaForCausalLM(make_config(tokenizer)).float().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
        batches = _batches(tokenizer, random.Random(seed))
        for step in range(steps):
            batch = next(batches)
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(step, steps)
            optimizer.zero_grad()
            tokens = sum(int((labels >= 0).sum()) for _, labels in batch)
            loss = 0.0
            for ids, labels in batch:
                # Padding is on the right here, so causal attention never sees it and no mask is needed.
                logits = model(ids).logits[:, :-1]
                part = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / tokens
                part.backward()
                loss += part.item()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if progress is not None:
                progress(step + 1, steps, loss)
    return model.eval()


def make_demo_model(directory: Path, seed: int = 0, steps: int = STEPS, progress: Progress | None = None) -> Path:
    """Pretrain the base model and save it with its tokenizer as a Hugging Face folder; returns the folder."""
    tokenizer = make_tokenizer()
    model = pretrain(tokenizer, seed, steps, progress)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    log.info("base model (seed %d, %d parameters) saved in %s", seed, model.num_parameters(), directory)
    return Path(directory)
