"""Prompts as a model's tokenizer counts them."""

from collections.abc import Iterator, Sequence
from typing import Any

from services.contract import Task
from services.recipe_sections import Model
from services.rows import DataError

COUNT_BATCH = 1024


def load_tokenizer(model: Model) -> Any:
    """The model's tokenizer. Raises DataError naming `model.path`."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise DataError(f"model.path: no tokenizer for {model.path!r}: {str(error).splitlines()[0]}") from error


def prompt_lengths(tasks: Sequence[Task], tokenizer: Any) -> Iterator[int]:
    """Tokens of each prompt as the rollout server will feed it (chat template, opened for the assistant's turn)."""
    for start in range(0, len(tasks), COUNT_BATCH):
        batch = tasks[start : start + COUNT_BATCH]
        if batch[0].messages is None:
            ids = tokenizer([task.prompt for task in batch])["input_ids"]
        else:
            chats = [[message.model_dump() for message in task.messages or []] for task in batch]
            text = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
            # The template writes the special tokens itself.
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        yield from map(len, ids)
