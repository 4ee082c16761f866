"""Orders to a real trainer: obeyed once, in order, between two steps, and again at the same step after a crash."""

import asyncio
import json
import threading
import time

import pytest
import torch
import yaml
from test_trainer import GROUPS_PER_STEP, STEPS, Run, make_recipe, read_steps, surviving

from services import commands, pause, recipe
from services.commands import Evaluated, EvaluationResult, Finish, RaiseBeta, RollBack, Stop
from services.contract import Version
from services.keys import Keys
from services.queue import GroupQueue
from services.redis import DeadlineExceeded, connect
from trainer.checkpoint import Progress
from trainer.feed import Feed
from trainer.obey import adjusted, obey
from trainer.ranks import Ranks
from trainer.train import WAIT, _next
from trainer.waits import Waits

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SECONDS = 300.0
"""A trainer starts in a few seconds; on a machine that does much else it takes minutes."""
GUARD = {"action": "roll_back"}
LOOK = EvaluationResult(
    version=Version(version=0), oldest=None, newest=None, tasks=4, failed=0, metrics={"accuracy": 0.5}, best=True,
    seconds=0.1,
)  # fmt: skip
ORDERED = {"schedule": "constant", "warmup": 0, "checkpoints": {"every": STEPS, "keep": 2}}


def on_redis(call, url: str):
    async def asked():
        async with connect(url) as client:
            return await call(client)

    return asyncio.run(asked())


def order(run: Run, given) -> bool:
    return on_redis(lambda client: commands.send(client, run.name, given), run.redis_url)


def obeyed(run: Run) -> dict[str, commands.Obeyed]:
    return on_redis(lambda client: commands.all_obeyed(client, run.name), run.redis_url)


def push(run: Run, groups, lineage: int) -> None:
    async def push(client):
        for group in groups:
            made = [c.model_copy(update={"weight_version": Version(lineage=lineage)}) for c in group.completions]
            assert await GroupQueue(client, run.name).push(group.model_copy(update={"completions": made}))

    on_redis(push, run.redis_url)


def guarded(folder, model, url, name: str, **trainer) -> Run:
    run = Run(folder, model, url, name, **trainer)
    run.recipe_path.write_text(yaml.safe_dump({**yaml.safe_load(run.recipe_path.read_text()), "guard": GUARD}))
    run.recipe = recipe.load(run.recipe_path)
    return run


async def test_an_order_is_given_once_and_they_keep_their_order(redis_url):
    async with connect(redis_url) as client:
        first, second = Finish(id="a"), Stop(id="b", reason="x")
        assert [await commands.send(client, "orders", o) for o in (first, second, first)] == [True, True, False]
        assert await commands.after(client, "orders", 0) == [first, second]
        assert await commands.after(client, "orders", 1) == [second]
        await commands.note_obeyed(client, "orders", "a", commands.Obeyed(step=1, lineage=0, effect="done"))
        # A trainer that obeyed more than redis knows of: redis lost its data, what it has came since.
        assert await commands.after(client, "orders", 7) == [second]


def test_while_the_run_is_paused_nothing_is_late(tiny_model, redis_url, tmp_path):
    """A trainer gives up on groups that do not come in time; the time counts from when they may come. Its other ranks
    hear of it that often, or their collective would time out."""
    late, paused_for = 0.3, 1.0
    run = Run(tmp_path, tiny_model, redis_url, "paused", batch_deadline_seconds=late)
    waits = Waits()
    feed, told, texts = Feed(redis_url, run.recipe, waits), [], set()

    class Told(Ranks):
        def broadcast(self, payload):
            told.append(payload)
            return super().broadcast(payload)

    def look():
        texts.update(what for what, *_ in waits._waiting.copy().values())
        on_redis(lambda client: pause.put(client, run.name, False), redis_url)

    ranks = Told(0, 1, torch.device("cpu"))
    try:
        feed.claim(0, [], [])
        on_redis(lambda client: pause.put(client, run.name, True), redis_url)
        lift = threading.Timer(paused_for, look)
        lift.start()
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded, match="0 of 2 scored groups"):
            _next(feed, Progress(), 288, ranks)
        assert paused_for + late <= time.monotonic() - began < paused_for + 10
        lift.join()
        assert len(told) >= 2 and set(told) == {WAIT}
        assert any("the run is paused" in text for text in texts)
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            time.sleep(late)  # the pause is long over
            _next(feed, Progress(), 288, ranks)
        assert time.monotonic() - began < paused_for + late
    finally:
        feed.close()


def test_what_a_dead_trainer_could_not_say_is_said_by_the_restored_one(tiny_model, redis_url, tmp_path):
    """It went back, saved that, and was killed before it noted what came of the order, for which the guard waits."""
    run = Run(tmp_path, tiny_model, redis_url, "unsaid")
    given = [
        RaiseBeta(id="raise", factor=2.0, cap=0.5, reason="r"),
        RollBack(id="back", before=2, rate_factor=0.5, reason="r"),
        Stop(id="stop", reason="r"),
        Finish(id="not yet"),
    ]
    for one in given:
        order(run, one)
    said = commands.Obeyed(step=5, lineage=0, effect="kl_beta 0.1 -> 0.2")
    on_redis(lambda client: commands.note_obeyed(client, run.name, "raise", said), redis_url)
    feed = Feed(redis_url, run.recipe, Waits())
    try:
        feed.note_restored(Progress(step=1, lineage=2, orders=3))
        found = obeyed(run)
        assert found.keys() == {"raise", "back"} and found["raise"] == said
        assert (found["back"].step, found["back"].lineage) == (1, 2)
        # A redis that lost its data knows of less than was obeyed.
        keys = Keys(run.name)
        lost = keys.commands, keys.command_ids, keys.commands_obeyed
        on_redis(lambda client: client.delete(*lost), redis_url)
        order(run, given[3])
        feed.note_restored(Progress(step=1, lineage=2, orders=3))
        assert obeyed(run) == {}
    finally:
        feed.close()


