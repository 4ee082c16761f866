"""How a run ends: its last step, an order, a signal, a redis that is gone, a trainer that is silent."""

import asyncio
import json
import os
import signal
import time

import pytest
from orchestrator.by_hand import SECONDS, STEPS, Trainer, complete, over, running, say, status_of, stop_by_order, until

from services.keys import Keys
from services.orchestrator.progress import RunFailed
from services.orchestrator.run import orchestrate
from services.redis import EmbeddedRedis, connect, connect_sync, insist

pytestmark = pytest.mark.alone


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
