"""The collapse guard at work on a real Redis: what it orders, and that neither a restart nor a roll-back blinds it."""

import asyncio
import itertools
from contextlib import asynccontextmanager
from dataclasses import dataclass

import orjson
import pytest
from fastapi import FastAPI, Request
from served import served

from services import commands, recipe
from services.commands import EvaluationResult, Obeyed, RaiseBeta, RollBack, Stop
from services.contract import Version
from services.keys import Keys
from services.orchestrator.guard import ACTIONS, BY_GUARD, COLUMNS, Guard
from services.recipe_watching import Guard as Settings
from services.redis import connect

NORMAL = {"reward": 1.0, "length": 30.0, "distinct": 0.8, "entropy": 0.9, "stopped": 0.95, "answers": 0.6, "kl": 0.01}
CASTS = {"baseline": 4, "votes": 2, "window": 3}
NAMES = itertools.count()


@dataclass
class Bench:
    guard: Guard
    keys: Keys
    client: object

    async def step(self, step: int, lineage: int = 0, start: int = 0, **values: float) -> None:
        """A step as the trainer tells it, taken by the guard."""
        await self.tell(step, lineage, start, **values)
        await self.take()

    async def tell(self, step: int, lineage: int = 0, start: int = 0, **values: float) -> None:
        row = {COLUMNS[name]: value for name, value in {**NORMAL, **values}.items()}
        line = orjson.dumps({**row, "step": step, "lineage": lineage, "start": start})
        await self.client.xadd(self.keys.steps, {"line": line})

    async def evaluate(self, step: int, lineage: int = 0, **metrics: float) -> None:
        """An evaluation that ended, taken by the guard."""
        version = Version(lineage=lineage, version=step)
        told = {"oldest": version, "newest": version, "tasks": 8, "failed": 0, "best": False, "seconds": 1.0}
        noting = asyncio.create_task(self.guard.note(EvaluationResult(version=version, metrics=metrics, **told)))
        while not noting.done():
            await self.take()
        await noting

    async def take(self) -> None:
        for row in await self.guard._read():
            await self.guard._take(row)
        self.guard._judged = self.guard._seen
        await self.guard.close()

    async def orders(self) -> list:
        return await commands.after(self.client, self.keys.run_id, 0)

    async def obey(self, order, step: int, lineage: int) -> None:
        done = Obeyed(step=step, lineage=lineage, effect="done")
        await commands.note_obeyed(self.client, self.keys.run_id, order.id, done)

    async def verdicts(self) -> list[dict]:
        found = await self.client.hgetall(self.keys.verdicts)
        return sorted((orjson.loads(body) for body in found.values()), key=lambda one: one["step"])


@asynccontextmanager
async def bench(url: str, name: str = "", kl_beta: float = 0.05, **settings):
    name = name or f"guard-{next(NAMES)}"
    tree = {
        "run": {"name": name, "dir": "runs/x"},
        "model": {"path": "m"},
        "data": {"path": "d.jsonl", "fields": {"prompt": "p"}},
        "rewards": "intuitor",
        "trainer": {"steps": 100, "groups_per_step": 1, "kl_beta": kl_beta},
    }
    async with connect(url) as client:
        guard = Guard(recipe.parse(tree), Settings(**{**CASTS, **settings}), client, asyncio.Event())
        yield Bench(guard, Keys(name), client)


async def collapse(run: Bench, first: int, last: int, lineage: int = 0, start: int = 0) -> None:
    for step in range(first, last + 1):
        await run.step(step, lineage, start, length=2.0)


async def normal(run: Bench, first: int, last: int, lineage: int = 0, start: int = 0) -> None:
    for step in range(first, last + 1):
        await run.step(step, lineage, start)


