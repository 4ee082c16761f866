"""Text and chat messages to token ids, each fault as a problem that names its field."""

import threading
from collections.abc import Sequence
from typing import Any

from services.contract import Message, Task
from services.problem import Problem

LONGEST_TOKEN = 128
"""Characters. A text that would not fit if all its tokens were that long is refused without tokenizing it."""


def as_text(task: Task) -> str:
    """The prompt for readers that know no chat template: messages as paragraphs that begin with their role."""
    if task.prompt is not None:
        return task.prompt
    return "\n\n".join(f"{message.role}: {message.content}" for message in task.messages or [])


class Encoder:
    """Wraps a Hugging Face tokenizer; may be used from several threads. `max_tokens`: what the model takes."""

    def __init__(self, tokenizer: Any, max_tokens: int | None = None):
        self.tokenizer = tokenizer
        self.most_characters = None if max_tokens is None else LONGEST_TOKEN * max_tokens
        self._lock = threading.Lock()

    def prompt(
        self, field: str, messages: list[Message] | None, text: str | None, token_ids: list[int] | None
    ) -> list[int]:
        """Token ids of whichever is given; `field` is the object in the request that holds them. Raises Problem (422).

        Messages go through the model's chat template, with the opening of the assistant's turn.
        """
        if token_ids is not None:
            return token_ids
        with self._lock:
            if messages is not None:
                return self._chat(f"{field}.messages", messages)
            assert text is not None
            self._check_prompt(f"{field}.prompt", text)
            return self.tokenizer(text).input_ids

    def completion(self, text: str | None, token_ids: list[int] | None) -> list[int]:
        """Text is taken as it stands: nothing says whether the model ended it by an EOS token, so none is added.

        Raises ValueError for a text far too long for the model.
        """
        if token_ids is not None:
            return token_ids
        assert text is not None
        if self._is_too_long(text):
            raise ValueError(f"completion: at most {self.most_characters} characters (got {len(text)})")
        with self._lock:
            return self.tokenizer(text, add_special_tokens=False).input_ids

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token by itself."""
        if not token_ids:
            return []  # batch_decode of no token at all is one empty text
        distinct = list(dict.fromkeys(token_ids))
        with self._lock:
            texts = dict(zip(distinct, self.tokenizer.batch_decode([[token] for token in distinct]), strict=True))
        return [texts[token] for token in token_ids]

    def _is_too_long(self, text: str) -> bool:
        return self.most_characters is not None and len(text) > self.most_characters

    def _check_prompt(self, field: str, text: str) -> None:
        if self._is_too_long(text):
            detail = f"at most {self.most_characters} characters (got {len(text)})"
            raise Problem(422, "The prompt is too long", detail, field)

    def _chat(self, field: str, messages: list[Message]) -> list[int]:
        if not self.tokenizer.chat_template:
            raise Problem(422, "No chat template", "the model's tokenizer has none; send `prompt` instead", field)
        turns = [message.model_dump() for message in messages]
        try:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program of the model's author, with errors of its own
            raise Problem(422, "The chat template refuses these messages", str(error)[:300], field) from error
        self._check_prompt(field, text)
        # The template writes the special tokens itself.
        return self.tokenizer(text, add_special_tokens=False).input_ids
