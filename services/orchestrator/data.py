"""The run's tasks in an order that is a pure function of the recipe, index -> task: resuming needs no state."""

import hashlib
import logging
import time
from dataclasses import dataclass, field
from typing import Any

from services.contract import Task, group_id
from services.prompt_tokens import load_tokenizer, prompt_lengths
from services.recipe import Data, Recipe
from services.rows import DataError
from services.tasks import read

log = logging.getLogger(__name__)


def _rank(seed: int, epoch: int, number: int) -> bytes:
    return hashlib.blake2b(f"{seed}.{epoch}.{number}".encode(), digest_size=8).digest()


@dataclass
class TaskSource:
    """Tasks by index: epoch `index // len(tasks)`, each epoch in an order of its own that depends on the seed alone.

    The order comes from sorting hashes, so that no library's random number generator can change it.
    """

    tasks: list[Task]
    run_id: str
    seed: int = 0
    shuffle: bool = True
    _orders: dict[int, list[int]] = field(default_factory=dict, repr=False)

    def order(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(len(self.tasks)))
        if epoch not in self._orders:
            while len(self._orders) > 2:
                del self._orders[min(self._orders)]
            numbers = range(len(self.tasks))
            self._orders[epoch] = sorted(numbers, key=lambda number: _rank(self.seed, epoch, number))
        return self._orders[epoch]

    def task(self, index: int) -> Task:
        epoch, place = divmod(index, len(self.tasks))
        return self.tasks[self.order(epoch)[place]]

    def group_id(self, index: int) -> str:
        return group_id(self.run_id, index // len(self.tasks), self.task(index).task_id)


def load(recipe: Recipe, tokenizer: Any = None, data: Data | None = None) -> TaskSource:
    """Read, check and filter `data` (`limit` rows of it), the recipe's own by default.

    With a chat template in the tokenizer, tasks are `messages`; without one they are the plain `prompt`. Prompts longer
    than `data.max_prompt_tokens` are dropped. Raises DataError.
    """
    data = data or recipe.data
    started = time.monotonic()
    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(recipe.model)
    chat = tokenizer.chat_template is not None
    found = read(data, chat, recipe.run.seed)
    kept = [
        task
        for task, length in zip(found, prompt_lengths(found, tokenizer), strict=True)
        if length <= data.max_prompt_tokens
    ]
    if not kept:
        raise DataError(
            f"data.max_prompt_tokens: every one of the {len(found)} prompts of {data.path!r} is longer than "
            f"{data.max_prompt_tokens} tokens"
        )
    if len(kept) < len(found):
        log.warning("dropped %d prompts of more than %d tokens", len(found) - len(kept), data.max_prompt_tokens)
    style = "as chat messages" if chat else "as plain text (the tokenizer has no chat template)"
    log.info("%d tasks from %s, %s, in %.1f s", len(kept), data.path, style, time.monotonic() - started)
    return TaskSource(kept, recipe.run.name, recipe.run.seed, data.shuffle)
