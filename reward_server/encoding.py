"""Text and chat messages to token ids, each fault as a problem that names its field."""

import threading
from collections.abc import Sequence
from typing import Any

from services.contract import Message
from services.http import Problem


class Encoder:
    """Wraps a Hugging Face tokenizer; may be used from several threads."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
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
            return self.tokenizer(text).input_ids

    def completion(self, text: str | None, token_ids: list[int] | None) -> list[int]:
        """Text is taken as it stands: nothing says whether the model ended it by an EOS token, so none is added."""
        if token_ids is not None:
            return token_ids
        with self._lock:
            return self.tokenizer(text, add_special_tokens=False).input_ids

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token by itself."""
        with self._lock:
            return self.tokenizer.batch_decode([[token] for token in token_ids])

    def _chat(self, field: str, messages: list[Message]) -> list[int]:
        if not self.tokenizer.chat_template:
            raise Problem(422, "No chat template", "the model's tokenizer has none; send `prompt` instead", field)
        turns = [message.model_dump() for message in messages]
        try:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program of the model's author, with errors of its own
            raise Problem(422, "The chat template refuses these messages", str(error)[:300], field) from error
        # The template writes the special tokens itself.
        return self.tokenizer(text, add_special_tokens=False).input_ids
