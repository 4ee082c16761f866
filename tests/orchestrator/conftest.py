"""Real redis and a real reward server; rollout servers of the test's own."""

import json
from pathlib import Path

import pytest
from orchestrator.by_hand import PER_STEP, SECONDS, STEPS, RolloutServer, WebHook
from served import served

from reward_server import app as reward_app
from services import recipe
from services.redis import EmbeddedRedis, connect_sync


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


@pytest.fixture
def web_hook(monkeypatch):
    monkeypatch.setenv("RLIF_WEBHOOK_TOKEN", "hook secret")
    hook = WebHook()
    with served(hook.app) as url:
        hook.url = f"{url}/hook"
        yield hook
