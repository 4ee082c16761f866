"""Curves: every peak, small and quick, of this run and of others."""

import asyncio
import json
import time

import httpx
from console.watched import Page, Run, console
from hypothesis import given, settings
from hypothesis import strategies as st
from served import served

from services.access import HttpSettings
from services.console import history
from services.console import source as source_module
from services.console.app import create
from services.console.curves import decimate
from services.console.history import History
from services.console.source import Source, sit_down
from services.redis import connect
from services.steps import read_steps

VALUES = st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), min_size=1, max_size=300)


@given(VALUES, st.integers(1, 12))
@settings(max_examples=150)
def test_few_points_keep_every_peak(values, buckets):
    steps = [3 * place + 1 for place in range(len(values))]
    x, y = decimate(steps, values, buckets)
    if len(steps) <= 2 * buckets:
        assert (x, y) == (steps, values)
        return
    there = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
    assert x == sorted(set(x)) and set(zip(x, y, strict=True)) <= set(there)
    assert len(x) <= 2 * buckets + 2 or len(there) <= 2 * buckets
    for bucket in range(buckets):  # the slow way: look at every step of each part of the range
        width = there[-1][0] - there[0][0] + 1 if there else 1
        part = [value for step, value in there if (step - there[0][0]) * buckets // width == bucket]
        shown = [value for step, value in zip(x, y, strict=True) if (step - there[0][0]) * buckets // width == bucket]
        if part:
            assert (min(part), max(part)) == (min(shown), max(shown))


def test_thousands_of_steps_stay_small_and_quick(run):
    with run.redis.pipeline() as pipe:
        for step in range(1, 20_001):
            row = {"step": step, "lineage": 0, "start": 0, **{f"components.c{n}": step % 7 + n for n in range(8)}}
            pipe.xadd(run.keys.steps, {"line": json.dumps(row)})
        pipe.execute()
    with console(run) as client:
        client.get("/console/curves")
        began = time.process_time()  # the console is served by a thread of this process
        answer = client.get("/console/curves")
        assert time.process_time() - began < 5
    found = answer.json()
    assert found["step"] == 20_000 and len(answer.content) < 200_000
    assert [chart["field"] for chart in found["charts"]] == [f"components.c{n}" for n in range(8)]
    x, y = found["runs"][0]["curves"]["components.c0"]
    assert (x[0], x[-1]) == (1, 20_000) and (min(y), max(y)) == (0, 6)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), max_size=6))
@settings(max_examples=25)
def test_what_survives_is_what_the_file_says(redis_server, tmp_path_factory, story):
    """A story of lineages: each goes on from a step of what was there, and makes some."""
    run, lines, top = Run(redis_server.url), [], 0
    told = History(connect(run.url), run.name)

    async def tell():
        nonlocal top
        for lineage, (back, count) in enumerate(story):
            start = max(0, top - back)
            for step in range(start + 1, start + count + 1):
                lines.append(run.step(step, lineage, start, marker=lineage * 100 + step))
            top = start + count
            await told.refresh()
        await told.redis.aclose()

    asyncio.run(tell())
    run.redis.close()
    if not lines:
        assert told.rows == {} and told.last is None
        return
    path = tmp_path_factory.mktemp("steps") / "steps.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [told.rows[step] for step in sorted(told.rows)] == read_steps(path)
    lost = sum(1 for lineage, (back, _) in enumerate(story) if lineage and back and story[lineage - 1])
    assert (told.undone > 0) <= (lost > 0)


def test_other_runs_are_laid_over_and_only_those_on_offer(run, redis_url, tmp_path):
    other = Run(redis_url)
    other.step(1, entropy=9.0)
    for name in ("mine", "beside"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "steps.jsonl").write_text(
            json.dumps({"step": 1, "lineage": 0, "start": 0, "reward_mean": 5.0}) + "\n"
        )
    (tmp_path / "secret.jsonl").write_text("no steps")
    run.step(1)
    source = Source(run.url, run.name, run_dir=tmp_path / "mine")
    with served(create(source, HttpSettings())) as url, httpx.Client(base_url=url, timeout=30) as client:
        page = Page(client.get("/").text)
        offered = [found["value"] for tag, found in page.elements if found.get("name") == "over"]
        assert "beside" in offered and other.name in offered and "mine" not in offered and run.name not in offered
        query = [("over", name) for name in ("beside", other.name, "..", "mine", "nobody")]
        found = client.get("/console/curves", params=query).json()
    assert [one["name"] for one in found["runs"]] == [run.name, "beside", other.name]
    assert found["runs"][1]["curves"]["reward_mean"] == [[1], [5.0]]
    other.redis.close()


def test_the_pace_can_be_told_while_steps_arrive(run, monkeypatch):
    def slowly(rows, row):
        lost = keep(rows, row)
        time.sleep(0.005)
        return lost

    keep = history.keep
    monkeypatch.setattr(history, "keep", slowly)
    for step in range(1, 21):
        run.step(step)

    async def ask():
        redis = connect(run.url)
        told = History(redis, run.name)
        reading = asyncio.create_task(told.refresh())
        while not reading.done():
            assert told.pace() is None or told.last["step"] in told.times
            await asyncio.sleep(0)
        await reading
        await redis.aclose()

    asyncio.run(ask())


def test_the_runs_looked_at_last_stay_in_memory(run, monkeypatch):
    monkeypatch.setattr(source_module, "MOST_HISTORIES", 2)

    async def ask():
        desk = sit_down(run.source())
        for name in ("a", None, "b", "a", "c"):
            await desk.history(name)
        await desk.close()
        return set(desk.histories)

    assert asyncio.run(ask()) == {run.name, "a", "c"}
