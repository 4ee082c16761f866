"""What the tests of the orchestrator have in their hand: rollout servers and a trainer; the orchestrator as a task."""

import asyncio
import json
import threading
import time
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException, Request

from services import commands, recipe
from services.access import HttpSettings
from services.api import RolloutGroup, RolloutsRequest, RolloutsResponse
from services.contract import Completion, ScoredGroup, Version, WeightVersion
from services.http import create_app
from services.keys import Keys
from services.orchestrator.run import orchestrate
from services.problem import Problem
from services.queue import GroupQueue
from services.redis import EmbeddedRedis, cancel, connect, connect_sync
from services.weights import pointer

STEPS, PER_STEP = 5, 4
SECONDS = 40.0
"""How long a test waits for something that should take well under a second."""


class RolloutServer:
    """A rollout server that makes words instead of tokens, of the version the test sets, and fails on request."""

    def __init__(self, vocab_size: int = 288):
        self.vocab_size = vocab_size
        self.version = Version()
        self.batches: list[RolloutsRequest] = []
        self.made: list[str] = []
        self.refuse: set[str] = set()
        self.forbidden = False
        self.gate = threading.Event()
        self.gate.set()
        self.running = 0
        self.most_running = 0
        self.app = create_app("rollout", "0", HttpSettings(), ready=lambda: {})
        self._routes(self.app)

    def _routes(self, app: FastAPI) -> None:
        @app.get("/v1/model")
        async def model() -> dict:
            return {"model": "words", "vocab_size": self.vocab_size}

        @app.post("/v1/rollouts")
        async def rollouts(body: RolloutsRequest) -> RolloutsResponse:
            self.batches.append(body)
            if self.forbidden:
                raise Problem(403, "Forbidden")
            for place, request in enumerate(body.requests):
                if self.refuse & {request.messages[-1].content, "everything"}:
                    raise Problem(422, "Too long", "the prompt is too long", field=f"requests[{place}]")
            self.running += 1
            self.most_running = max(self.most_running, self.running)
            try:
                # Weights are swapped between completions: what was begun is finished by the version it began with.
                while not all(self.version >= (request.min_weight_version or Version()) for request in body.requests):
                    await asyncio.sleep(0.005)
                version = self.version
                while not self.gate.is_set():
                    await asyncio.sleep(0.005)
                await asyncio.sleep(0.01)
            finally:
                self.running -= 1
            self.made += [request.group_id for request in body.requests]
            return RolloutsResponse(
                groups=[
                    RolloutGroup(
                        group_id=request.group_id,
                        prompt_token_ids=[1, 2, 3],
                        completions=[
                            Completion(
                                text=f"{number}",
                                token_ids=[number, 7],
                                logprobs=[-0.5, -1.5],
                                finish_reason="stop",
                                weight_version=version,
                            )
                            for number in range(request.n)
                        ],
                    )
                    for request in body.requests
                ],
                model="words",
                weight_version=version,
            )


class Trainer:
    """Consumes steps as the trainer does, and publishes to Redis and to the rollout servers."""

    def __init__(self, url: str, run: str, *servers: RolloutServer):
        self.redis, self.run, self.servers = connect_sync(url), run, servers
        self.queue = GroupQueue(connect(url), run)
        self.steps: list[list[ScoredGroup]] = []
        self.lineage, self.version = 0, 0

    def publish(self, version: int) -> None:
        self.version = version
        weights = WeightVersion(
            run_id=self.run,
            lineage=self.lineage,
            version=version,
            transport="disk",
            location="/",
            manifest=[],
            created_at=0,
        )
        assert pointer.advance(self.redis, weights)
        for server in self.servers:
            server.version = weights.id

    async def start(self) -> None:
        self.lineage = await self.queue.claim_lineage(0)
        await self.queue.recover(set())
        self.publish(self.version)

    async def train(self, count: int = 1) -> None:
        for _ in range(count):
            entries = await self.queue.pull(PER_STEP, SECONDS)
            self.steps.append(sorted((entry.group for entry in entries), key=lambda group: group.index))
            await self.queue.ack([entry.entry_id for entry in entries], self.lineage)
            self.publish(self.version + 1)

    @property
    def indices(self) -> list[int]:
        return [group.index for step in self.steps for group in step]

    @property
    def staleness(self) -> list[int]:
        return [
            step - completion.weight_version.version
            for step, groups in enumerate(self.steps)
            for group in groups
            for completion in group.completions
        ]


