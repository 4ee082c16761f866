"""The checks by instruction id, and their arguments."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, create_model

MODULES = ("keywords", "lengths", "contents", "case", "whole")
Relation = Literal["less than", "at least"]


def holds(count: int, relation: Relation, bound: int) -> bool:
    return count < bound if relation == "less than" else count >= bound


@dataclass(frozen=True)
class Instruction:
    """`follows(text, **arguments)`: a pure function. `arguments` validates what a data set gives in `kwargs`."""

    id: str
    follows: Callable[..., bool]
    arguments: type[BaseModel]


_CHECKS: dict[str, Instruction] = {}


def instruction(identity: str) -> Callable[[Callable[..., bool]], Callable[..., bool]]:
    """Register a check; its keyword-only parameters are the instruction's arguments."""

    def register(follows: Callable[..., bool]) -> Callable[..., bool]:
        parameters = list(inspect.signature(follows, eval_str=True).parameters.values())[1:]
        fields: Any = {parameter.name: (parameter.annotation, ...) for parameter in parameters}
        config = ConfigDict(extra="forbid", str_strip_whitespace=True)
        _CHECKS[identity] = Instruction(identity, follows, create_model(identity, __config__=config, **fields))
        return follows

    return register


def instructions() -> dict[str, Instruction]:
    for module in MODULES:
        import_module(f"reward_server.ifeval.{module}")
    return _CHECKS
