"""Reward specs by name while the server runs: what came with it, its default, and what was put.

Put specs live in memory, or, when the server belongs to a run, in the run's Redis hash `specs`, where restarts and
replicas find them. Every put and every delete raises the version of its name; the last versions stay readable, since
groups scored by them may still be on their way.
"""

import asyncio
import logging
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import orjson
from redis.exceptions import RedisError

from reward_server.specs import SpecError, built_in, check_spec
from services.api import SpecEntry
from services.keys import Keys
from services.problem import Problem
from services.redis import DeadlineExceeded, connect, insist
from services.spec import RewardSpec

log = logging.getLogger(__name__)

DEFAULT = "default"
"""The name of the spec that a request without one is scored by. It can be put, so that a run can be steered."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
KEPT_VERSIONS = 100
"""Versions of one name that stay readable."""
REDIS_SECONDS = 10.0

Edit = Callable[[bytes | None], dict[str, bytes | None]]
"""From an entry as it is to entries to write; none removes one."""


class Store(Protocol):
    """Entries are JSON objects {"version": int, "spec": {...} | null (deleted), "updated_at": unix seconds}.

    The newest entry of a name stands under the name, version N of it under `name@N` as well.
    """

    def state(self) -> str: ...
    async def watch(self) -> None: ...
    async def read(self, name: str) -> bytes | None: ...
    async def read_all(self) -> dict[str, bytes]: ...
    async def change(self, name: str, edit: Edit) -> None: ...
    async def close(self) -> None: ...


class MemoryStore:
    def __init__(self) -> None:
        self.entries: dict[str, bytes] = {}

    def state(self) -> str:
        return "ok"

    async def watch(self) -> None:
        pass

    async def read(self, name: str) -> bytes | None:
        return self.entries.get(name)

    async def read_all(self) -> dict[str, bytes]:
        return dict(self.entries)

    async def change(self, name: str, edit: Edit) -> None:
        for field, entry in edit(self.entries.get(name)).items():
            if entry is None:
                self.entries.pop(field, None)
            else:
                self.entries[field] = entry

    async def close(self) -> None:
        pass


class RedisStore:
    """The hash `specs` of a run. Every operation waits for Redis for a while, then answers 503 (Problem)."""

    def __init__(self, url: str, run_id: str):
        """Raises ValueError for a URL that is none."""
        self.client, self.key = connect(url), Keys(run_id).specs
        self._trouble: str | None = None

    def state(self) -> str:
        return self._trouble or "ok"

    async def read(self, name: str) -> bytes | None:
        return await self._insist(lambda: self.client.hget(self.key, name))

    async def read_all(self) -> dict[str, bytes]:
        found = await self._insist(lambda: self.client.hgetall(self.key))
        return {name.decode(errors="replace"): entry for name, entry in found.items()}

    async def change(self, name: str, edit: Edit) -> None:
        async def once() -> None:
            async def swap(pipe: Any) -> None:
                changes = edit(await pipe.hget(self.key, name))
                pipe.multi()
                for field, entry in changes.items():
                    if entry is None:
                        pipe.hdel(self.key, field)
                    else:
                        pipe.hset(self.key, field, entry)

            await self.client.transaction(swap, self.key)

        await self._insist(once)

    async def watch(self) -> None:
        """Keep `state` true to the facts, for ever."""
        while True:
            try:
                await self.client.ping()
                self._trouble = None
            except Exception as error:
                self._trouble = f"redis does not answer: {error}"
            await asyncio.sleep(1.0)

    async def _insist(self, call: Callable[[], Any]) -> Any:
        try:
            return await insist(call, "reward specs", REDIS_SECONDS)
        except DeadlineExceeded as error:
            raise Problem(503, "The reward specs cannot be read", str(error), retry_after=2) from error
        except RedisError as error:
            raise Problem(503, "The reward specs cannot be read", f"redis refuses: {error}") from error

    async def close(self) -> None:
        await self.client.aclose()


@dataclass(frozen=True)
class NamedSpec:
    """`version` counts the puts of the name; 0 for what came with the server."""

    name: str
    spec: RewardSpec
    version: int = 0
    updated_at: float | None = None

    def describe(self) -> SpecEntry:
        return SpecEntry(
            name=self.name,
            version=self.version,
            spec_id=self.spec.spec_id,
            built_in=self.version == 0,
            updated_at=self.updated_at,
            spec=self.spec,
        )


class Specs:
    """Names to specs. `default` is what the server was started with, if anything."""

    def __init__(self, store: Store, default: RewardSpec | None, have: frozenset[str]):
        """`have`: the parts of the server, see `check_spec`. Raises SpecError when the default cannot be computed."""
        self.store, self.have = store, have
        self.reserved = built_in()
        self.built_in = self.reserved if default is None else {**self.reserved, DEFAULT: default}
        if default is not None:
            check_spec(default, have)

    async def get(self, name: str | None, status: int = 404) -> NamedSpec:
        """Raises Problem (`status`) for a name nobody knows, or when none was given and there is no default."""
        wanted = name or DEFAULT
        stored = _stored(wanted, await self.store.read(wanted))
        if stored is not None:
            return stored
        if wanted in self.built_in:
            return NamedSpec(wanted, self.built_in[wanted])
        known = ", ".join(item.name for item in await self.all())
        if name is None:
            raise Problem(status, "A spec is needed", f"this server has no default spec; known: {known}", "spec")
        raise Problem(status, "Unknown spec", f"there is no spec {name!r}; known: {known}", "spec")

    async def all(self) -> list[NamedSpec]:
        found = {name: NamedSpec(name, spec) for name, spec in self.built_in.items()}
        for name, entry in (await self.store.read_all()).items():
            if "@" in name:
                continue
            with suppress(Problem):  # the others can be used all the same
                if (stored := _stored(name, entry)) is not None:
                    found[name] = stored
        return list(found.values())

    async def version(self, name: str, version: int) -> NamedSpec:
        """Raises Problem (404): no such version, or not kept any more."""
        if version == 0 and name in self.built_in:
            return NamedSpec(name, self.built_in[name])
        stored = _stored(name, await self.store.read(f"{name}@{version}"))
        if stored is None:
            detail = f"spec {name!r} has no version {version} (the last {KEPT_VERSIONS} are kept)"
            raise Problem(404, "Unknown version", detail, "version")
        return stored

    async def history(self, name: str) -> list[NamedSpec]:
        """The versions of a name that are kept, oldest first. Raises Problem (404): there are none."""
        kept = [NamedSpec(name, self.built_in[name])] if name in self.built_in else []
        for field, entry in (await self.store.read_all()).items():
            if field.startswith(f"{name}@"):
                with suppress(Problem):
                    kept += [stored] if (stored := _stored(name, entry)) is not None else []
        if not kept:
            raise Problem(404, "Unknown spec", f"no spec {name!r} was put", "name")
        return sorted(kept, key=lambda item: item.version)

    async def by_id(self, spec_id: str) -> list[NamedSpec]:
        """Every name and kept version under which the content of `spec_id` is or was known: what a group names."""
        known = [NamedSpec(name, spec) for name, spec in self.built_in.items()]
        for field, entry in (await self.store.read_all()).items():
            name, is_version, _ = field.partition("@")
            if is_version:
                with suppress(Problem):
                    known += [stored] if (stored := _stored(name, entry)) is not None else []
        return [item for item in known if item.spec.spec_id == spec_id]

    async def put(self, name: str, spec: RewardSpec) -> NamedSpec:
        """Raises Problem: 409 for a built-in name, 422 for a bad name or a spec this server cannot compute."""
        self._check_name(name)
        try:
            check_spec(spec, self.have)
        except SpecError as error:
            raise Problem(422, "The reward spec is not valid", error.reason, error.field) from error
        await self.store.change(name, lambda entry: _next_entry(name, entry, spec))
        put = await self.get(name)
        log.info("spec %s is now version %d, %s", name, put.version, put.spec.spec_id)
        return put

    async def delete(self, name: str) -> None:
        """Raises Problem: 409 for a built-in name, 404 when there is nothing to delete."""
        self._check_name(name)
        entry = await self.store.read(name)
        try:
            is_there = _stored(name, entry) is not None
        except Problem:
            is_there = True
        if not is_there:
            raise Problem(404, "Unknown spec", f"no spec {name!r} was put", "name")
        await self.store.change(name, lambda entry: _next_entry(name, entry, None))
        log.info("spec %s was deleted", name)

    def _check_name(self, name: str) -> None:
        if name in self.reserved:
            raise Problem(409, "The spec is built in", f"{name!r} comes with the server; put another name", "name")
        if not NAME.fullmatch(name):
            detail = f"letters, digits, `.`, `_` and `-`, at most 64 (got {name!r:.100})"
            raise Problem(422, "Bad name", detail, "name")


def _next_entry(name: str, before: bytes | None, spec: RewardSpec | None) -> dict[str, bytes | None]:
    try:
        version = orjson.loads(before)["version"] + 1 if before else 1
    except (ValueError, TypeError, KeyError):  # somebody else's words: a put replaces them
        version = 1
    body = None if spec is None else spec.model_dump(mode="json")
    entry = orjson.dumps({"version": version, "spec": body, "updated_at": time.time()})
    return {name: entry, f"{name}@{version}": entry, f"{name}@{version - KEPT_VERSIONS}": None}


def _stored(name: str, entry: bytes | None) -> NamedSpec | None:
    """Raises Problem (503): the entry is not one that a server wrote."""
    try:
        fields = orjson.loads(entry) if entry else None
        if fields is None or fields["spec"] is None:
            return None
        return NamedSpec(name, RewardSpec.model_validate(fields["spec"]), fields["version"], fields["updated_at"])
    except (ValueError, TypeError, KeyError) as error:
        log.error("the stored spec %r is not valid: %s", name, type(error).__name__)
        detail = f"what is stored as spec {name!r} is not a spec; put it anew"
        raise Problem(503, "The stored spec is not valid", detail, "spec") from error
