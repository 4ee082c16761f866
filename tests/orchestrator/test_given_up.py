"""Groups that are given up, replaced, and made again."""

import asyncio

import pytest
from orchestrator.by_hand import PER_STEP, SECONDS, STEPS, Trainer, over, running, status_of, until
from served import served

from reward_server import app as reward_app
from services.access import HttpSettings
from services.keys import Keys
from services.orchestrator.progress import RunFailed
from services.startup import StartupError

pytestmark = pytest.mark.alone


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
