"""Requests to token ids: chat template, tokenizer, and what does not fit, each fault naming its field."""

from typing import Any

from rollout_server.engines.base import Engine, Prompt
from services.api import RolloutRequest
from services.contract import Message
from services.http import Problem


def encode(
    engine: Engine,
    field: str,
    messages: list[Message] | None = None,
    prompt: str | None = None,
    token_ids: list[int] | None = None,
) -> list[int]:
    """The prompt's token ids. `field` is where the request holds it. Raises Problem (422)."""
    if messages is not None:
        token_ids = _chat(engine.tokenizer, messages, field)
    elif prompt is not None:
        token_ids = engine.tokenizer(prompt).input_ids
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


def _chat(tokenizer: Any, messages: list[Message], field: str) -> list[int]:
    if not tokenizer.chat_template:
        raise Problem(422, "No chat template", "the model's tokenizer has none; send `prompt` instead", field)
    turns = [message.model_dump() for message in messages]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program of the model's author, with errors of its own
        raise Problem(422, "The chat template refuses these messages", str(error)[:300], field) from error
    # The template writes the special tokens itself.
    return tokenizer(text, add_special_tokens=False).input_ids


def rollout_prompts(engine: Engine, requests: list[RolloutRequest]) -> list[Prompt]:
    """Raises Problem (422)."""
    prompts = []
    for place, request in enumerate(requests):
        given = next(name for name in ("messages", "prompt", "prompt_token_ids") if getattr(request, name) is not None)
        token_ids = encode(
            engine, f"requests[{place}].{given}", request.messages, request.prompt, request.prompt_token_ids
        )
        prompts.append(Prompt(request.group_id, token_ids, request.n, request.sampling))
    return prompts