async def test_a_collapse_is_ordered_back_to_before_it_began_and_a_second_one_stops(redis_url):
    async with bench(redis_url, action="roll_back", rate_factor=0.25, again_within=10) as run:
        await normal(run, 1, 6)
        assert await run.orders() == []
        await collapse(run, 7, 8)
        (back,) = await run.orders()
        assert isinstance(back, RollBack) and back.before == 7 and back.rate_factor == 0.25
        assert "length is 2, below" in back.reason
        assert run.guard.holds(Version(version=8))  # the order is not obeyed yet
        await collapse(run, 9, 9)
        assert await run.orders() == [back]
        # The trainer went back to step 5. The steps that it makes again are judged, by the history that is left.
        await run.obey(back, step=5, lineage=1)
        await normal(run, 6, 7, lineage=1, start=5)
        assert run.guard.step == 7 and [row["step"] for row in run.guard.rows] == [1, 2, 3, 4, 5, 6, 7]
        assert run.guard.judge.raised == []
        await collapse(run, 8, 9, lineage=1, start=5)
        again = (await run.orders())[1]
        assert isinstance(again, Stop) and again.reason.startswith(
            f"{BY_GUARD}again within 10 steps of a roll-back to step 5: "
        )


async def test_of_several_alarms_the_first_step_that_was_out_counts(redis_url):
    async with bench(redis_url, action="roll_back") as run:
        await normal(run, 1, 6)
        await run.step(7, length=2.0)
        await run.step(8, distinct=0.1)
        await run.step(9, length=2.0, distinct=0.1)
        (back,) = await run.orders()
        assert back.before == 7 and {alarm.since for alarm in run.guard.judge.raised} == {7, 8}


async def test_a_later_collapse_is_ordered_back_again(redis_url):
    async with bench(redis_url, action="roll_back", again_within=10) as run:
        await normal(run, 1, 6)
        await collapse(run, 7, 8)
        await run.obey((await run.orders())[0], step=5, lineage=1)
        await normal(run, 6, 15, lineage=1, start=5)
        await collapse(run, 16, 17, lineage=1, start=5)
        second = (await run.orders())[1]
        assert isinstance(second, RollBack) and second.before == 16


async def test_a_restart_judges_the_same_history_and_tells_and_orders_nothing_twice(redis_url):
    told = []
    hook = FastAPI()

    @hook.post("/alarm")
    async def take(request: Request) -> dict:
        told.append(await request.json())
        return {}

    with served(hook) as url:
        there = {"action": "roll_back", "webhook": f"{url}/alarm"}
        async with bench(redis_url, **there) as run:
            await normal(run, 1, 6)
            await collapse(run, 7, 8)
            orders, verdicts = await run.orders(), await run.verdicts()
            name = run.keys.run_id
        assert len(orders) == 1 and [(one["signal"], one["step"], one["since"]) for one in verdicts] == [
            ("length", 8, 7)
        ]
        async with bench(redis_url, name, **there) as again:
            before = ACTIONS.labels("roll_back")._value.get()
            await again.take()
            assert ACTIONS.labels("roll_back")._value.get() == before
            assert again.guard.step == 8 and again.guard.pending == orders[0].id
            assert (await again.orders(), await again.verdicts()) == (orders, verdicts)
            await again.obey(orders[0], step=5, lineage=1)
        async with bench(redis_url, name, **there) as later:
            await later.take()
            assert later.guard.pending == ""
        assert [body["signal"] for body in told] == ["length"] and told[0]["run"] == name


async def test_a_step_that_is_told_twice_counts_once(redis_url):
    async with bench(redis_url, action="stop") as run:
        await normal(run, 1, 6)
        for _ in range(3):
            await run.step(7, length=2.0)
        assert await run.orders() == [] and len(run.guard.rows) == 7
        await run.step(8, length=2.0)
        assert [type(order) for order in await run.orders()] == [Stop]


async def test_an_alarm_that_goes_on_is_acted_on_once_a_window(redis_url):
    async with bench(redis_url, action="raise_beta", beta_factor=3.0, beta_cap=0.9) as run:
        await normal(run, 1, 6)
        await collapse(run, 7, 12)
        orders = await run.orders()
        assert [order.id for order in orders] == ["guard-0.8", "guard-0.11"]
        assert all(isinstance(order, RaiseBeta) and (order.factor, order.cap) == (3.0, 0.9) for order in orders)


