"""Rewards that are not rlif's: named when the server starts, or installed as entry points `rlif.rewards`.

`module:name` is a Python function (`reward_server.user_function`) and becomes the reward of that name (an entry point
gives its own), or a `Reward` object, which has all that a built-in one has.

Code is only ever imported at start-up, from what the person who starts the server names and has installed. A spec can
name a reward that is there, and nothing else.
"""

import re
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any

from reward_server import catalogue, user_function
from reward_server.presets import PRESETS
from reward_server.reward import Reward
from reward_server.rewards import REWARDS
from reward_server.user_function import Function, NoReward
from services.startup import StartupError

GROUP = "rlif.rewards"
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")

installed: dict[str, str] = {}
"""The path of each plug-in, by the reward's name."""


def install(paths: Sequence[str]) -> None:
    """Make the named plug-ins, and those of installed packages, rewards of this process. Doing it twice is once.

    Raises StartupError naming the plug-in: it cannot be imported, is no reward, or its name is taken.
    """
    named = [(path.partition(":")[2], path) for path in paths]
    for name, path in [*named, *((point.name, point.value) for point in entry_points(group=GROUP))]:
        try:
            found = user_function.resolve(path)
        except NoReward as error:
            raise StartupError(f"reward plug-in {error}") from error
        if isinstance(found, Reward):
            name = found.name
        if installed.get(name) == path:
            continue
        _check_name(name, path)
        reward = found if isinstance(found, Reward) else user_function.reward(name, found)
        try:
            catalogue.entry(reward)
        except Exception as error:  # pydantic's, of many kinds
            why = f"its parameters cannot be described: {type(error).__name__}: {str(error)[:300]}"
            raise StartupError(f"reward plug-in {path}: {' '.join(why.split())}") from error
        REWARDS[name] = reward
        installed[name] = path


def _check_name(name: str, path: str) -> None:
    if not NAME.fullmatch(name):
        raise StartupError(f"reward plug-in {path}: {name!r} cannot be a name: letters, digits, _ . - (at most 64)")
    if name in REWARDS or name in PRESETS:
        owner = f"by the plug-in {installed[name]}" if name in installed else "by rlif itself"
        raise StartupError(f"reward plug-in {path}: the name {name!r} is taken {owner}")


def warm_ups() -> list[tuple[str, dict[str, Any]]]:
    """What a verifier process does before its first check, so that importing takes no check's time."""
    found = {path: user_function.resolve(path) for path in installed.values()}
    return [
        (user_function.IMPORT, {"path": path})
        for path, what in found.items()
        if isinstance(what, Function) and not what.is_async
    ]
