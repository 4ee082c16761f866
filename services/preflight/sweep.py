"""The prompts that a preflight tries: the recipe's own, none at all, and the known ones (services/prompts.yaml)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from services import prompts
from services.contract import Message, Task
from services.orchestrator.data import load
from services.preflight.terms import PROGRAMS
from services.prompt_tokens import prompt_lengths
from services.prompts import Prompt
from services.recipe import Recipe
from services.startup import StartupError

NONE, OWN = "none", "data.system_prompt"
"""Names of the bare problem, and of a text that the recipe brings itself."""
MARK = "preflight"


@dataclass(frozen=True)
class Variant:
    """A known prompt, or a system message alone, or nothing around the problem."""

    name: str
    prompt: Prompt | None = None
    system: str | None = None

    def arrange(self, task: Task, seed: int) -> Task:
        """A bare task with the prompt around it, as `services.orchestrator.data` would have read it."""
        messages = task.messages or [Message(role="user", content=task.prompt or "")]
        if self.prompt is not None and len(messages) == 1:
            messages = self.prompt.messages(messages[0].content, seed)
        elif self.system is not None:
            messages = [Message(role="system", content=self.system), *messages]
        if task.messages is not None:
            return task.model_copy(update={"messages": messages})
        return task.model_copy(update={"prompt": "\n\n".join(message.content for message in messages)})


def _own(recipe: Recipe) -> Variant:
    if recipe.data.prompt is not None:
        known = prompts.named(recipe.data.prompt)
        return Variant(known.name, known, known.system)
    system = recipe.data.system_prompt
    if system is None:
        return Variant(NONE)
    same = next((known for known in prompts.every() if known.system == system and not known.templates), None)
    return Variant(OWN, None, system) if same is None else Variant(same.name, same, system)


def has_system_role(tokenizer: Any) -> bool:
    """Whether the chat template shows a system message to the model; some refuse one, and some drop it."""
    turns = [{"role": "system", "content": MARK}, {"role": "user", "content": "1"}]
    try:
        return MARK in tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception:  # a template is a program of the model's author, with errors of its own
        return False


def variants(recipe: Recipe, tokenizer: Any, tasks: Sequence[Task], judge: str | None) -> tuple[list[Variant], str]:
    """The prompts to try, the recipe's own first, and why there are no others ("" where there are).

    Raises StartupError: the recipe has a system message and the chat template shows none to the model.
    """
    own = _own(recipe)
    if tokenizer.chat_template is None:
        return [own], "the tokenizer has no chat template: problems are plain text"
    if not has_system_role(tokenizer):
        if own.system is not None:
            key = "prompt" if recipe.data.prompt else "system_prompt"
            raise StartupError(f"data.{key}: the chat template of {recipe.model.path!r} has no system role")
        return [own], "the chat template has no system role"
    if any(task.messages and task.messages[0].role == "system" for task in tasks):
        return [own], "the tasks bring system messages of their own"
    domain = "code" if judge in PROGRAMS else "math"
    are_texts = all(task.messages is not None and len(task.messages) == 1 for task in tasks)
    known = [
        Variant(prompt.name, prompt, prompt.system)
        for prompt in prompts.every()
        if prompt.domain == domain and (are_texts or not prompt.templates)
    ]
    others = [Variant(NONE), *known]
    return [own, *(variant for variant in others if variant.name != own.name)], ""


def choose(recipe: Recipe, tokenizer: Any, limit: int) -> list[Task]:
    """The first tasks of the run, without any prompt around them. Raises DataError."""
    bare = recipe.data.model_copy(update={"prompt": None, "system_prompt": None})
    source = load(recipe, tokenizer, bare)
    return [source.task(index) for index in range(min(limit, len(source.tasks)))]


def arranged(recipe: Recipe, tokenizer: Any, tasks: Sequence[Task], tried: Sequence[Variant]) -> dict[str, list[Task]]:
    """The tasks with each prompt around them, by the prompt's name: those whose every prompt is short enough.

    Raises StartupError: there is none.
    """
    found = {variant.name: [variant.arrange(task, recipe.run.seed) for task in tasks] for variant in tried}
    most = recipe.data.max_prompt_tokens
    lengths = [list(prompt_lengths(those, tokenizer)) for those in found.values()]
    kept = [place for place in range(len(tasks)) if max(of[place] for of in lengths) <= most]
    if not kept:
        raise StartupError(f"data.max_prompt_tokens: with a prompt around it, no problem fits into {most} tokens")
    return {name: [those[place] for place in kept] for name, those in found.items()}