class WebHook:
    """Somebody's: fails the first time."""

    def __init__(self):
        self.url, self.bodies, self.headers = "", [], []
        self.app = FastAPI()
        self.failed = False

        @self.app.post("/hook")
        async def hook(request: Request) -> dict:
            if not self.failed:
                self.failed = True
                raise HTTPException(503)
            self.bodies.append(await request.json())
            self.headers.append(request.headers.get("authorization"))
            return {}


@asynccontextmanager
async def running(chosen: recipe.Recipe, redis: EmbeddedRedis, rollout_urls, reward_urls, stay: bool = False):
    """The orchestrator as a task of this test; killed at the end if it still runs."""
    urls = [rollout_urls] if isinstance(rollout_urls, str) else rollout_urls
    task = asyncio.create_task(orchestrate(chosen, urls, [reward_urls], redis.url, stay))
    try:
        yield task
    finally:
        await cancel(task)


async def until(condition, what: str) -> None:
    ends = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < ends, f"waited in vain until {what}"
        await asyncio.sleep(0.01)


async def over(task: asyncio.Task) -> int:
    return await asyncio.wait_for(task, SECONDS)


def complete(trainer: Trainer) -> None:
    assert sorted(trainer.indices) == list(range(STEPS * PER_STEP))
    ids = [group.group_id for step in trainer.steps for group in step]
    assert len(set(ids)) == len(ids)


def status_of(trainer: Trainer) -> dict:
    return json.loads(trainer.redis.hget(Keys(trainer.run).status, "orchestrator") or b"{}") or {"state": ""}


def say(trainer: Trainer, state: str) -> None:
    status = {"state": state, "step": trainer.version, "lineage": trainer.lineage, "at": time.time()}
    trainer.redis.hset(Keys(trainer.run).status, "trainer", json.dumps(status))


async def answer(trainer: Trainer, kind: str) -> commands.AnyOrder:
    """The first order of a kind that was not obeyed, once it is there; obeyed by that."""
    ends = time.monotonic() + SECONDS
    while True:
        obeyed = await commands.all_obeyed(trainer.queue.redis, trainer.run)
        for order in await commands.after(trainer.queue.redis, trainer.run, 0):
            if order.kind == kind and order.id not in obeyed:
                return order
        assert time.monotonic() < ends, f"no order {kind}"
        await asyncio.sleep(0.02)


async def obey(trainer: Trainer, order: commands.AnyOrder, effect: str = "") -> None:
    done = commands.Obeyed(step=trainer.version, lineage=trainer.lineage, effect=effect)
    await commands.note_obeyed(trainer.queue.redis, trainer.run, order.id, done)


async def tell(trainer: Trainer, start: int = 0, **numbers: float) -> None:
    normal = {"reward_mean": 1.0, "completion_length": 20.0, "entropy": 1.0, "stop_share": 0.9}
    line = {**normal, "step": trainer.version, "lineage": trainer.lineage, "start": start, **numbers}
    await trainer.queue.redis.xadd(Keys(trainer.run).steps, {"line": json.dumps(line)})


async def go_back(trainer: Trainer, step: int) -> None:
    """As the trainer does: `step` steps of what was trained survive."""
    kept = [group.group_id for groups in trainer.steps[:step] for group in groups]
    undone = [group.group_id for groups in trainer.steps[step:] for group in groups]
    trainer.lineage = await trainer.queue.claim_lineage(0)
    await trainer.queue.undo(undone)
    await trainer.queue.recall(kept)
    await trainer.queue.recover(set())
    del trainer.steps[step:]
    trainer.publish(step)


async def stop_by_order(trainer: Trainer, name: str) -> None:
    order = commands.Stop(id=name, reason="enough")
    await commands.send(trainer.queue.redis, trainer.run, order)
    await obey(trainer, order)
    say(trainer, "stopped")
