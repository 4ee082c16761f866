"""From tasks to the queue: each group once, in time, whatever is killed, and only those that teach."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack

import pytest
import yaml
from orchestrator.by_hand import (
    PER_STEP,
    SECONDS,
    STEPS,
    RolloutServer,
    Trainer,
    complete,
    over,
    running,
    status_of,
    until,
)
from prometheus_client import REGISTRY
from served import served

from services import codec, pause, recipe
from services.contract import ScoredGroup, Version, group_seed
from services.keys import Keys
from services.orchestrator import run as run_module
from services.queue import GroupQueue
from services.redis import connect

pytestmark = pytest.mark.alone


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


async def test_pause_admits_nothing_and_resume_goes_on(
    make_recipe, clean, rollouts, reward_server, caplog, monkeypatch
):
    caplog.set_level("INFO")
    monkeypatch.setattr(run_module, "REMIND_SECONDS", 0.5)
    chosen = make_recipe(trainer__batch_deadline_seconds=3.0)
    trainer = Trainer(clean.url, chosen.run.name, rollouts)
    redis, run = connect(clean.url), chosen.run.name
    began = time.monotonic()
    async with running(chosen, clean, rollouts.url, reward_server) as task:
        await trainer.start()
        await trainer.train(1)
        await pause.put(redis, run, True)
        await until(lambda: status_of(trainer)["state"] == "paused", "it is paused")
        await until(lambda: status_of(trainer)["groups_in_flight"] == 0, "what was begun is finished")
        made, queued = len(rollouts.made), (await trainer.queue.depth()).queued
        for _ in range(queued // PER_STEP):
            await trainer.train()
        await asyncio.sleep(3.5)  # longer than the trainer may otherwise be without a step
        assert len(rollouts.made) == made and not task.done()
        reminded = caplog.text.count("the run is paused: no new groups")
        assert 3 <= reminded <= 1 + (time.monotonic() - began) / 0.5
        await pause.put(redis, run, False)
        while len(trainer.steps) < STEPS:
            await trainer.train()
        assert await over(task) == 0
    await redis.aclose()
    complete(trainer)


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
