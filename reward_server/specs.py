"""Reward specs by name: built in (presets, and each reward by its own name), the server's default, and stored ones.

Stored specs live in memory, or, when the server belongs to a run, in the run's Redis hash `specs`, where restarts and
replicas find them. Every put raises the version of its name, also after a delete.
"""

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

import orjson
from pydantic import ValidationError

from reward_server.presets import PRESETS
from reward_server.reward import Params
from reward_server.rewards import REWARDS
from services.contract import Task
from services.http import Problem
from services.spec import RewardSpec, RewardTerm

DEFAULT = "default"
"""The name of the spec that a request without one is scored by. It can be put, so that a run can be steered."""

BUILT_IN: dict[str, RewardSpec] = {
    **{name: RewardSpec(rewards=[RewardTerm(name=name)]) for name in REWARDS},
    **PRESETS,
}


@dataclass(frozen=True)
class NamedSpec:
    """`version` counts the puts of the name; 0 for what came with the server."""

    name: str
    spec: RewardSpec
    version: int = 0
    updated_at: float | None = None

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "version": self.version,
            "spec_id": self.spec.spec_id,
            "built_in": self.version == 0,
            "updated_at": self.updated_at,
            "spec": self.spec.model_dump(mode="json"),
        }


class Store(Protocol):
    """Entries are JSON objects {"version": int, "spec": {...} | null (deleted), "updated_at": float}."""

    async def read(self, name: str) -> bytes | None: ...
    async def read_all(self) -> dict[str, bytes]: ...
    async def change(self, name: str, edit: Callable[[bytes | None], bytes]) -> None: ...


class MemoryStore:
    def __init__(self) -> None:
        self.entries: dict[str, bytes] = {}

    async def read(self, name: str) -> bytes | None:
        return self.entries.get(name)

    async def read_all(self) -> dict[str, bytes]:
        return dict(self.entries)

    async def change(self, name: str, edit: Callable[[bytes | None], bytes]) -> None:
        self.entries[name] = edit(self.entries.get(name))


def _params(term: RewardTerm, field: str) -> Params:
    try:
        return REWARDS[term.name].params.model_validate(term.params)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join([f"{field}.params", *(str(part) for part in fault["loc"])])
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            message = f"unknown parameter; {term.name} takes: {', '.join(REWARDS[term.name].params.model_fields) or 'none'}"
        raise Problem(422, "The reward spec is not valid", message, where) from error


def check_spec(spec: RewardSpec, has_scorer: bool) -> dict[str, Params]:
    """The parameters of each term by key. Raises Problem (422) naming what this server cannot compute."""
    found = {}
    for place, term in enumerate(spec.rewards):
        field = f"rewards[{place}]"
        if term.name not in REWARDS:
            known = ", ".join(REWARDS)
            raise Problem(422, "Unknown reward", f"there is no reward {term.name!r}; known: {known}", f"{field}.name")
        reason = REWARDS[term.name].missing(has_scorer)
        if reason is not None:
            raise Problem(422, "Unavailable reward", f"{term.name} cannot be computed here: {reason}", f"{field}.name")
        found[term.key] = _params(term, field)
    return found


def is_routed(term: RewardTerm, task: Task) -> bool:
    return term.sources is None or task.source in term.sources


class Specs:
    """Names to specs. `default` is what the server was started with, if anything."""

    def __init__(self, store: Store, default: RewardSpec | str | None, has_scorer: bool):
        """Raises Problem when the default spec cannot be computed here."""
        self.store, self.has_scorer = store, has_scorer
        if isinstance(default, str):
            if default not in BUILT_IN:
                known = ", ".join(BUILT_IN)
                raise Problem(422, "Unknown spec", f"there is no spec {default!r}; built in: {known}", "spec")
            default = BUILT_IN[default]
        if default is not None:
            check_spec(default, has_scorer)
        self.default = default

    @property
    def built_in(self) -> dict[str, RewardSpec]:
        return BUILT_IN if self.default is None else {**BUILT_IN, DEFAULT: self.default}

    async def get(self, name: str | None) -> NamedSpec:
        """Raises Problem: 404 for a name nobody knows, 422 when none was given and the server has no default."""
        wanted = name or DEFAULT
        stored = self._stored(wanted, await self.store.read(wanted))
        if stored is not None:
            return stored
        if wanted in self.built_in:
            return NamedSpec(wanted, self.built_in[wanted])
        if name is None:
            raise Problem(422, "A spec is needed", f"this server has no default; name one of: {await self._known()}", "spec")
        raise Problem(404, "Unknown spec", f"there is no spec {name!r}; known: {await self._known()}", "spec")

    async def all(self) -> list[NamedSpec]:
        found = {name: NamedSpec(name, spec) for name, spec in self.built_in.items()}
        for name, entry in (await self.store.read_all()).items():
            stored = self._stored(name, entry)
            if stored is not None:
                found[name] = stored
        return list(found.values())

    async def put(self, name: str, spec: RewardSpec) -> NamedSpec:
        """Raises Problem: 409 for a built-in name, 422 for a spec this server cannot compute."""
        self._changeable(name)
        check_spec(spec, self.has_scorer)

        def edit(entry: bytes | None) -> bytes:
            return self._entry(entry, spec)

        await self.store.change(name, edit)
        return await self.get(name)

    async def delete(self, name: str) -> None:
        """Raises Problem: 409 for a built-in name, 404 when there is nothing to delete."""
        self._changeable(name)
        if self._stored(name, await self.store.read(name)) is None:
            raise Problem(404, "Unknown spec", f"no spec {name!r} was put", "name")
        await self.store.change(name, lambda entry: self._entry(entry, None))

    async def _known(self) -> str:
        return ", ".join(item.name for item in await self.all())

    @staticmethod
    def _changeable(name: str) -> None:
        if name in BUILT_IN:
            raise Problem(409, "The spec is built in", f"{name!r} comes with the server; put another name", "name")

    @staticmethod
    def _entry(before: bytes | None, spec: RewardSpec | None) -> bytes:
        version = orjson.loads(before)["version"] + 1 if before else 1
        body = None if spec is None else spec.model_dump(mode="json")
        return orjson.dumps({"version": version, "spec": body, "updated_at": time.time()})

    @staticmethod
    def _stored(name: str, entry: bytes | None) -> NamedSpec | None:
        fields = orjson.loads(entry) if entry else {"spec": None}
        if fields["spec"] is None:
            return None
        return NamedSpec(name, RewardSpec.model_validate(fields["spec"]), fields["version"], fields["updated_at"])
