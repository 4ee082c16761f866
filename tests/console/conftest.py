"""A run to look at, and a real reward server."""

import pytest
from console.watched import Run
from served import served

from reward_server import app as reward_app


@pytest.fixture
def run(redis_url):
    made = Run(redis_url)
    made.status(
        trainer={"state": "training", "step": 2, "steps": 10, "tokens_per_second": 1234.5},
        orchestrator={"state": "running", "spec": "mine", "groups_per_second": 1.25, "guard": None},
    )
    yield made
    made.redis.close()


@pytest.fixture(scope="module")
def reward_url():
    with served(reward_app.create(reward_app.Settings(verifier_workers=1))) as url:
        yield url
