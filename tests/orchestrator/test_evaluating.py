"""Evaluation beside training, and the collapse guard's orders."""

import json
import time
from types import SimpleNamespace

import pytest
from orchestrator.by_hand import PER_STEP, STEPS, Trainer, answer, go_back, obey, over, running, tell

from services import commands
from services.contract import Version
from services.keys import Keys
from services.orchestrator.evaluation import Evaluator
from services.redis import connect

pytestmark = pytest.mark.alone


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


def a_result(step: int, lineage: int = 1, **metrics: float) -> commands.EvaluationResult:
    none = {"oldest": None, "newest": None, "tasks": 0, "failed": 0, "best": False, "seconds": 0}
    return commands.EvaluationResult(version=Version(lineage=lineage, version=step), metrics=metrics, **none)


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


async def test_what_was_undone_while_nobody_was_here_is_forgotten_later(make_recipe, clean):
    """The trainer went back to step 2 and made steps 3 to 5 again; one of them was evaluated."""
    async with connect(clean.url) as client:
        evaluator = evaluator_of(make_recipe, client, best="length")
        for result in (
            *(a_result(step, lineage=0, length=float(step)) for step in (0, 2, 4, 5, 6)),
            a_result(5, length=0.5),
        ):
            await client.hset(evaluator.keys.evaluations, str(result.version), result.model_dump_json())
        for step, lineage, start in ((3, 0, 0), (6, 0, 0), (3, 1, 2), (5, 1, 2)):
            line = json.dumps({"step": step, "lineage": lineage, "start": start})
            await client.xadd(evaluator.keys.steps, {"line": line})
        await evaluator.load()
        await evaluator.forget(Version(lineage=1, version=5), floor=1)
        assert {step: result.version.lineage for step, result in evaluator.results.items()} == {0: 0, 2: 0, 5: 1}
        assert not evaluator._is_best({"length": 1.0}) and evaluator._is_best({"length": 3.0})


async def test_a_roll_back_forgets_what_it_undid_alone(make_recipe, clean):
    async with connect(clean.url) as client:
        evaluator = evaluator_of(make_recipe, client)
        for step in (0, 2, 4):
            await evaluator._note(a_result(step, lineage=0))
        await evaluator.forget(Version(lineage=1, version=2), floor=1)
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
