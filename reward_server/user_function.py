"""A user's own Python function as a reward. What it takes says how it is called, each parameter by its name:

- `completion` (and `prompt`, `reference`, `params`): once a completion -> float | None;
- `completions` (and the same): once a group -> list[float | None];
- `prompts` or `completions` with `**columns`, as TRL's reward functions: once a group -> list[float | None].

A plain function runs in processes that can be killed: one that hangs, dies or raises is that completion's (or group's)
failure. An async one runs in the server's own loop, for at most `ASYNC_SECONDS`. None says nothing: `skipped`. See
docs/custom-rewards.md.
"""

import asyncio
import inspect
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict

from reward_server.reward import Context, Params, Reward
from services.api import RewardGroup
from services.contract import Outcome, Score

CALL, IMPORT = "reward_server.user_function:call", "reward_server.user_function:imported"
PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
ASYNC_SECONDS = 60.0
Unit = Literal["completion", "group", "trl"]
OWN = frozenset({"prompt", "reference", "params"})


class NoReward(ValueError):
    """What a path names cannot be a reward; the message names the path."""


@dataclass(frozen=True)
class Function:
    """A user's function, and how to call it. `wants` are the names of its parameters; `open`: it takes any others."""

    path: str
    call: Callable[..., Any]
    unit: Unit
    wants: frozenset[str]
    open: bool
    params: type[BaseModel]

    @property
    def is_async(self) -> bool:
        return any(map(inspect.iscoroutinefunction, (self.call, getattr(self.call, "__call__", None))))  # noqa: B004


# ---- what a path names ------------------------------------------------------------------------------------------


@cache
def resolve(path: str) -> Function | Reward:
    """What `module:name` is. Imports the module. Raises NoReward."""
    if not PATH.fullmatch(path):
        raise NoReward(f"{path!r}: write it as module:function")
    module, _, name = path.partition(":")
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())  # a module beside the recipe, as `python -m` would find it
    try:
        found = getattr(import_module(module), name)
    except AttributeError as error:
        raise NoReward(f"{path}: {error}") from error
    except (Exception, SystemExit) as error:
        raise NoReward(f"{path}: {module} cannot be imported: {_said(error)}") from error
    if isinstance(found, Reward):
        return found
    try:
        return _function(path, found)
    except (TypeError, ValueError, NameError, AttributeError) as error:
        raise NoReward(f"{path}: {error}") from error


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".rstrip(": ")


def _function(path: str, found: Any) -> Function:
    """Raises TypeError, ValueError, NameError or AttributeError: it is no function that can be a reward."""
    if not callable(found) or inspect.isclass(found):
        raise TypeError(f"is {type(found).__name__}, not a function")
    parameters = inspect.signature(found, eval_str=True).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    if kinds & {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL}:
        raise TypeError("its arguments are given by name: it can have neither *args nor positional-only ones")
    is_open = inspect.Parameter.VAR_KEYWORD in kinds
    names = {name for name, parameter in parameters.items() if parameter.kind is not inspect.Parameter.VAR_KEYWORD}
    unit: Unit
    if "prompts" in names or ("completions" in names and is_open):
        return Function(path, found, "trl", frozenset(names), is_open, Params)
    if "completion" in names:
        unit, known = "completion", OWN | {"completion"}
    elif "completions" in names:
        unit, known = "group", OWN | {"completions"}
    else:
        raise TypeError("takes neither `completion` nor `completions`")
    needed = {name for name in names if parameters[name].default is inspect.Parameter.empty}
    if needed - known or is_open:
        unknown = sorted(needed - known) or ["**"]
        raise TypeError(f"its parameter `{unknown[0]}` is not one of {', '.join(sorted(known))}")
    model: type[BaseModel] = Params
    if "params" in names:
        model = parameters["params"].annotation
        if not inspect.isclass(model) or not issubclass(model, BaseModel):
            raise TypeError("annotate `params` with a pydantic model of the parameters")
    strict = {"model_config": ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True), "__doc__": model.__doc__}
    strict["__module__"] = model.__module__
    return Function(path, found, unit, frozenset(names & known), False, type(model.__name__, (model,), strict))


def reward(name: str, function: Function) -> Reward:
    lines = (inspect.getdoc(function.call) or f"The plug-in {function.path}.").splitlines()

    async def score(group: RewardGroup, params: BaseModel, context: Context) -> list[Score]:
        async def ask(arguments: dict[str, Any], count: int) -> list[Score]:
            ask_one = _ask_here if function.is_async else _ask_process
            return await ask_one(function, arguments, params, count, context)

        if function.unit != "completion":
            return await ask(arguments_of(function, group), len(group.completions))
        each = (arguments_of(function, group, place) for place in range(len(group.completions)))
        return [found for (found,) in await asyncio.gather(*(ask(arguments, 1) for arguments in each))]

    score.__module__ = function.path.partition(":")[0]  # whose docstring describes the reward further
    return Reward(
        name=name,
        description=lines[0],
        needs=(),
        range=(None, None),
        params=function.params,  # type: ignore[arg-type]  # any pydantic model will do
        score=score,
    )


