"""Asks a model: a rollout server of rlif, or any server that speaks OpenAI's completions and chat completions."""

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import httpx

from services.api import RolloutRequest
from services.clients import (
    CONNECT_SECONDS,
    TRANSIENT,
    CallError,
    Refused,
    RolloutClient,
    ServerFault,
    Unavailable,
    pause_before,
    retry_after,
)
from services.contract import Version
from services.evaluation.ledger import Answer, Ledger
from services.evaluation.protocol import Asked
from services.startup import StartupError

log = logging.getLogger(__name__)

CHECK_SECONDS = 30.0


class Server(Protocol):
    """`identity` says which weights answer; the same identity and request give the same answer. `size`: answers asked
    for in one call."""

    identity: str
    size: int

    async def answers(self, asked: Sequence[Asked]) -> list[Answer]:
        """In order. Raises CallError."""

    async def close(self) -> None: ...


def _answer(one: Asked, **said: Any) -> Answer:
    return Answer(key=one.key, task=one.benchmark.name, item=one.item.id, seed=one.seed, sample=one.sample, **said)


class WeightsChanged(Exception):
    """The server follows a run and took newer weights: what it answers now belongs to another evaluation."""


class Rollouts:
    """A rollout server; with `version`, only answers by exactly these weights are taken.

    A call's answers are noted when the last of them ends, so calls are small: a kill loses little.
    """

    size = 16

    def __init__(self, client: RolloutClient, identity: str, version: Version | None, deadline_seconds: float):
        self.client, self.identity, self.version, self.seconds = client, identity, version, deadline_seconds

    async def close(self) -> None:
        await self.client.close()

    async def answers(self, asked: Sequence[Asked]) -> list[Answer]:
        requests = [
            RolloutRequest(group_id=one.key, messages=one.messages, prompt=one.prompt, sampling=one.sampling)
            for one in asked
        ]
        response = await self.client.rollouts(requests, self.seconds)
        found = []
        for one, group in zip(asked, response.groups, strict=True):
            (completion,) = group.completions
            made = [completion.weight_version, *(span.weight_version for span in completion.version_spans)]
            if self.version is not None and any(version != self.version for version in made):
                raise WeightsChanged(f"{self.client.url} served weights {self.version} and now serves {max(made)}")
            found.append(
                _answer(
                    one,
                    text=completion.text,
                    token_ids=completion.token_ids,
                    prompt_token_ids=group.prompt_token_ids,
                    finish_reason=completion.finish_reason,
                    weight_version=completion.weight_version,
                )
            )
        return found


