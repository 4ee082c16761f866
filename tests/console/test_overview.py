"""Where the run stands, at first sight, in events and where redis is away."""

import asyncio
import json
import time

import httpx
import pytest
from console.watched import SPEC, Page, console, events
from scored_groups import make_groups
from served import served

from services.access import HttpSettings
from services.console import curves, history, live, pages, samples
from services.console import overview as overview_module
from services.console import source as source_module
from services.console.app import create
from services.console.history import History
from services.console.overview import duration, guard, words
from services.console.source import Source, sit_down
from services.problem import Problem
from services.redis import DeadlineExceeded


@pytest.mark.parametrize(
    "trainer, orchestrator, paused, said, tone",
    [
        ({}, {}, False, "nothing is known", "plain"),
        ({"state": "done"}, {"state": "finished"}, False, "finished", "good"),
        ({"state": "stopped"}, {"state": "running"}, False, "stopped, with a checkpoint", "plain"),
        ({"state": "training"}, {"state": "running"}, False, "training", "good"),
        ({"state": "waiting"}, {"state": "running"}, False, "making groups", "good"),
        ({"state": "waiting"}, {"state": "running"}, True, "paused", "plain"),
        ({"state": "waiting"}, {"state": "failed", "reason": "no luck"}, False, "failed: no luck", "bad"),
        ({"state": "training", "at": 1.0}, {"state": "running", "at": 1.0}, False, "silent for", "bad"),
    ],
)
def test_the_state_in_words(trainer, orchestrator, paused, said, tone):
    now = time.time()
    trainer, orchestrator = ({"at": now, **fields} if fields else {} for fields in (trainer, orchestrator))
    found = words(trainer, orchestrator, paused)
    assert found[0].startswith(said) and found[1] == tone


def test_the_guard_in_words():
    state = {"judged": 3, "baseline": 10, "action": "roll_back", "alarms": []}
    verdict = {"message": "step 8: length is 2", "at": 1.0}
    assert guard({}, []).words.startswith("It is off")
    assert "(3 of 10 steps)" in guard({"guard": state}, []).words
    fine = guard({"guard": {**state, "judged": 30}}, [verdict])
    assert fine.tone == "good" and "up to step 30" in fine.words and fine.told == ("step 8: length is 2",)
    alarm = guard({"guard": {**state, "judged": 30, "alarms": ["step 30: kl"]}}, [])
    assert alarm.tone == "bad" and alarm.alarms == ("step 30: kl",) and "takes the run back" in alarm.words
    assert [duration(seconds) for seconds in (None, 5, 65, 3700)] == ["\u2013", "5 s", "1 min 05 s", "1 h 01 min"]


def test_the_overview_shows_where_the_run_stands(run):
    for step in (1, 2):
        run.step(step, staleness_mean=0.5, staleness_max=1)
    run.keep(make_groups(1))
    with console(run) as client:
        page = Page(client.get("/").text)
        assert client.get("/healthz").status_code == 200
    text = " ".join(page.text.split())
    for said in ("Training", "2 of 10", "at most 1", "1234 tok/s", "1.25 per s", "It is off"):
        assert said in text, said


@pytest.fixture
def away(tmp_path, monkeypatch):
    """A run whose redis is away, and pages that wait for it a little."""
    for module in (history, samples, source_module, overview_module, curves):
        monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.4)
    return Source(f"unix://{tmp_path}/none.sock", "x", ("http://127.0.0.1:9",))


def test_a_redis_that_is_away_is_said(away):
    with served(create(away, HttpSettings())) as url:
        for path in ("/", "/console/samples", "/console/dead", "/console/control"):
            answer = httpx.get(url + path, timeout=30)
            assert answer.status_code == 503 and "redis did not answer" in answer.text
        assert httpx.get(url + "/console/curves", timeout=30).status_code == 503
        answer = httpx.put(url + "/v1/run/spec", json=SPEC.model_dump(mode="json"), timeout=30)
        assert answer.status_code == 503 and "redis did not answer" in answer.text


def test_a_redis_that_goes_while_a_page_is_made_is_said(away, monkeypatch):
    async def look(desk):
        return overview_module._blank(desk.run_id, "")

    monkeypatch.setattr(pages, "look", look)
    with served(create(away, HttpSettings())) as url:
        answer = httpx.get(url, timeout=30)
    assert answer.status_code == 503 and "redis did not answer" in answer.text


def test_open_pages_wait_for_redis_once_together(away, monkeypatch):
    waits, refresh = [], History.refresh

    async def counted(self):
        waits.append(self.run_id)
        await refresh(self)

    monkeypatch.setattr(History, "refresh", counted)

    async def ask():
        desk = sit_down(away)
        gone = asyncio.create_task(desk.history())
        asking = [asyncio.create_task(desk.history(name)) for name in (None, "other") for _ in range(8)]
        await asyncio.sleep(0.05)
        gone.cancel()  # a page that is left takes nothing from the others
        found = await asyncio.gather(*asking, return_exceptions=True)
        await desk.close()
        return found

    assert {type(one) for one in asyncio.run(ask())} == {DeadlineExceeded}
    assert sorted(waits) == sorted(["other", away.run_id])


def test_events_bring_state_and_steps(run, monkeypatch):
    monkeypatch.setattr(live, "EVERY_SECONDS", 0.1)
    run.step(1)
    with console(run) as client:
        heard = events(client, since=0)
        name, state = next(heard)
        assert name == "state" and "2 <small>of 10</small>" in state["html"]
        assert next(heard) == ("rows", {"rows": [json.loads(run.redis.xrange(run.keys.steps)[0][1][b"line"])]})
        run.step(2)
        run.step(3, reward_mean=7.0)
        found = [row for name, data in [next(heard), next(heard)] if name == "rows" for row in data["rows"]]
        assert found and found[-1]["step"] in (2, 3)
        run.step(2, lineage=1, start=1)
        while (got := next(heard))[0] != "again":
            assert got[0] in ("rows", "state")
        assert got[1] == {"step": 2}
        heard.close()


def test_only_so_many_pages_are_kept_up_to_date(run, monkeypatch):
    monkeypatch.setattr(live, "MOST_STREAMS", 1)
    with console(run) as client:
        heard = events(client)
        next(heard)
        refused = client.get("/console/events")
        assert refused.status_code == 429 and "Retry-After" in refused.headers
        heard.close()


def test_places_are_counted_when_given_and_come_back(run, monkeypatch):
    monkeypatch.setattr(live, "MOST_STREAMS", 1)

    async def leave():
        return {"type": "http.disconnect"}

    async def send(_):
        await asyncio.sleep(60)

    async def ask():
        desk = sit_down(run.source())
        answer = await live.stream(desk, 0, 0, str)
        with pytest.raises(Problem):
            await live.stream(desk, 0, 0, str)
        await answer({"type": "http"}, leave, send)  # it is left before anything was sent
        await live.stream(desk, 0, 0, str)
        await desk.close()

    asyncio.run(ask())