# ---- calling ---------------------------------------------------------------------------------------------------


def arguments_of(function: Function, group: RewardGroup, place: int = 0) -> dict[str, Any]:
    """By name, all but `params`: plain data. `place` is the completion's, where the function takes one."""
    task, size = group.task, len(group.completions)
    texts = [completion.text for completion in group.completions]
    prompt = task.prompt if task.messages is None else [message.model_dump() for message in task.messages]
    reference = task.reference.model_dump() if task.reference else None
    if function.unit == "trl":
        columns = {key: [value] * size for key, value in {**task.metadata, **(reference or {})}.items()}
        spoken = [[{"role": "assistant", "content": text}] for text in texts]
        ids = [completion.token_ids for completion in group.completions]
        given = {
            **columns,
            "prompts": [prompt] * size,
            "completions": texts if task.messages is None else spoken,
            "completion_ids": ids,
        }
        return {key: value for key, value in given.items() if function.open or key in function.wants}
    known = {"prompt": prompt, "reference": reference, "completion": texts[place], "completions": texts}
    return {key: value for key, value in known.items() if key in function.wants}


def values_of(result: Any, unit: Unit) -> list[float | None]:
    """What a function returned, as plain numbers. Raises TypeError."""
    if unit == "completion":
        result = [result]
    if isinstance(result, str | bytes | dict) or not hasattr(result, "__iter__"):
        raise TypeError(f"returned {type(result).__name__}, not a list of numbers")
    return [_number(value) for value in result]


def _number(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, str | bytes):
        raise TypeError(f"{value!r:.50} is not a number")
    return float(value)


def _scores(values: list[float | None], count: int, seconds: float) -> list[Score]:
    if len(values) != count:
        why = f"the function returned {len(values)} rewards for {count} completions"
        return [Score.failed(Outcome.error, why, seconds)] * count
    nothing = Score.failed(Outcome.skipped, "the function says nothing of this completion", seconds)
    return [nothing if value is None else Score.of(value, seconds=seconds) for value in values]


async def _ask_process(
    function: Function, arguments: dict[str, Any], params: BaseModel, count: int, context: Context
) -> list[Score]:
    given = {"arguments": arguments, "params": params.model_dump(mode="json")}
    try:
        payload = {"path": function.path, "given": orjson.dumps(given)}
    except TypeError as error:  # nested deeper than anybody reads
        return [Score.failed(Outcome.error, f"the task cannot be passed on: {error}")] * count
    verdict = await context.workers.check(CALL, payload, context.deadline, context.turn)
    if verdict.status != "ok":
        return [Score.failed(Outcome(verdict.status), verdict.detail, verdict.seconds)] * count
    return _scores(verdict.result["values"], count, verdict.seconds)


async def _ask_here(
    function: Function, arguments: dict[str, Any], params: BaseModel, count: int, context: Context
) -> list[Score]:
    started = time.monotonic()
    seconds = min(ASYNC_SECONDS, context.deadline - started)
    try:
        async with asyncio.timeout(max(0.0, seconds)) as limit:
            values = values_of(await function.call(**arguments, **_with_params(function, params)), function.unit)
    except (Exception, SystemExit) as error:
        outcome = Outcome.timeout if limit.expired() else Outcome.error
        said = f"no reward within {seconds:.3g} s" if limit.expired() else _said(error)
        return [Score.failed(outcome, said, time.monotonic() - started)] * count
    return _scores(values, count, time.monotonic() - started)


def _with_params(function: Function, params: BaseModel) -> dict[str, BaseModel]:
    return {"params": params} if "params" in function.wants and function.unit != "trl" else {}


# ---- from here on: inside a worker process ---------------------------------------------------------------------


def imported(payload: dict[str, Any]) -> dict[str, Any]:
    resolve(payload["path"])
    return {}


def call(payload: dict[str, Any]) -> dict[str, Any]:
    """One call of a plain function: {"values": [float | None]}. Raises whatever it does."""
    function = resolve(payload["path"])
    assert isinstance(function, Function)
    given = orjson.loads(payload["given"])
    params = function.params.model_validate(given["params"])
    result = function.call(**given["arguments"], **_with_params(function, params))
    return {"values": values_of(result, function.unit)}