class OpenAI:
    """Any OpenAI-compatible server: texts only."""

    size = 1

    def __init__(self, url: str, model: str, headers: dict[str, str], deadline_seconds: float):
        self.url, self.model, self.seconds = url, model, deadline_seconds
        self.identity = f"{model} at {url}"
        self.http = httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
        )

    async def close(self) -> None:
        await self.http.aclose()

    async def answers(self, asked: Sequence[Asked]) -> list[Answer]:
        return [await self._one(one) for one in asked]

    async def _one(self, one: Asked) -> Answer:
        sampling = one.sampling.model_dump(include={"temperature", "top_p", "max_tokens", "seed"})
        body: dict[str, Any] = {"model": self.model, **sampling, "n": 1}
        body |= {"stop": one.sampling.stop} if one.sampling.stop else {}
        if one.messages is None:
            choice = await self._post("/v1/completions", body | {"prompt": one.prompt})
            text = choice["text"]
        else:
            messages = [message.model_dump() for message in one.messages]
            choice = await self._post("/v1/chat/completions", body | {"messages": messages})
            text = choice["message"]["content"]
        finish = "length" if choice.get("finish_reason") == "length" else "stop"
        return _answer(one, text=text or "", finish_reason=finish)

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The first choice. Raises CallError."""
        url, ends = self.url + path, time.monotonic() + self.seconds
        for attempt in itertools.count(1):
            wait = None
            try:
                async with asyncio.timeout(max(0.0, ends - time.monotonic())):
                    response = await self.http.post(url, json=body)
                status, said = response.status_code, response.text[:300]
                if response.is_success:
                    return response.json()["choices"][0]
                wait = retry_after(response)
                if status not in TRANSIENT:
                    is_ours = 400 <= status < 500
                    raise Refused(url, status, said, "", []) if is_ours else ServerFault(url, f"{status} {said}", "5xx")
            except (ValueError, LookupError, TypeError) as error:
                raise ServerFault(url, f"no completion: {said}", "answer") from error
            except TimeoutError as error:
                raise Unavailable(url, f"no answer within {self.seconds:g} s", "deadline") from error
            except httpx.TransportError as error:
                said = str(error) or type(error).__name__
            pause = pause_before(attempt, wait)
            if time.monotonic() + pause > ends:
                raise Unavailable(url, said, "busy")
            log.warning("%s: %s; trying again in %.1f s", url, said, pause)
            await asyncio.sleep(pause)
        raise AssertionError("unreachable")


async def connect(url: str, name: str | None, token: str | None, deadline_seconds: float) -> Server:
    """What answers at `url`; `name` picks one of several models of an OpenAI-compatible server. Raises StartupError."""
    url = url.rstrip("/").removesuffix("/v1")
    try:
        client = RolloutClient(url, token, retry_seconds=10.0)
    except ValueError as error:
        raise StartupError(f"--url {error}") from error
    url = client.url
    try:
        served = await client.model(CHECK_SECONDS)
        version = Version.model_validate(served["weight_version"])
        identity = f"{served['model']} {version}, {served['engine']}, {served['dtype']}"
        return Rollouts(client, identity, version, deadline_seconds)
    except (Refused, KeyError, ValueError) as error:
        if isinstance(error, Refused) and error.status != 404:
            raise StartupError(f"--url {url}: {error}") from error
    except CallError as error:
        raise StartupError(f"--url {url}: {error}") from error
    await client.close()
    headers = client.authorization()
    return OpenAI(url, await _served_name(url, name, headers), headers, deadline_seconds)


async def _served_name(url: str, name: str | None, headers: dict[str, str]) -> str:
    try:
        async with httpx.AsyncClient(timeout=CHECK_SECONDS, headers=headers) as http:
            response = await http.get(f"{url}/v1/models")
        response.raise_for_status()
        names = [one["id"] for one in response.json()["data"]]
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise StartupError(f"--url {url}: neither a rollout server nor OpenAI-compatible: {error}") from error
    if name is None and len(names) == 1:
        return str(names[0])
    if name is None or name not in names:
        given = "choose one with --model-name" if name is None else f"--model-name {name} is not served"
        raise StartupError(f"--url {url}: {given}: {', '.join(names)}")
    return name


async def ask(
    server: Server, wanted: Sequence[Asked], ledger: Ledger, in_flight: int, progress: Callable[[int], None]
) -> dict[str, str]:
    """Have every answer that the ledger lacks. Returns why, by key, for those that the server refuses (a prompt too
    long for the model, say). Raises CallError when the server cannot be used, and WeightsChanged."""
    missing = [one for one in wanted if one.key not in ledger.answers]
    progress(len(wanted) - len(missing))
    size = min(server.size, in_flight)
    slots = asyncio.Semaphore(in_flight // size)
    refused: dict[str, str] = {}

    async def some(batch: Sequence[Asked]) -> None:
        async with slots:
            try:
                ledger.add(await server.answers(batch))
                progress(len(batch))
                return
            except Refused as error:
                if error.status in (401, 403):
                    raise
                if len(batch) == 1:
                    refused[batch[0].key] = str(error)
                    progress(1)
                    return
        await asyncio.gather(*(some([one]) for one in batch))

    batches = [missing[start : start + size] for start in range(0, len(missing), size)]
    try:
        async with asyncio.TaskGroup() as group:
            for batch in batches:
                group.create_task(some(batch))
    except* (CallError, WeightsChanged) as several:
        raise several.exceptions[0] from several
    return refused
