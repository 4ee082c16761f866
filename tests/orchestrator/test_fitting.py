"""Servers and specs that fit the recipe, or are refused; what the orchestrator tells of itself."""

import asyncio
import time

import httpx
import pytest
from orchestrator.by_hand import PER_STEP, SECONDS, STEPS, RolloutServer, Trainer, complete, over, running
from served import served, two_free_ports

from services.clients import RewardClient
from services.redis import cancel
from services.spec import RewardSpec
from services.startup import StartupError

pytestmark = pytest.mark.alone


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