@pytest.fixture(scope="module")
def ordered(tiny_model, redis_url, tmp_path_factory):
    """Beta is raised and the first weights are named the best after step 2; killed after step 3 and gone on from the
    first weights; rolled back after step 4, and killed again; stopped after step 3 of the third start."""
    run = guarded(tmp_path_factory.mktemp("orders"), tiny_model, redis_url, "ordered", **ORDERED)
    at = [number * GROUPS_PER_STEP for number in range(STEPS + 1)]
    try:
        run.push(0, at[2])
        run.start().wait_for(2, 0, SECONDS)
        order(run, RaiseBeta(id="raise", factor=2.0, cap=0.15, reason="a test"))
        order(run, Evaluated(id="look", result=LOOK))
        ends = time.monotonic() + SECONDS
        while len(obeyed(run)) < 2:  # while it waits for groups
            assert time.monotonic() < ends
            time.sleep(0.05)
        run.push(at[2], at[3])
        run.wait_for(3, 0, SECONDS)
        kill(run)
        run.start("--resume").wait_for(3, 1, SECONDS)
        run.push(at[3], at[4])
        run.wait_for(4, 1, SECONDS)
        order(run, RollBack(id="back", before=2, rate_factor=0.5, reason="a test"))
        run.wait_for(0, 2, SECONDS)
        kill(run)
        run.start("--resume").wait_for(0, 3, SECONDS)
        push(run, run.groups[: at[3]], lineage=3)
        run.wait_for(3, 3, SECONDS)
        order(run, Stop(id="stop", reason="a test says so"))
        assert run.end(SECONDS) == 0, run.log.read_text()[-4000:]
        yield run
    finally:
        run.close()


def kill(run: Run) -> None:
    assert run.process
    run.process.kill()
    run.end()


def test_a_restored_trainer_obeys_at_the_same_step_again(ordered):
    lines = read_steps(ordered.dir)
    assert [line["loss"] for line in lines[3:6]] == [line["loss"] for line in lines[:3]]


def test_a_roll_back_makes_undone_groups_again_at_the_lower_rate(ordered):
    lines = read_steps(ordered.dir)
    places = [(line["lineage"], line["step"], line["start"]) for line in lines]
    assert places == [(0, n, 0) for n in (1, 2, 3)] + [(1, n, 0) for n in (1, 2, 3, 4)] + [(3, n, 0) for n in (1, 2, 3)]
    rates = [line["lr"] for line in lines]
    assert rates[7:] == pytest.approx([rate / 2 for rate in rates[:3]])
    kept = surviving(lines)
    expected = [group.group_id for group in ordered.groups[: 3 * GROUPS_PER_STEP]]
    assert [group for step in sorted(kept) for group in kept[step]] == expected
    assert lines[7]["loss"] == lines[0]["loss"]  # the same groups from the same weights


def test_what_came_of_orders_is_known_and_outlives_a_kill(ordered):
    found = obeyed(ordered)
    assert {name: (one.step, one.lineage) for name, one in found.items()} == {
        "raise": (2, 1), "look": (2, 1), "back": (0, 2), "stop": (3, 3),
    }  # fmt: skip
    assert found["raise"].effect == "kl_beta 0.1 -> 0.15" and found["look"].effect == "checkpoint 1-0 is the best"
    assert found["back"].effect == "from step 4 back to 0, learning rate x 0.5"
    assert ordered.log.read_text().count("roll_back: ") == 1


def test_an_evaluation_is_noted_once_however_often_the_trainer_is_told(ordered):
    lines = (ordered.dir / "evaluations.jsonl").read_text().splitlines()
    assert [EvaluationResult.model_validate_json(line) for line in lines] == [LOOK]


def test_a_stop_ends_with_a_checkpoint_and_the_reason(ordered):
    assert ordered.status()["state"] == "stopped" and ordered.depth().pending == 0
    assert (ordered.dir / "stopped.txt").read_text() == "a test says so\n"
    kept = json.loads((ordered.dir / "checkpoints" / "3-3" / "state.json").read_text())
    assert (kept["orders"], kept["kl_beta"], kept["rate"]) == (4, 0.15, 0.5)


@pytest.mark.parametrize(("before", "expected"), [(0.1, 0.2), (0.3, 0.5), (0.7, 0.7)])
def test_a_raised_beta_is_capped_and_never_lowered(tmp_path, before, expected):
    chosen = recipe.parse(make_recipe(tmp_path / "model", tmp_path, kl_beta=before))
    progress = Progress()
    effect = obey(RaiseBeta(id="a", factor=2.0, cap=0.5, reason="x"), chosen, progress, None)
    assert adjusted(chosen.trainer, progress).kl_beta == pytest.approx(expected)
    assert effect == f"kl_beta {before:g} -> {expected:g}"
