"""Prompts by name and version (`intuitor-3b@1`): what stands around a problem when a model is asked it.

The texts lie in `prompts.yaml`, each with its source. A published version never changes: runs name what they used.
"""

import hashlib
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from services.contract import Message
from services.section import Section

FILE = Path(__file__).with_suffix(".yaml")
PLACE = "{problem}"


class Prompt(Section):
    """`templates` stand in for the bare problem in the user's turn; which one is chosen by the seed and the problem."""

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")
    version: int = Field(ge=1)
    domain: Literal["math", "code"]
    source: str = Field(min_length=1)
    system: str | None = Field(None, min_length=1)
    templates: list[str] = Field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.id}@{self.version}"

    def user(self, problem: str, seed: int = 0) -> str:
        """The user's turn: a function of prompt, problem and seed alone, whatever else is asked, in whatever order."""
        if not self.templates:
            return problem
        digest = hashlib.sha256(f"{self.name}\x1f{seed}\x1f{problem}".encode()).digest()
        return self.templates[int.from_bytes(digest[:8], "little") % len(self.templates)].replace(PLACE, problem)

    def messages(self, problem: str, seed: int = 0) -> list[Message]:
        system = [] if self.system is None else [Message(role="system", content=self.system)]
        return [*system, Message(role="user", content=self.user(problem, seed))]


@cache
def _by_name() -> dict[str, Prompt]:
    rows: list[dict[str, Any]] = yaml.safe_load(FILE.read_text())
    return {prompt.name: prompt for prompt in map(Prompt.model_validate, rows)}


def every() -> list[Prompt]:
    """All that there are, in the file's order."""
    return list(_by_name().values())


def named(name: str) -> Prompt:
    """Raises ValueError: there is no such prompt; lists those there are."""
    found = _by_name().get(name)
    if found is None:
        raise ValueError(f"there is no prompt {name!r}; there are {', '.join(_by_name())}")
    return found
