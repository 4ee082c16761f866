"""The orchestrator with real Redis and a real reward server; rollout servers and trainer are in the test's hand."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import yaml
from fastapi import FastAPI, HTTPException, Request
from prometheus_client import REGISTRY
from served import served, two_free_ports

from reward_server import app as reward_app
from services import codec, commands, pause, recipe
from services.access import HttpSettings
from services.api import RolloutGroup, RolloutsRequest, RolloutsResponse
from services.clients import RewardClient
from services.contract import Completion, ScoredGroup, Version, WeightVersion, group_seed
from services.http import create_app
from services.keys import Keys
from services.orchestrator import run as run_module
from services.orchestrator.evaluation import Evaluator
from services.orchestrator.progress import RunFailed
from services.orchestrator.run import orchestrate
from services.problem import Problem
from services.queue import GroupQueue
from services.redis import EmbeddedRedis, cancel, connect, connect_sync, insist
from services.spec import RewardSpec
from services.startup import StartupError
from services.weights import pointer

pytestmark = pytest.mark.alone

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


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory):
    with EmbeddedRedis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="module")
def reward_server():
    app = reward_app.create(reward_app.Settings(verifier_workers=1))
    with served(app) as url:
        yield url


@pytest.fixture
def clean(redis_server):
    with connect_sync(redis_server.url) as client:
        client.flushall()
    return redis_server


@pytest.fixture
def rollouts():
    server = RolloutServer()
    with served(server.app) as url:
        server.url = url
        yield server
        server.gate.set()


@pytest.fixture
def tasks(tmp_path) -> Path:
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps({"q": f"say {n}", "a": str(n), "id": f"t{n}"}) + "\n" for n in range(13)))
    return path


@pytest.fixture
def make_recipe(tasks, tiny_model, request):
    def make(**overrides) -> recipe.Recipe:
        tree = {
            "run": {"name": request.node.name.split("[")[0][-50:], "dir": "/unused", "seed": 3},
            "model": {"path": str(tiny_model)},
            "data": {"path": str(tasks), "fields": {"prompt": "q", "answer": "a", "id": "id"}},
            "rollout": {"group_size": 3, "groups_per_request": 2, "sampling": {"max_tokens": 5}},
            "rewards": [{"name": "exact_match"}, {"name": "length", "weight": 0.0}],
            "pacing": {"max_staleness": 1},
            "trainer": {"steps": STEPS, "groups_per_step": PER_STEP, "batch_deadline_seconds": SECONDS},
            "weights": {"poll_seconds": 0.05},
        }
        return recipe.parse(tree, [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in overrides.items()])

    return make


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


@pytest.fixture
def web_hook(monkeypatch):
    monkeypatch.setenv("RLIF_WEBHOOK_TOKEN", "hook secret")
    hook = WebHook()
    with served(hook.app) as url:
        hook.url = f"{url}/hook"
        yield hook


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


async def test_a_run_from_task_to_queue(make_recipe, clean, rollouts, reward_server):
    chosen = make_recipe()
    trainer = Trainer(clean.url, chosen.run.name, rollouts)
    async with running(chosen, clean, rollouts.url, reward_server) as task:
        await trainer.start()
        await until(lambda: len(rollouts.made) >= 8, "what staleness 1 allows is made")
        await asyncio.sleep(0.3)
        assert len(rollouts.made) == 8, "two steps' groups, and not one more"
        await trainer.train(STEPS)
        assert await over(task) == 0
    complete(trainer)
    assert set(trainer.staleness) == {0, 1}
    assert rollouts.most_running >= 2
    group = trainer.steps[0][0]
    assert group.task.reference.answer == group.task.task_id.removeprefix("t")
    assert group.spec_id == chosen.spec.spec_id
    assert group.sampling.max_tokens == 5 and group.prompt_token_ids == [1, 2, 3]
    assert all(set(score.components) == {"exact_match", "length"} for score in group.scores)
    answered = {g.task.reference.answer: [s.reward for s in g.scores] for step in trainer.steps for g in step}
    assert answered["1"].index(max(answered["1"])) == 1 and len(set(answered["9"])) == 1
    status = json.loads(trainer.redis.hget(Keys(chosen.run.name).status, "orchestrator"))
    assert (status["state"], status["groups_pushed"], status["groups_in_flight"]) == ("finished", 20, 0)


async def test_on_policy_and_repeatable(make_recipe, clean, rollouts, reward_server):
    chosen = make_recipe(pacing__max_staleness=0, run__deterministic=True)
    trainer = Trainer(clean.url, chosen.run.name, rollouts)
    async with running(chosen, clean, rollouts.url, reward_server) as task:
        await trainer.start()
        await trainer.train(STEPS)
        assert await over(task) == 0
    complete(trainer)
    assert set(trainer.staleness) == {0}
    assert [[group.index for group in step] for step in trainer.steps] == [
        list(range(start, start + PER_STEP)) for start in range(0, STEPS * PER_STEP, PER_STEP)
    ]
    index_of = {group.group_id: group.index for step in trainer.steps for group in step}
    for batch in rollouts.batches:
        first, second = (index_of[request.group_id] for request in batch.requests)
        assert first % 2 == 0 and second == first + 1, "chunks are aligned by index"
        for request in batch.requests:
            assert request.sampling.seed == group_seed(3, request.group_id)
            assert request.min_weight_version == Version(version=first // PER_STEP)


@pytest.mark.parametrize("deterministic", [False, True])
async def test_kill_nine_loses_and_repeats_nothing(
    make_recipe, clean, rollouts, reward_server, tmp_path, deterministic
):
    chosen = make_recipe(run__deterministic=deterministic, pacing__max_staleness=0 if deterministic else 1)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        yaml.safe_dump(yaml.safe_load(recipe.dump(chosen)) | {"queue": {"url": clean.url}}, sort_keys=False)
    )
    addresses = [f"rollout.urls=['{rollouts.url}']", f"scorer.urls=['{reward_server}']"]
    command = [sys.executable, "-m", "services.cli.main", "orchestrate", str(path), *addresses]
    trainer = Trainer(clean.url, chosen.run.name, rollouts)
    queue = GroupQueue(connect(clean.url), chosen.run.name)
    out = (tmp_path / "out").open("wb")
    first = subprocess.Popen(command, stdout=out, stderr=out)
    second = None
    try:
        await trainer.start()
        await trainer.train(2)
        await until(lambda: len(rollouts.made) >= 2 * PER_STEP + 2, "the next step is under way")
        rollouts.gate.clear()
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        await asyncio.sleep(0.1)
        before = await queue.seen()
        made_before = len(rollouts.batches)
        # What is left of a chunk whose groups were pushed one by one: half of it.
        cut = sorted((group for step in trainer.steps for group in step), key=lambda group: group.index)[0].group_id
        trainer.redis.hdel(Keys(chosen.run.name).pushed, cut)
        rollouts.gate.set()
        second = subprocess.Popen(command, stdout=out, stderr=out)
        await until(lambda: len(rollouts.batches) > made_before, "the second one asks for groups")
        again = rollouts.batches[made_before]
        asked = [request.group_id for request in again.requests]
        assert cut in asked and len(asked) == (2 if deterministic else 1), "the whole batch, only if it must be"
        trainer.redis.hset(Keys(chosen.run.name).pushed, cut, b"0-0")  # it was pushed: the new copy is a duplicate
        await trainer.train(STEPS - 2)
        await asyncio.to_thread(second.wait, SECONDS)
        assert second.returncode == 0, (tmp_path / "out").read_text()
    finally:
        for process in (first, second):
            if process and process.poll() is None:
                process.kill()
                process.wait()
        out.close()
    complete(trainer)
    asked_later = {r.group_id for batch in rollouts.batches[made_before + 1 :] for r in batch.requests}
    if not deterministic:
        assert not asked_later & before, "what was pushed is not made again"


async def test_a_new_lineage_makes_running_completions_stale(make_recipe, clean, rollouts, reward_server):
    chosen = make_recipe(pacing__max_staleness=0)
    trainer = Trainer(clean.url, chosen.run.name, rollouts)
    async with running(chosen, clean, rollouts.url, reward_server) as task:
        await trainer.start()
        await trainer.train(3)
        rollouts.gate.clear()
        await until(lambda: rollouts.running == 2, "step 3 is being made by 0.3")
        # The trainer falls back to its checkpoint of step 2, and trains the entries of step 2 once more.
        restarted = Trainer(clean.url, chosen.run.name, rollouts)
        restarted.steps, restarted.version = trainer.steps[:2], 2
        for group in trainer.steps[2]:
            restarted.redis.hdel(Keys(chosen.run.name).pushed, group.group_id)
            assert await restarted.queue.push(group)
        await restarted.start()
        assert restarted.lineage == 1
        rollouts.gate.set()
        await until(lambda: rollouts.running == 0, "the old completions are done")
        await asyncio.sleep(0.3)
        assert (await restarted.queue.depth()).queued == PER_STEP, "only the old step's groups: the new ones are stale"
        await restarted.train(3)
        assert await over(task) == 0
    complete(restarted)
    versions = [{c.weight_version for g in step for c in g.completions} for step in restarted.steps]
    assert versions[3:] == [{Version(lineage=1, version=3)}, {Version(lineage=1, version=4)}]
    last = rollouts.batches[-1].requests[0]
    assert last.min_weight_version == Version(lineage=1, version=4)


async def test_one_of_two_rollout_servers_dies(make_recipe, clean, reward_server):
    chosen = make_recipe()
    one, two = RolloutServer(), RolloutServer()
    trainer = Trainer(clean.url, chosen.run.name, one, two)
    with served(two.app) as second, ExitStack() as mortal:
        first = mortal.enter_context(served(one.app))
        async with running(chosen, clean, [first, second], reward_server) as task:
            await trainer.start()
            await trainer.train(2)
            assert one.made and two.made, "the load is spread"
            two.gate.clear()
            await trainer.queue.depth()
            one.gate.clear()
            await asyncio.to_thread(mortal.close)  # cuts what runs there
            two.gate.set()
            made_by_one = set(one.made)
            await trainer.train(STEPS - 2)
            assert await over(task) == 0
    complete(trainer)
    trained = {group.group_id for step in trainer.steps for group in step}
    assert trained <= set(two.made) | made_by_one


async def test_a_refused_group_is_buried_and_replaced(make_recipe, clean, rollouts, reward_server):
    chosen = make_recipe(pacing__max_staleness=0, data__shuffle=False)
    rollouts.refuse = {"say 5"}
    trainer = Trainer(clean.url, chosen.run.name, rollouts)
    async with running(chosen, clean, rollouts.url, reward_server) as task:
        await trainer.start()
        await trainer.train(STEPS)
        assert await over(task) == 0
    # "say 5" is index 5, and index 18 of the second epoch (13 tasks); one more group is made for each.
    assert sorted(trainer.indices) == [index for index in range(STEPS * PER_STEP + 2) if index not in (5, 18)]
    dead = await trainer.queue.dead()
    assert [group.index for group in dead] == [5, 18]
    assert "422 Too long: the prompt is too long" in dead[0].reason
    assert set(trainer.staleness) == {0}


async def test_groups_that_the_trainer_gives_up_are_replaced(make_recipe, clean, rollouts, reward_server):
    chosen = make_recipe(pacing__max_staleness=0)
    trainer = Trainer(clean.url, chosen.run.name, rollouts)
    keys = Keys(chosen.run.name)
    async with running(chosen, clean, rollouts.url, reward_server) as task:
        await trainer.start()
        await until(lambda: trainer.redis.xlen(keys.groups) == PER_STEP, "the first step is made")
        # A damaged entry: the queue dead-letters it when the trainer pulls it.
        entry_id, fields = trainer.redis.xrange(keys.groups)[1]
        trainer.redis.xdel(keys.groups, entry_id)
        trainer.redis.xadd(keys.groups, {**fields, b"group": b"\xc1"})
        await trainer.train(STEPS)
        assert await over(task) == 0
    lost = int(fields[b"index"])
    assert sorted(trainer.indices) == [index for index in range(STEPS * PER_STEP + 1) if index != lost]
    assert set(trainer.staleness) == {0}


async def test_nothing_but_refusals_ends_the_run(make_recipe, clean, rollouts, reward_server):
    rollouts.refuse = {"everything"}
    chosen = make_recipe()
    trainer = Trainer(clean.url, chosen.run.name, rollouts)
    async with running(chosen, clean, rollouts.url, reward_server) as task:
        await trainer.start()
        with pytest.raises(RunFailed, match=r"1\d groups in a row failed for good, .*422 Too long"):
            await over(task)
    assert (await trainer.queue.depth()).dead >= 11


async def test_a_lost_spec_is_put_again(make_recipe, clean, rollouts, reward_server):
    chosen = make_recipe()
    trainer = Trainer(clean.url, chosen.run.name, rollouts)
    async with running(chosen, clean, rollouts.url, reward_server) as task, RewardClient(reward_server) as client:
        await trainer.start()
        await trainer.train(2)
        await client.delete_spec(chosen.run.name)
        await trainer.train(STEPS - 2)
        assert await over(task) == 0
    complete(trainer)
    assert {group.spec_id for step in trainer.steps for group in step} == {chosen.spec.spec_id}


async def test_a_token_that_is_refused_buries_nothing(make_recipe, clean, rollouts, monkeypatch):
    """The servers check it at once; a run whose token is withdrawn later ends before its groups are given up."""
    chosen = make_recipe()
    settings = reward_app.Settings(http=HttpSettings(api_token="secret", admin_token="root"), verifier_workers=1)
    with served(reward_app.create(settings)) as url:
        async with running(chosen, clean, rollouts.url, url) as task:
            with pytest.raises(StartupError, match="cannot be used as a reward server: .*401 Token needed"):
                await over(task)
        monkeypatch.setenv("RLIF_API_TOKEN", "secret")
        async with running(chosen, clean, rollouts.url, url) as task:
            with pytest.raises(StartupError, match="is refused: .*403 Admin token needed"):
                await over(task)
        monkeypatch.setenv("RLIF_ADMIN_TOKEN", "root")
        trainer = Trainer(clean.url, chosen.run.name, rollouts)
        async with running(chosen, clean, rollouts.url, url) as task:
            await trainer.start()
            await trainer.train(1)
            rollouts.forbidden = True
            with pytest.raises(RunFailed, match="the rollout server cannot be used: .*403 Forbidden"):
                await trainer.train(1)
                await over(task)
    assert (await trainer.queue.depth()).dead == 0


async def test_a_spec_that_was_swapped_while_the_run_went_on_outlives_a_restart(
    make_recipe, clean, rollouts, reward_server
):
    chosen = make_recipe()
    trainer = Trainer(clean.url, chosen.run.name, rollouts)
    swapped = RewardSpec(rewards=[{"name": "length"}])
    async with RewardClient(reward_server) as client:
        async with running(chosen, clean, rollouts.url, reward_server) as task:
            await trainer.start()
            await trainer.train(1)
            await cancel(task)
        await client.put_spec(chosen.run.name, swapped)
        async with running(chosen, clean, rollouts.url, reward_server) as task:
            await trainer.train(STEPS - 1)
            assert await over(task) == 0
        assert trainer.steps[-1][0].spec_id == swapped.spec_id
        # Another recipe means another will.
        changed = make_recipe(rewards=[{"name": "random"}], trainer__steps=STEPS + 1)
        async with running(changed, clean, rollouts.url, reward_server) as task:
            await trainer.train(1)
            assert await over(task) == 0
        assert trainer.steps[-1][0].spec_id == changed.spec.spec_id


async def test_redis_dies_and_comes_back(make_recipe, rollouts, reward_server, tmp_path):
    chosen = make_recipe()
    with EmbeddedRedis(tmp_path / "redis") as redis:
        trainer = Trainer(redis.url, chosen.run.name, rollouts)
        async with running(chosen, redis, rollouts.url, reward_server) as task:
            await trainer.start()
            await trainer.train(2)
            rollouts.gate.clear()
            os.kill(redis.pid, signal.SIGKILL)
            redis.process.wait()
            rollouts.gate.set()  # finished groups have nowhere to go for a while
            await asyncio.sleep(0.5)
            assert not task.done()
            await asyncio.to_thread(redis.start)
            await trainer.train(STEPS - 2)
            assert await over(task) == 0
        complete(trainer)


async def test_a_redis_that_lost_its_data_ends_the_orchestrator(make_recipe, clean, rollouts, reward_server):
    """Started again it makes what is missing; going on it would wait for groups that nobody has any more."""
    chosen = make_recipe()
    trainer = Trainer(clean.url, chosen.run.name, rollouts)
    async with running(chosen, clean, rollouts.url, reward_server) as task:
        await trainer.start()
        await trainer.train(1)
        with connect_sync(clean.url) as redis:
            redis.flushall()
        with pytest.raises(RunFailed, match="redis lost the run's data"):
            await asyncio.wait_for(task, 30)


async def test_sigterm_lets_requests_finish(make_recipe, clean, rollouts, reward_server):
    chosen = make_recipe()
    trainer = Trainer(clean.url, chosen.run.name, rollouts)
    async with running(chosen, clean, rollouts.url, reward_server) as task:
        await trainer.start()
        rollouts.gate.clear()
        await until(lambda: rollouts.running == 4, "all that may be is under way")
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.2)
        assert not task.done()
        rollouts.gate.set()
        assert await over(task) == 128 + signal.SIGTERM
    assert (await trainer.queue.depth()).queued == 8
    status = json.loads(trainer.redis.hget(Keys(chosen.run.name).status, "orchestrator"))
    assert status["state"] == "stopping"


async def test_sigterm_ends_the_wait_for_redis(make_recipe):
    nobody = "http://127.0.0.1:9"
    task = asyncio.create_task(orchestrate(make_recipe(), [nobody], [nobody], "redis://127.0.0.1:9/0"))
    await asyncio.sleep(0.5)
    assert not task.done()
    os.kill(os.getpid(), signal.SIGTERM)
    assert await over(task) == 128 + signal.SIGTERM


async def test_the_trainer_says_when_it_is_done(make_recipe, clean, rollouts, reward_server):
    chosen = make_recipe()
    trainer = Trainer(clean.url, chosen.run.name, rollouts)
    async with running(chosen, clean, rollouts.url, reward_server) as task:
        await trainer.start()
        await trainer.train(1)
        done = json.dumps({"state": "done", "at": time.time()})
        trainer.redis.hset(Keys(chosen.run.name).status, "trainer", done)
        assert await over(task) == 0


async def test_it_can_stay_after_the_last_step(make_recipe, clean, rollouts, reward_server):
    chosen = make_recipe(rollout__deadline_seconds=1.0)
    trainer = Trainer(clean.url, chosen.run.name, rollouts)

    def state() -> str:
        return json.loads(trainer.redis.hget(Keys(chosen.run.name).status, "orchestrator") or "{}").get("state", "")

    async with running(chosen, clean, rollouts.url, reward_server, stay=True) as task:
        await trainer.start()
        await trainer.train(STEPS)
        await until(lambda: state() == "finished", "the end is told")
        await asyncio.sleep(0.3)
        assert not task.done()
        os.kill(os.getpid(), signal.SIGTERM)
        assert await over(task) == 128 + signal.SIGTERM
    # Started again, with the servers gone for longer than a call would wait for them.
    nobody = "http://127.0.0.1:9"
    async with running(chosen, clean, nobody, nobody, stay=True) as task:
        await until(lambda: state() == "finished", "the end is seen again")
        await asyncio.sleep(1.5)
        assert not task.done()
    complete(trainer)


async def test_a_silent_trainer_is_named(make_recipe, clean, rollouts, reward_server):
    chosen = make_recipe(trainer__batch_deadline_seconds=1.0)
    async with running(chosen, clean, rollouts.url, reward_server) as task:
        with pytest.raises(RunFailed, match="the trainer did not publish its first weights within 1 s"):
            await over(task)
    trainer = Trainer(clean.url, chosen.run.name, rollouts)
    async with running(chosen, clean, rollouts.url, reward_server) as task:
        await trainer.start()
        with pytest.raises(RunFailed, match=r"weights newer than 0.0 within 1 s \(8 groups queued, 0 being trained\)"):
            await over(task)


async def test_servers_that_do_not_fit_are_refused(make_recipe, clean, rollouts, reward_server):
    other = RolloutServer(vocab_size=1000)
    with served(other.app) as url:
        async with running(make_recipe(), clean, [rollouts.url, url], reward_server) as task:
            trainer = Trainer(clean.url, make_recipe().run.name, rollouts, other)
            await trainer.start()
            with pytest.raises(StartupError, match=r"vocabulary of (1000|288), but .* serves one of (1000|288)"):
                await over(task)
    async with running(make_recipe(), clean, reward_server, reward_server) as task:
        with pytest.raises(StartupError, match="cannot be used as a rollout server"):
            await over(task)


@pytest.mark.parametrize(
    "rewards, message",
    [
        ("no_such_spec", "knows no spec 'no_such_spec'"),
        ([{"name": "no_such_reward"}], "there is no reward 'no_such_reward'"),
        ([{"name": "self_certainty"}], "self_certainty cannot be computed here"),
    ],
)
async def test_rewards_that_cannot_be_computed_are_refused(
    make_recipe, clean, rollouts, reward_server, rewards, message
):
    async with running(make_recipe(rewards=rewards), clean, rollouts.url, reward_server) as task:
        with pytest.raises(StartupError, match=message):
            await over(task)


async def test_a_named_spec_is_used(make_recipe, clean, rollouts, reward_server):
    chosen = make_recipe(rewards="exact_match")
    trainer = Trainer(clean.url, chosen.run.name, rollouts)
    async with running(chosen, clean, rollouts.url, reward_server) as task:
        await trainer.start()
        await trainer.train(STEPS)
        assert await over(task) == 0
    assert set(trainer.steps[0][0].scores[0].components) == {"exact_match"}


async def test_metrics_and_status_are_served(make_recipe, clean, rollouts, reward_server):
    with two_free_ports() as port:
        chosen = make_recipe(tracking__metrics_port=port)
        trainer = Trainer(clean.url, chosen.run.name, rollouts)
        async with running(chosen, clean, rollouts.url, reward_server) as task, httpx.AsyncClient() as client:
            base = f"http://127.0.0.1:{port + 1}"

            async def get(path: str) -> httpx.Response:
                try:
                    return await client.get(base + path)
                except httpx.TransportError:
                    return httpx.Response(599)

            ends = time.monotonic() + SECONDS
            while (answer := await get("/readyz")).status_code == 599:
                assert time.monotonic() < ends
                await asyncio.sleep(0.05)
            assert answer.status_code == 503 and "trainer" in answer.json()["dependencies"]["weights"]
            await trainer.start()
            await trainer.train(1)
            while (await get("/readyz")).status_code != 200:
                assert time.monotonic() < ends
                await asyncio.sleep(0.05)
            status = (await get("/v1/status")).json()
            assert status["groups_pushed"] >= PER_STEP
            text = (await get("/metrics")).text
            for name in ("groups_total", "staleness_versions_bucket", "call_seconds_bucket", "groups_in_flight"):
                assert f"rlif_orchestrator_{name}" in text
            assert f'rlif_queue_groups{{run="{chosen.run.name}",state="queued"}}' in text
            await trainer.train(STEPS - 1)
            assert await over(task) == 0


async def test_one_cancellation_ends_a_task_that_talks_to_redis(clean):
    """Of single cancellations of bare redis-py calls, Python 3.11 loses about a third."""
    redis = connect(clean.url)

    async def talk() -> None:
        while True:
            await insist(lambda: redis.get("a"), "a test", SECONDS)

    for number in range(60):
        task = asyncio.create_task(talk())
        await asyncio.sleep(0.0003 * number)
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=5)
        assert done and task.cancelled()
    await redis.aclose()


# ---- dynamic sampling ------------------------------------------------------------------------------------------


async def test_unanimous_groups_are_left_out_and_replaced(make_recipe, clean, rollouts, reward_server):
    """A completion's text is its number, a task's answer is one too: groups of answers above 2 are all wrong."""
    chosen = make_recipe(
        pacing__max_staleness=0, pacing__dynamic_sampling=True, pacing__max_refill=20, data__shuffle=False
    )
    trainer = Trainer(clean.url, chosen.run.name, rollouts)
    before = REGISTRY.get_sample_value("rlif_orchestrator_groups_total", {"outcome": "unanimous"}) or 0
    async with running(chosen, clean, rollouts.url, reward_server) as task:
        await trainer.start()
        await trainer.train(2)
    # Another orchestrator knows what the first left out.
    async with running(chosen, clean, rollouts.url, reward_server) as task:
        await trainer.train(STEPS - 2)
        assert await over(task) == 0
    taught = [index for index in range(200) if index % 13 < 3]
    assert sorted(trainer.indices) == taught[: STEPS * PER_STEP]
    assert set(trainer.staleness) == {0}
    left_out = await trainer.queue.left_out()
    last = max(trainer.indices)
    assert set(range(last)) - set(trainer.indices) <= set(left_out) and not set(left_out) & set(trainer.indices)
    assert REGISTRY.get_sample_value("rlif_orchestrator_groups_total", {"outcome": "unanimous"}) - before >= 40
    assert (await trainer.queue.depth()).dead == 0


async def test_refilling_has_an_end(make_recipe, clean, rollouts, reward_server, tasks, caplog):
    tasks.write_text("".join(json.dumps({"q": f"say {n}", "a": "9", "id": f"t{n}"}) + "\n" for n in range(13)))
    chosen = make_recipe(pacing__dynamic_sampling=True, pacing__max_refill=0.5)
    trainer = Trainer(clean.url, chosen.run.name, rollouts)
    async with running(chosen, clean, rollouts.url, reward_server) as task:
        await trainer.start()
        await trainer.train(STEPS)
        assert await over(task) == 0
    assert "unanimous groups since weights 0.0: from now on they are trained on" in caplog.text
    assert len(trainer.indices) == STEPS * PER_STEP
    assert 2 <= len(await trainer.queue.left_out()) <= 2 * (STEPS + 1)


# ---- watching ----------------------------------------------------------------------------------------------------


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


async def test_a_collapse_is_rolled_back_and_what_it_undid_is_made_again(
    make_recipe, clean, rollouts, reward_server, web_hook
):
    guard = {"action": "roll_back", "baseline": 3, "votes": 2, "window": 2, "again_within": 1, "webhook": web_hook.url}
    chosen = make_recipe(guard=guard, run__deterministic=True, pacing__max_staleness=0, trainer__steps=9)
    trainer = Trainer(clean.url, chosen.run.name, rollouts)
    async with running(chosen, clean, rollouts.url, reward_server) as task:
        await trainer.start()
        for length in (20, 20, 20, 20, 2, 2):
            await trainer.train()
            await tell(trainer, completion_length=length)
        order = await answer(trainer, "roll_back")
        assert (order.before, order.rate_factor) == (5, 0.5)
        assert "completion_length" not in order.reason and "length is 2, below 8 since step 5" in order.reason
        # A repeatable run makes nothing by weights that are about to be undone.
        assert not await trainer.queue.redis.xlen(Keys(chosen.run.name).groups)
        lost = {group.group_id for group in trainer.steps[4] + trainer.steps[5]}
        await go_back(trainer, 4)
        await obey(trainer, order)
        await trainer.train()
        assert {group.group_id for group in trainer.steps[4]} <= lost
        assert {str(c.weight_version) for group in trainer.steps[4] for c in group.completions} == {"1.4"}
        await tell(trainer, start=4)
        for _ in range(4):
            await trainer.train()
            await tell(trainer, start=4)
        finish = await answer(trainer, "finish")
        await obey(trainer, finish)
        assert await over(task) == 0
    assert sorted(trainer.indices) == list(range(9 * PER_STEP)) and set(trainer.staleness) == {0}
    assert [body["signal"] for body in web_hook.bodies] == ["length"]
    assert web_hook.bodies[0]["message"].startswith("step 6: length is 2") and web_hook.headers == [
        "Bearer hook secret"
    ]


async def test_a_second_roll_back_to_the_same_place_stops_the_run_and_restarts_repeat_nothing(
    make_recipe, clean, rollouts, reward_server, web_hook
):
    guard = {"action": "roll_back", "baseline": 3, "votes": 2, "window": 2, "webhook": web_hook.url}
    chosen = make_recipe(guard=guard, trainer__steps=20)
    trainer = Trainer(clean.url, chosen.run.name, rollouts)
    async with running(chosen, clean, rollouts.url, reward_server):
        await trainer.start()
        for length in (20, 20, 20, 2, 2):
            await trainer.train()
            await tell(trainer, completion_length=length)
        first = await answer(trainer, "roll_back")
    async with running(chosen, clean, rollouts.url, reward_server) as task:
        await go_back(trainer, 2)
        await obey(trainer, first)
        for length in (20, 2, 2):
            await trainer.train()
            await tell(trainer, start=2, completion_length=length)
        stop = await answer(trainer, "stop")
        assert stop.reason.startswith(
            "by the collapse guard: again within 50 steps of a roll-back to step 2: step 5: length"
        )
        orders = await commands.after(trainer.queue.redis, trainer.run, 0)
        assert [order.kind for order in orders] == ["roll_back", "stop"]
        await obey(trainer, stop)
        status = json.dumps({"state": "stopped", "lineage": trainer.lineage, "at": time.time()})
        await trainer.queue.redis.hset(Keys(chosen.run.name).status, "trainer", status)
        assert await over(task) == 0
    # The first orchestrator was ended while it told: rather twice than never.
    alarm = stop.reason.removeprefix("by the collapse guard: ").partition(": ")[2]
    assert {body["message"] for body in web_hook.bodies} == {alarm}
    assert 2 <= len(web_hook.bodies) <= 3


async def test_evaluation_of_exact_versions_names_the_best(make_recipe, clean, rollouts, reward_server, tmp_path):
    held_out = tmp_path / "held-out.jsonl"
    rows = [{"q": f"tell {n}", "a": str(n), "id": f"h{n}"} for n in range(4)]
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluation = {
        "data": {"path": str(held_out), "fields": {"prompt": "q", "answer": "a", "id": "id"}, "source": "held out"},
        "every": 2,
        "rewards": [{"name": "exact_match"}],
        "samples": 3,
        "certainty": False,
        "tasks_per_request": 3,
    }
    chosen = make_recipe(
        evaluation=evaluation,
        run__deterministic=True,
        pacing__max_staleness=0,
        trainer__steps=4,
        trainer__checkpoints__every=2,
    )
    trainer = Trainer(clean.url, chosen.run.name, rollouts)
    async with running(chosen, clean, rollouts.url, reward_server) as task:
        await trainer.start()
        await trainer.train(4)
        await obey(trainer, await answer(trainer, "finish"))
        assert await over(task) == 0
    orders = await commands.after(trainer.queue.redis, trainer.run, 0)
    assert [order.kind for order in orders] == ["evaluated"] * 3 + ["finish"]
    results = [order.result for order in orders[:3]]
    assert [str(result.version) for result in results] == ["0.0", "0.2", "0.4"]
    assert [result.best for result in results] == [True, False, False]  # the same answers each time
    # Numbers 0, 1 and 2 are said to each task: three of the four have one right answer of three.
    assert results[0].metrics["accuracy"] == results[0].metrics["accuracy.exact_match"] == pytest.approx(0.25)
    assert all(result.oldest == result.newest == result.version and result.failed == 0 for result in results)
    asked = [
        [request for request in batch.requests if request.messages[-1].content.startswith("tell")]
        for batch in rollouts.batches
    ]
    assert [len(batch) for batch in asked if batch] == [3, 1] * 3
    # A server that does not serve the version yet has to wait for it.
    versions = [{str(request.min_weight_version) for request in batch} for batch in asked if batch]
    assert versions == [{"0.0"}] * 2 + [{"0.2"}] * 2 + [{"0.4"}] * 2
    assert len({request.sampling.seed for batch in asked for request in batch}) == 4
    assert set(trainer.staleness) == {0}


def evaluator_of(make_recipe, redis=None, **evaluation) -> Evaluator:
    """One without tasks; the run is of lineage 1."""
    judged = {
        "data": {"path": "x", "fields": {"prompt": "q"}},
        "every": 10,
        "rewards": "exact_match",
        "certainty": False,
    }
    chosen = make_recipe(evaluation={**judged, **evaluation})
    watch = SimpleNamespace(redis=redis, floor=1, extra={})
    return Evaluator(SimpleNamespace(recipe=chosen, watch=watch), chosen.evaluation, SimpleNamespace(tasks=[]))


def a_result(step: int, **metrics: float) -> commands.EvaluationResult:
    none = {"oldest": None, "newest": None, "tasks": 0, "failed": 0, "best": False, "seconds": 0}
    return commands.EvaluationResult(version=Version(lineage=1, version=step), metrics=metrics, **none)


@pytest.mark.parametrize(
    ("best_is", "expected"), [("highest", [True, False, False, True]), ("lowest", [True, True, False, False])]
)
def test_the_best_is_better_than_all_before(make_recipe, best_is, expected):
    evaluator = evaluator_of(make_recipe, best="length", best_is=best_is)
    found = []
    for step, length in enumerate((5.0, 3.0, 3.0, 8.0)):
        found.append(evaluator._is_best({"length": length}))
        evaluator.results[step] = a_result(step, length=length)
    assert found == expected
    assert not evaluator._is_best({"accuracy": 1.0})  # the metric is missing


async def test_a_roll_back_forgets_what_it_undid_alone(make_recipe, clean):
    async with connect(clean.url) as client:
        evaluator = evaluator_of(make_recipe, client)
        for step in (0, 2, 4):
            await evaluator._note(a_result(step))
        await evaluator.forget(after=2)
        assert sorted(evaluator.results) == [0, 2]
        await evaluator.load()
        assert sorted(evaluator.results) == [0, 2]
        # One of weights that were undone while they were evaluated is not noted.
        await evaluator.evaluate(Version(lineage=0, version=4))
        assert sorted(evaluator.results) == [0, 2]
        await evaluator.evaluate(Version(lineage=1, version=3))
        assert sorted(evaluator.results) == [0, 2, 3]


async def test_a_task_that_is_refused_costs_an_evaluation_only_itself(
    make_recipe, clean, rollouts, reward_server, tmp_path
):
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text("".join(json.dumps({"q": f"tell {n}", "a": "1", "id": f"h{n}"}) + "\n" for n in range(3)))
    rollouts.refuse = {"tell 1"}
    chosen = make_recipe(
        evaluation={
            "data": {"path": str(held_out), "fields": {"prompt": "q", "answer": "a"}},
            "every": 10,
            "rewards": "exact_match",
        }
    )
    trainer = Trainer(clean.url, chosen.run.name, rollouts)
    async with running(chosen, clean, rollouts.url, reward_server) as task:
        await trainer.start()
        first = await answer(trainer, "evaluated")
        assert first.result.metrics["value.exact_match"] == 0.0 and first.result.best
        await trainer.train(STEPS)
        await obey(trainer, await answer(trainer, "finish"))
        assert await over(task) == 0
    found = await trainer.queue.redis.hgetall(Keys(chosen.run.name).evaluations)
    assert {key: json.loads(body)["failed"] for key, body in found.items()} == {b"0.0": 1, b"0.5": 1}


async def test_pause_admits_nothing_and_resume_goes_on(
    make_recipe, clean, rollouts, reward_server, caplog, monkeypatch
):
    caplog.set_level("INFO")
    monkeypatch.setattr(run_module, "REMIND_SECONDS", 0.5)
    chosen = make_recipe(trainer__batch_deadline_seconds=2.0)
    trainer = Trainer(clean.url, chosen.run.name, rollouts)
    redis, run = connect(clean.url), chosen.run.name
    async with running(chosen, clean, rollouts.url, reward_server) as task:
        await trainer.start()
        await trainer.train(1)
        await pause.put(redis, run, True)
        await until(lambda: status_of(trainer)["state"] == "paused", "it is paused")
        await until(lambda: status_of(trainer)["groups_in_flight"] == 0, "what was begun is finished")
        made, queued = len(rollouts.made), (await trainer.queue.depth()).queued
        for _ in range(queued // PER_STEP):
            await trainer.train()
        await asyncio.sleep(2.5)  # longer than the trainer may otherwise be without a step
        assert len(rollouts.made) == made and not task.done()
        assert 3 <= caplog.text.count("the run is paused: no new groups") <= 10
        await pause.put(redis, run, False)
        while len(trainer.steps) < STEPS:
            await trainer.train()
        assert await over(task) == 0
    await redis.aclose()
    complete(trainer)


async def test_a_dead_group_is_made_again_on_demand(make_recipe, clean, rollouts, reward_server):
    chosen = make_recipe(pacing__max_staleness=0, data__shuffle=False)
    rollouts.refuse = {"say 5"}
    trainer = Trainer(clean.url, chosen.run.name, rollouts)
    async with running(chosen, clean, rollouts.url, reward_server) as task:
        await trainer.start()
        await trainer.train(2)
        (dead,) = await trainer.queue.dead()
        rollouts.refuse = set()
        assert await trainer.queue.retry(dead.entry_id) == dead.index == 5
        await trainer.train(STEPS - 2)
        assert await over(task) == 0
    assert sorted(trainer.indices) == list(range(STEPS * PER_STEP)), "nothing more, nothing less"
    assert max(trainer.staleness) == 0 and not await trainer.queue.dead()


async def test_a_retry_takes_the_last_room_or_is_refused(make_recipe, clean, rollouts, reward_server):
    """Asked for while the orchestrator, which looks seldom, is about to give the room to others."""
    chosen = make_recipe(data__shuffle=False, weights__poll_seconds=SECONDS, pacing__max_requests_in_flight=1)
    rollouts.refuse = {"say 5", "say 6"}
    trainer = Trainer(clean.url, chosen.run.name, rollouts)
    async with running(chosen, clean, rollouts.url, reward_server) as task:
        await trainer.start()
        await trainer.train(2)
        await until(lambda: len(rollouts.made) == 4 * PER_STEP, "what version 2 allows is made")
        first, second = await trainer.queue.dead()
        rollouts.refuse = set()
        rollouts.gate.clear()
        await trainer.train()
        await until(lambda: rollouts.running == 1, "a part of the last groups is at the server")
        assert trainer.redis.get(Keys(trainer.run).room) == b"2"
        assert await trainer.queue.retry(first.entry_id) == 5
        rollouts.gate.set()
        await until(lambda: trainer.redis.get(Keys(trainer.run).room) == b"0", "the last index is passed")
        with pytest.raises(ValueError, match="takes no more groups"):
            await trainer.queue.retry(second.entry_id)
        await trainer.train(STEPS - 3)
        assert await over(task) == 0
    assert sorted(trainer.indices) == [*range(6), *range(7, STEPS * PER_STEP + 1)]
    assert [dead.index for dead in await trainer.queue.dead()] == [6] and max(trainer.staleness) <= 1


async def test_an_order_to_stop_ends_the_orchestrator_of_any_recipe(make_recipe, clean, rollouts, reward_server):
    chosen = make_recipe(run__name="stopped")
    assert not chosen.has_orders
    trainer = Trainer(clean.url, chosen.run.name, rollouts)
    async with running(chosen, clean, rollouts.url, reward_server) as task:
        await trainer.start()
        await trainer.train(1)
        await stop_by_order(trainer, "stop")
        assert await over(task) == 0


async def test_a_trainer_that_resumes_after_an_order_to_stop_may_be_ended_by_a_signal(
    make_recipe, clean, rollouts, reward_server
):
    chosen = make_recipe(run__name="resumed")
    trainer = Trainer(clean.url, chosen.run.name, rollouts)
    async with running(chosen, clean, rollouts.url, reward_server, stay=True) as task:
        await trainer.start()
        await trainer.train(1)
        await stop_by_order(trainer, "stop")
        await until(lambda: status_of(trainer)["state"] == "finished", "the order ended the run")
        await trainer.start()
        say(trainer, "waiting")
        await until(lambda: status_of(trainer)["state"] == "running", "the run goes on")
        await trainer.train(1)
        say(trainer, "stopped")  # by a signal
        await asyncio.sleep(0.5)
        assert not task.done() and status_of(trainer)["state"] == "running"
        await trainer.start()
        await trainer.train(STEPS - 2)
        await until(lambda: status_of(trainer)["state"] == "finished", "the last step is trained")
    complete(trainer)


async def test_a_retry_that_a_restart_finds_unmade_waits_for_room(make_recipe, clean, rollouts, reward_server):
    chosen = make_recipe(pacing__max_staleness=0, data__shuffle=False)
    rollouts.refuse = {"say 5"}
    trainer = Trainer(clean.url, chosen.run.name, rollouts)
    async with running(chosen, clean, rollouts.url, reward_server):
        await trainer.start()
        await trainer.train(2)
        while (await trainer.queue.depth()).queued < PER_STEP:
            await asyncio.sleep(0.02)
        rollouts.refuse = set()
        (dead,) = await trainer.queue.dead()
        await trainer.queue.retry(dead.entry_id)
        made = len(rollouts.made)
    async with running(chosen, clean, rollouts.url, reward_server) as task:
        await until(lambda: status_of(trainer)["state"] == "running", "it began again")
        await asyncio.sleep(0.5)
        assert len(rollouts.made) == made, "the trainer can take no more"
        await trainer.train(STEPS - 2)
        assert await over(task) == 0
    assert trainer.redis.get(Keys(trainer.run).room) == b"0"
    assert sorted(trainer.indices) == list(range(STEPS * PER_STEP)), "nothing more, nothing less"
    assert max(trainer.staleness) == 0


async def stop_by_order(trainer: Trainer, name: str) -> None:
    order = commands.Stop(id=name, reason="enough")
    await commands.send(trainer.queue.redis, trainer.run, order)
    await obey(trainer, order)
    say(trainer, "stopped")


def say(trainer: Trainer, state: str) -> None:
    status = {"state": state, "step": trainer.version, "lineage": trainer.lineage, "at": time.time()}
    trainer.redis.hset(Keys(trainer.run).status, "trainer", json.dumps(status))


async def test_scored_groups_are_kept_after_they_were_trained(make_recipe, clean, rollouts, reward_server):
    for kept in (6, 0):
        chosen = make_recipe(tracking__groups_kept=kept, run__name=f"kept-{kept}")
        trainer = Trainer(clean.url, chosen.run.name, rollouts)
        async with running(chosen, clean, rollouts.url, reward_server) as task:
            await trainer.start()
            await trainer.train(STEPS)
            assert await over(task) == 0
        found = trainer.redis.xrange(Keys(chosen.run.name).samples)
        groups = [codec.unpack_as(ScoredGroup, fields[b"group"]) for _, fields in found]
        assert len(groups) == kept
        assert {group.group_id for group in groups} <= {group.group_id for step in trainer.steps for group in step}


def status_of(trainer: Trainer) -> dict:
    return json.loads(trainer.redis.hget(Keys(trainer.run).status, "orchestrator") or b"{}") or {"state": ""}
