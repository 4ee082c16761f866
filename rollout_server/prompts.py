"""Requests to token ids: chat template, tokenizer, and what does not fit, each fault naming its field."""

from typing import Any

from rollout_server.engines.base import Engine, Prompt
from services.api import RolloutRequest
from services.contract import Message
from services.problem import Problem

LONGEST_TOKEN = 128
"""Characters. A text that would not fit if all its tokens were that long is refused without tokenizing it."""
MOST_TOKENS = 2**24
"""Completion tokens that one call may ask for in all: they are kept in memory until it is answered."""


def check_size(engine: Engine, prompts: list[Prompt], field: str) -> None:
    """Raises Problem (422) when the completions asked for would be too many tokens in all."""
    room = engine.max_model_len
    most = sum(prompt.n * min(prompt.sampling.max_tokens, room - len(prompt.token_ids)) for prompt in prompts)
    if most > MOST_TOKENS:
        detail = f"completions x `max_tokens` come to {most} tokens, at most {MOST_TOKENS} go into one call"
        raise Problem(422, "The call asks for too much", detail, field)


def _tokens(engine: Engine, text: str, field: str, **options: Any) -> list[int]:
    most = LONGEST_TOKEN * engine.max_model_len
    if len(text) > most:
        detail = f"at most {most} characters for {engine.max_model_len} tokens (got {len(text)})"
        raise Problem(422, "The prompt is too long", detail, field)
    return engine.tokenizer(text, **options).input_ids


def encode(
    engine: Engine,
    field: str,
    messages: list[Message] | None = None,
    prompt: str | None = None,
    token_ids: list[int] | None = None,
) -> list[int]:
    """The prompt's token ids. `field` is where the request holds it. Raises Problem (422)."""
    if messages is not None:
        token_ids = _chat(engine, messages, field)
    elif prompt is not None:
        token_ids = _tokens(engine, prompt, field)
    if not token_ids:
        raise Problem(422, "The prompt is empty", "it has no tokens", field)
    if min(token_ids) < 0 or max(token_ids) >= engine.vocab_size:
        wrong = next(token for token in token_ids if not 0 <= token < engine.vocab_size)
        detail = f"token ids are 0 to {engine.vocab_size - 1} (got {wrong})"
        raise Problem(422, "Not a token of this model", detail, field)
    if len(token_ids) >= engine.max_model_len:
        most = engine.max_model_len - 1
        detail = f"at most {most} tokens leave room for one more (got {len(token_ids)})"
        raise Problem(422, "The prompt is too long", detail, field)
    return token_ids


def _chat(engine: Engine, messages: list[Message], field: str) -> list[int]:
    tokenizer = engine.tokenizer
    if not tokenizer.chat_template:
        raise Problem(422, "No chat template", "the model's tokenizer has none; send `prompt` instead", field)
    turns = [message.model_dump() for message in messages]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program of the model's author, with errors of its own
        raise Problem(422, "The chat template refuses these messages", str(error)[:300], field) from error
    # The template writes the special tokens itself.
    return _tokens(engine, text, field, add_special_tokens=False)


def rollout_prompts(engine: Engine, requests: list[RolloutRequest]) -> list[Prompt]:
    """Raises Problem (422)."""
    prompts = []
    for place, request in enumerate(requests):
        given = next(name for name in ("messages", "prompt", "prompt_token_ids") if getattr(request, name) is not None)
        token_ids = encode(
            engine, f"requests[{place}].{given}", request.messages, request.prompt, request.prompt_token_ids
        )
        prompts.append(Prompt(request.group_id, token_ids, request.n, request.sampling))
    check_size(engine, prompts, "requests")
    return prompts