async def test_without_a_kl_term_there_is_no_kl_to_judge(redis_url):
    async with bench(redis_url, action="stop", kl_beta=0.0) as run:
        for step in range(1, 9):
            await run.step(step, kl=99.0)
        assert await run.orders() == []
    async with bench(redis_url, action="stop") as run:
        for step in range(1, 3):
            await run.step(step, kl=99.0)
        assert len(await run.orders()) == 1


def evaluated(step: int, lineage: int = 0, **metrics: float) -> EvaluationResult:
    version = Version(lineage=lineage, version=step)
    return EvaluationResult(
        version=version, oldest=version, newest=version, tasks=8, failed=0, metrics=metrics, best=False, seconds=1.0
    )


async def test_a_falling_auc_of_evaluations_counts(redis_url):
    async with bench(redis_url, action="stop") as run:
        await run.evaluate(0, auc=0.9)
        await normal(run, 1, 4)
        await run.evaluate(2, length=9.0)  # nothing right: no auc
        await run.evaluate(3, auc=0.9)
        await run.evaluate(4, auc=0.5)
        assert await run.orders() == []
        await run.evaluate(6, auc=0.5)
        assert "auc is 0.5" in (await run.orders())[0].reason


async def test_a_collapse_that_begins_with_the_first_steps_shows_in_the_accuracy(redis_url):
    async with bench(redis_url, action="roll_back") as run:
        await run.evaluate(0, accuracy=0.4)
        for step in range(1, 5):
            await run.step(step, length=30.0 / step)  # such is the baseline of its length
            if step % 2 == 0:
                await run.evaluate(step, accuracy=0.1)
        (back,) = await run.orders()
        assert isinstance(back, RollBack) and back.before == 2
        assert back.reason.startswith("step 4: accuracy is 0.1, below 0.2 since step 2")


@pytest.mark.parametrize("action", ["raise_beta", "roll_back", "stop"])
async def test_an_evaluation_that_comes_late_orders_once_also_after_a_restart(redis_url, action):
    name = f"guard-late-{action}"
    async with bench(redis_url, name, action=action) as run:
        await run.evaluate(0, accuracy=0.4)
        await normal(run, 1, 12)
        await run.evaluate(2, accuracy=0.1)
        await normal(run, 13, 17)
        await run.evaluate(4, accuracy=0.1)  # thirteen steps later
        await normal(run, 18, 19)  # the order is not obeyed yet
        given = await run.orders()
        assert [order.id for order in given] == ["guard-0.4.evaluated"]
    async with bench(redis_url, name, action=action) as again:
        await again.take()
        assert await again.orders() == given
        await again.evaluate(4, accuracy=0.1)  # told twice
        assert await again.orders() == given
        assert [row["accuracy"] for row in again.guard.rows if "reward" not in row] == [0.4, 0.1, 0.1]


async def test_evaluations_that_a_roll_back_undid_do_not_count(redis_url):
    async with bench(redis_url, "guard-evaluated", action="stop") as run:
        await run.evaluate(0, accuracy=0.4)
        await normal(run, 1, 3)
        await run.evaluate(3, accuracy=0.1)
        await normal(run, 3, 5, lineage=1, start=2)
        await run.evaluate(4, 1, accuracy=0.1)
        assert await run.orders() == []
        await run.evaluate(6, 1, accuracy=0.1)
        assert len(await run.orders()) == 1


@pytest.mark.parametrize("action", ["alarm", "stop"])
async def test_a_repeatable_run_waits_for_the_judgement_only_where_it_can_change_the_run(redis_url, action):
    async with bench(redis_url, action=action) as run:
        await normal(run, 1, 3)
        assert not run.guard.holds(Version(version=3))
        assert run.guard.holds(Version(version=4)) == (action == "stop")
        await normal(run, 4, 6)
        await collapse(run, 7, 8)
        assert len(await run.verdicts()) == 1
        assert len(await run.orders()) == (action == "stop")
