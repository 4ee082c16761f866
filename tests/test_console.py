"""The console over real HTTP, redis and reward server: what it shows is what is there, to those who may see it."""

import asyncio
import json
import math
import random
import time
import uuid
from contextlib import contextmanager
from html.parser import HTMLParser

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scored_groups import make_groups
from served import served

from reward_server import app as reward_app
from services import pause
from services.access import HttpSettings
from services.api import CompletionText, RewardGroup
from services.clients import RewardClient
from services.commands import Stop, parse
from services.console import curves, history, live, pages, preview, samples
from services.console import overview as overview_module
from services.console import source as source_module
from services.console.app import create
from services.console.curves import decimate
from services.console.history import History
from services.console.overview import duration, guard, words
from services.console.pages import ASSETS, PATHS
from services.console.report import write
from services.console.source import Source, sit_down
from services.contract import Score, Task, Version
from services.keys import Keys
from services.problem import Problem
from services.queue import GroupQueue
from services.redis import DeadlineExceeded, connect, connect_sync
from services.spec import RewardSpec
from services.steps import read_steps

HOSTILE = "\"'></pre></td></script><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 * 7 }}"
SPEC = RewardSpec.model_validate(
    {"rewards": [{"name": "length"}, {"name": "exact_match", "weight": 0.5, "sources": ["quiz"]}]}
)
API, ADMIN = {"Authorization": "Bearer api-token"}, {"Authorization": "Bearer admin-token"}
PAGES = ("/", "/console/samples", "/console/group?entry=1-1", "/console/dead", "/console/control")
DATA = ("/console/curves", "/console/events")


class Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


class Run:
    """A run's redis as its services would leave it."""

    def __init__(self, url: str):
        self.url, self.name = url, f"console-{uuid.uuid4().hex[:12]}"
        self.keys, self.redis = Keys(self.name), connect_sync(url)

    def step(self, step: int, lineage: int = 0, start: int = 0, **numbers) -> dict:
        row = {"step": step, "lineage": lineage, "start": start, "reward_mean": step / 10, "kl": None, **numbers}
        self.redis.xadd(self.keys.steps, {"line": json.dumps(row)})
        return row

    def status(self, **services: dict) -> None:
        for service, fields in services.items():
            self.redis.hset(self.keys.status, service, json.dumps({"at": time.time(), **fields}))

    def keep(self, groups) -> None:
        async def push():
            redis = connect(self.url)
            queue = GroupQueue(redis, self.name)
            for group in groups:
                await queue.keep(group, 1000)
            await redis.aclose()

        asyncio.run(push())

    def bury(self, *letters) -> None:
        async def push():
            redis = connect(self.url)
            queue = GroupQueue(redis, self.name)
            for index, reason in letters:
                await queue.bury(f"group-{index}", index, reason)
            await redis.aclose()

        asyncio.run(push())

    def source(self, *rewards: str) -> Source:
        return Source(self.url, self.name, rewards)


@pytest.fixture
def run(redis_url):
    made = Run(redis_url)
    made.status(
        trainer={"state": "training", "step": 2, "steps": 10, "tokens_per_second": 1234.5},
        orchestrator={"state": "running", "spec": "mine", "groups_per_second": 1.25, "guard": None},
    )
    yield made
    made.redis.close()


@contextmanager
def console(run, *rewards, http=None):
    with (
        served(create(run.source(*rewards), http or HttpSettings())) as url,
        httpx.Client(base_url=url, timeout=30) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def reward_url():
    with served(reward_app.create(reward_app.Settings(verifier_workers=1))) as url:
        yield url


def scored_by_server(url: str, count: int = 6):
    """Groups whose scores a real reward server gave, by SPEC under the name `mine`."""
    rng = random.Random(3)
    plain = make_groups(count, seed=3, size=4)

    async def score():
        async with RewardClient(url) as client:
            await client.put_spec("mine", SPEC)
            tasks = [
                Task(task_id=str(n), source="quiz" if n % 2 else "other", prompt="2+2?", reference={"answer": "4"})
                for n in range(count)
            ]
            texts = [["4" if rng.random() < 0.5 else "5" * rng.randint(1, 9) for _ in range(4)] for _ in range(count)]
            bodies = [
                RewardGroup(
                    group_id=group.group_id,
                    task=task,
                    completions=[CompletionText(text=t, finish_reason="stop", token_ids=[1] * len(t)) for t in said],
                )
                for group, task, said in zip(plain, tasks, texts, strict=True)
            ]
            answers = (await client.rewards(bodies, "mine")).groups
        for group, task, said, answer in zip(plain, tasks, texts, answers, strict=True):
            made = [c.model_copy(update={"text": text}) for c, text in zip(group.completions, said, strict=True)]
            update = {"task": task, "completions": made, "scores": answer.scores, "spec_id": answer.spec_id}
            yield group.model_copy(update=update)

    async def collect():
        return [group async for group in score()]

    return asyncio.run(collect())


# ---- curves --------------------------------------------------------------------------------------------------------

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
        began = time.monotonic()
        answer = client.get("/console/curves")
        assert time.monotonic() - began < 5
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


# ---- state ---------------------------------------------------------------------------------------------------------


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


def test_open_pages_wait_for_redis_once_together(away):
    async def ask():
        desk = sit_down(away)
        gone = asyncio.create_task(desk.history())
        asking = [asyncio.create_task(desk.history(name)) for name in (None, "other") for _ in range(8)]
        await asyncio.sleep(0.05)
        gone.cancel()  # a page that is left takes nothing from the others
        found = await asyncio.gather(*asking, return_exceptions=True)
        await desk.close()
        return found

    began = time.monotonic()
    assert {type(one) for one in asyncio.run(ask())} == {DeadlineExceeded}
    assert time.monotonic() - began < 3 * 0.4


def test_the_runs_looked_at_last_stay_in_memory(run, monkeypatch):
    monkeypatch.setattr(source_module, "MOST_HISTORIES", 2)

    async def ask():
        desk = sit_down(run.source())
        for name in ("a", None, "b", "a", "c"):
            await desk.history(name)
        await desk.close()
        return set(desk.histories)

    assert asyncio.run(ask()) == {run.name, "a", "c"}


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


def events(client, **query):
    """Named events of the stream, in order: (name, data)."""
    with client.stream("GET", "/console/events", params=query) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        name = ""
        for line in answer.iter_lines():
            if line.startswith("event: "):
                name = line[7:]
            elif line.startswith("data: "):
                yield name, json.loads(line[6:])


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


# ---- samples -------------------------------------------------------------------------------------------------------


def test_samples_are_filtered_sorted_and_paged(run):
    groups = [
        group.model_copy(update={"task": Task(task_id="t", source=f"s{group.index % 3}", prompt=f"p{group.index}")})
        for group in make_groups(70, version=4)
    ]
    run.keep(groups)

    def mean(group):
        rewards = [score.reward for score in group.scores if score.reward is not None]
        return sum(rewards) / len(rewards) if rewards else None

    def listed(client, **query):
        page = Page(client.get("/console/samples", params=query).text)
        shown = " ".join(page.text.split())
        links = [
            found["href"] for tag, found in page.elements if (found.get("href") or "").startswith("/console/group")
        ]
        return shown, links

    order = [entry.decode() for entry, _ in run.redis.xrange(run.keys.samples)]
    by_entry = dict(zip(order, groups, strict=True))
    with console(run) as client:
        shown, links = listed(client)
        assert "70 of the 70 groups" in shown and "page 1 of 3" in shown
        assert [link.split("=")[1] for link in links] == order[::-1][: samples.PAGE]
        _, last = listed(client, page="3")
        assert len(last) == 70 - 2 * samples.PAGE
        for query, takes in {
            ("source", "s1"): lambda group: group.task.source == "s1",
            ("from", "0.5"): lambda group: mean(group) is not None and mean(group) >= 0.5,
            ("to", "0.3"): lambda group: mean(group) is not None and mean(group) <= 0.3,
            ("outcome", "timeout"): lambda group: any(
                part.outcome == "timeout" for score in group.scores for part in score.components.values()
            ),
            ("version", "4"): lambda group: True,
            ("version", "5"): lambda group: False,
        }.items():
            shown, _ = listed(client, **dict([query]))
            assert f"{sum(map(takes, groups))} of the 70 groups" in shown, query
        _, links = listed(client, sort="reward", source="s2")
        rewards = [mean(by_entry[link.split("=")[1]]) for link in links]
        known = [reward for reward in rewards if reward is not None]
        assert known == sorted(known, reverse=True) and rewards[: len(known)] == known
        for nonsense in ({"page": "x"}, {"page": "9" * 30}, {"sort": "?"}, {"from": "nan"}, {"entry": "\u0663"}):
            assert client.get("/console/samples", params=nonsense).status_code == 200
        for entry in ("", "1-1", "\u0663-1", "x", "9" * 30 + "-1", "- +"):
            assert client.get("/console/group", params={"entry": entry}).status_code == 404


def test_kept_groups_are_bounded_and_forgotten(run, redis_url):
    groups = make_groups(12)

    async def story():
        redis = connect(redis_url)
        queue, kept = GroupQueue(redis, run.name), samples.Samples(redis, run.name)
        for group in groups[:8]:
            await queue.keep(group, 5)
        first = await kept.page(samples.Choice(sort="oldest"))
        for group in groups[8:]:
            await queue.keep(group, 5)
        second = await kept.page(samples.Choice(sort="oldest"))
        newest = await kept.last(2)
        await redis.aclose()
        return first, second, newest

    first, second, newest = asyncio.run(story())
    assert [line.index for line in first.lines] == [3, 4, 5, 6, 7]
    assert [line.index for line in second.lines] == [7, 8, 9, 10, 11]
    assert [group.group_id for group in newest] == [group.group_id for group in groups[:-3:-1]]


def test_a_group_is_shown_side_by_side(run):
    (group,) = make_groups(1, seed=5)
    run.keep([group])
    run.redis.xadd(run.keys.samples, {"group": b"\xc1"})  # of another version, say
    entry = run.redis.xrange(run.keys.samples)[0][0].decode()
    with console(run) as client:
        page = Page(client.get("/console/group", params={"entry": entry}).text)
        shaded = client.get("/console/group", params={"entry": entry, "shade": "true"}).text
    text = " ".join(page.text.replace("\u2212", "-").split())
    squeezed = text.replace(" ", "")
    for completion, score in zip(group.completions, group.scores, strict=True):
        assert f"Endedby{completion.finish_reason}Tokens{len(completion.token_ids)}" in squeezed
        assert (f"{score.advantage:.3f}" if score.valid else "not valid") in text
        assert completion.text in text
    assert [tag for tag, _ in page.elements].count("article") == len(group.completions)
    assert "No reward server is known here" in shaded


def test_hostile_and_huge_text_stays_text(run):
    (group,) = make_groups(1)
    hostile = Score.failed("error", HOSTILE)
    named = {HOSTILE[:60]: hostile}
    scores = [score.model_copy(update={"components": named}) for score in group.scores]
    made = [one.model_copy(update={"text": HOSTILE + "x" * 10**6}) for one in group.completions]
    task = Task(task_id=HOSTILE, source=HOSTILE, prompt=HOSTILE + "y" * 10**6, reference={"answer": HOSTILE})
    update = {"completions": made, "scores": scores, "task": task, "spec_id": HOSTILE, "skipped": HOSTILE}
    run.keep([group.model_copy(update=update)])
    run.bury((3, HOSTILE + "z" * 10**6))
    run.status(orchestrator={"state": HOSTILE, "spec": HOSTILE, "guard": None})
    run.redis.hset(run.keys.verdicts, "v", json.dumps({"message": HOSTILE, "at": 1}))
    run.step(1, **{f"components.{HOSTILE}": 1.0})
    entry = run.redis.xrange(run.keys.samples)[0][0].decode()
    paths = ["/", "/console/samples", f"/console/group?entry={entry}", "/console/dead", "/console/control"]
    with console(run) as client:
        for path in paths:
            answer = client.get(path)
            page = Page(answer.text)
            assert answer.status_code == 200 and len(answer.content) < 400_000, path
            assert not [found for _, found in page.elements if "onerror" in found or found.get("src") == "x"], path
            scripts = [found for tag, found in page.elements if tag == "script"]
            assert all((found["src"] or "").startswith("/console/") for found in scripts), path
            assert "alert(1)" in page.text or path.endswith("control"), path
            policy = answer.headers["content-security-policy"]
            assert "unsafe" not in policy and "default-src 'none'" in policy and "http" not in policy
        name, state = next(events(client))
        assert not [tag for tag, _ in Page(state["html"]).elements if tag in ("script", "img")]


# ---- who may see and do what -----------------------------------------------------------------------------------------

GUARDED = HttpSettings(api_token="api-token", admin_token="admin-token")
CHANGES = [
    ("POST", "/v1/run/pause", None),
    ("POST", "/v1/run/resume", None),
    ("POST", "/v1/run/stop", None),
    ("PUT", "/v1/run/spec", SPEC.model_dump(mode="json")),
    ("POST", "/v1/run/dead/1-1/retry", None),
]


def test_nothing_is_shown_without_the_token(run):
    run.step(1)
    with console(run, http=GUARDED) as client:
        for path in PAGES:
            answer = client.get(path)
            assert (
                answer.status_code == 401 and 'name="token"' in answer.text and run.name not in Page(answer.text).text
            )
        for path in DATA:
            assert client.get(path).status_code == 401
        assert client.post("/console/preview", json=SPEC.model_dump(mode="json")).status_code == 401
        for name in ASSETS:
            assert client.get(f"/console/{name}").status_code == 200
        wrong = client.post("/console/session", data={"token": "api-tokem"})
        assert wrong.status_code == 401 and "not the one" in wrong.text
        right = client.post("/console/session", data={"token": "api-token"})
        assert right.status_code == 303 and "api-token" not in right.headers["set-cookie"]
        assert client.get("/").status_code == 200 and client.get("/console/curves").status_code == 200
        assert client.post("/console/session", data={"end": "1"}).status_code == 303
        client.cookies.clear()
        assert client.get("/", headers=API).status_code == 200
    assert {path.partition("?")[0] for path in (*PAGES, *DATA)} <= PATHS


def test_only_the_admin_token_changes_the_run(run):
    with console(run, http=GUARDED) as client:
        client.post("/console/session", data={"token": "admin-token"})
        for method, path, body in CHANGES:
            for headers, status in [({}, 401), (API, 403), ({"Authorization": "Bearer wrong"}, 401)]:
                answer = client.request(method, path, json=body, headers=headers)
                assert answer.status_code == status, (path, headers)
            foreign = client.request(method, path, json=body, headers={**ADMIN, "Origin": "http://evil.example"})
            assert foreign.status_code == 403 and "another site" in foreign.text
    assert not run.redis.exists(run.keys.pause, run.keys.commands, run.keys.retried)


def test_on_loopback_other_sites_pages_are_refused(run):
    """Without tokens the machine's own user may do all; what his browser is told to do by others is refused."""
    with console(run) as client:
        for method, path, body in [*CHANGES, ("POST", "/console/preview", {})]:
            for origin in ("http://evil.example", "http://[", "null"):
                assert client.request(method, path, json=body, headers={"Origin": origin}).status_code == 403
            assert client.request(method, path, json=body, headers={"Host": "evil.example"}).status_code == 421
        for path in (*PAGES, *DATA):
            assert client.get(path, headers={"Host": "evil.example"}).status_code == 421
        assert client.post("/console/preview", content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 415
        own = {"Origin": str(client.base_url).rstrip("/")}
        assert client.post("/v1/run/pause", headers=own).status_code == 204


def test_no_token_reaches_the_log(run, caplog):
    caplog.set_level("DEBUG")
    with console(run, http=GUARDED) as client:
        client.post("/console/session", data={"token": "admin-token"})
        client.post("/v1/run/pause", headers=ADMIN)
        client.post("/v1/run/resume", headers=API)
        client.get("/")
    assert "is paused from the console" in caplog.text
    assert "admin-token" not in caplog.text and "api-token" not in caplog.text


# ---- control -------------------------------------------------------------------------------------------------------


def test_pause_resume_and_stop_are_written_for_those_who_obey(run):
    async def read():
        redis = connect(run.url)
        found = await pause.read(redis, run.name)
        await redis.aclose()
        return found

    with console(run) as client:
        assert asyncio.run(read()) == pause.Pause()
        assert client.post("/v1/run/pause").status_code == 204
        found = asyncio.run(read())
        assert found.paused and abs(found.at - time.time()) < 60 and found.excuses(0.001)
        assert "Paused" in client.get("/").text
        client.post("/v1/run/resume")
        found = asyncio.run(read())
        assert not found.paused and found.excuses(60) and not found.excuses(0)
        for said in ({}, {"state": "stopped", "lineage": 0}, {"state": "done", "lineage": 0}):
            run.status(trainer=said)
            assert client.post("/v1/run/stop").status_code == 409
        long_ago = time.time() - 300
        for orchestrator, said in [({"at": long_ago}, "the orchestrator 5 min 0"), ({"at": time.time()}, None)]:
            run.status(trainer={"state": "training", "lineage": 0, "at": long_ago}, orchestrator=orchestrator)
            answer = client.post("/v1/run/stop")
            assert answer.status_code == (409 if said else 202) and (said or "with a checkpoint") in answer.text
            assert "the trainer was last heard of 5 min 0" in answer.text
        for lineage in (1, 2):  # stopped, and resumed at the same step
            run.status(trainer={"state": "waiting", "lineage": lineage, "step": 3})
            assert client.post("/v1/run/stop").status_code == client.post("/v1/run/stop").status_code == 202
    orders = [parse(body) for body in run.redis.lrange(run.keys.commands, 0, -1)]
    assert len(orders) == 3 and all(isinstance(order, Stop) for order in orders)
    assert {order.reason for order in orders} == {"from the console"}


def test_a_dead_letter_is_made_again_once(run):
    run.bury((7, "422 Too long"), (8, "no"))
    run.redis.xadd(run.keys.dead, {"id": "?", "index": 0, "group": b"", "reason": "damaged"})
    entries = [entry.decode() for entry, _ in run.redis.xrange(run.keys.dead)]
    with console(run) as client:
        page = client.get("/console/dead").text
        assert "422 Too long" in page and f"/v1/run/dead/{entries[0]}/retry" in page
        assert client.post(f"/v1/run/dead/{entries[0]}/retry").json() == {"index": 7}
        run.redis.set(run.keys.room, 0)
        assert client.post(f"/v1/run/dead/{entries[0]}/retry").json() == {"index": 7}, "the first answer was lost"
        refused = client.post(f"/v1/run/dead/{entries[1]}/retry")
        assert refused.status_code == 409 and "takes no more groups" in refused.text
        assert client.post(f"/v1/run/dead/{entries[2]}/retry").status_code == 409
        for nonsense in ("x", "1-x", "9" * 40):
            assert client.post(f"/v1/run/dead/{nonsense}/retry").status_code == 404
        assert "422 Too long" not in client.get("/console/dead").text
    assert run.redis.lrange(run.keys.retried, 0, -1) == [b"7"]
    assert run.redis.hkeys(run.keys.pushed) == [b"group-8"]


def test_a_spec_of_no_name_is_not_asked_for(run):
    run.status(orchestrator={"state": "starting"})
    with console(run, "http://127.0.0.1:9") as client:
        page = client.get("/console/control")
    assert page.status_code == 200 and "its orchestrator has not reported yet" in page.text


def test_a_spec_is_previewed_and_applied(run, reward_url):
    groups = scored_by_server(reward_url)
    run.keep(groups)
    changed = SPEC.model_copy(
        update={"rewards": [SPEC.rewards[0].model_copy(update={"weight": -1.0}), SPEC.rewards[1]]}
    )
    with console(run, reward_url) as client:
        assert "exact_match" in client.get("/console/control").text
        same = client.post("/console/preview", json=SPEC.model_dump(mode="json"))
        assert same.status_code == 200, same.text
        text = " ".join(Page(same.text).text.split())
        assert f"last {len(groups)} groups, {4 * len(groups)} completions" in text and SPEC.spec_id in text
        assert "1.00 correlation" in text and "0.0 %" in text and "0.000 on average" in text
        other = " ".join(Page(client.post("/console/preview", json=changed.model_dump(mode="json")).text).text.split())
        assert "1.00 correlation" not in other and changed.spec_id in other

        def field_of(body, status=422):
            answer = client.post("/console/preview", content=body, headers={"Content-Type": "application/json"})
            assert answer.status_code == status, answer.text
            return answer.json()["errors"][0]["field"] if "errors" in answer.json() else None

        assert field_of(b"{") == "spec"
        assert field_of(b'{"rewards": []}') == "rewards"
        assert field_of(b'{"rewards": [{"name": "nobody"}]}') == "spec.rewards[0].name"
        field_of(b" " * 70_000, 413)
        new = {
            "rewards": [{"name": "length"}, {"name": "repetition"}, {"name": "exact_match", "params": {"regex": "(5)"}}]
        }
        assert "exact_match, repetition" in client.post("/console/preview", json=new).text

        put = client.put("/v1/run/spec", json=changed.model_dump(mode="json"))
        assert put.status_code == 200 and put.json()["spec_id"] == changed.spec_id and put.json()["name"] == "mine"
        assert client.put("/v1/run/spec", json={"rewards": [{"name": "nobody"}]}).status_code == 422
    assert httpx.get(f"{reward_url}/v1/specs/mine").json()["spec_id"] == changed.spec_id


def test_what_an_unknown_spec_measured_does_not_count(run, reward_url):
    groups = [group.model_copy(update={"spec_id": "0" * 16}) for group in scored_by_server(reward_url, 2)]
    run.keep(groups)
    with console(run, reward_url) as client:
        page = client.post("/console/preview", json=SPEC.model_dump(mode="json"))
    assert page.status_code == 200 and "exact_match, length" in page.text


def applied(run, urls, name):
    async def ask():
        desk = sit_down(run.source(*urls))
        try:
            return await preview.apply(desk, name, SPEC)
        finally:
            await desk.close()

    return asyncio.run(ask())


def test_servers_that_share_a_store_get_one_version(run, reward_url):
    urls = (reward_url, reward_url.replace("127.0.0.1", "localhost"))
    name = run.name  # fresh
    assert [applied(run, urls, name), applied(run, urls, name)] == [1, 2]
    assert httpx.get(f"{reward_url}/v1/specs/{name}").json()["spec_id"] == SPEC.spec_id


def test_servers_that_did_not_get_the_spec_are_named(run, reward_url):
    nobody = "http://127.0.0.1:9"
    with served(reward_app.create(reward_app.Settings(verifier_workers=1))) as third:
        with pytest.raises(Problem) as caught:
            applied(run, (reward_url, nobody, third), "partly")
        for url in (reward_url, third):
            assert httpx.get(f"{url}/v1/specs/partly").json()["spec_id"] == SPEC.spec_id
        with pytest.raises(Problem, match="does not answer"):
            applied(run, (nobody, third), "nowhere")
        assert httpx.get(f"{third}/v1/specs/nowhere").status_code == 404
    assert caught.value.status == 503
    there, _, missing = caught.value.detail.partition("not (")
    assert reward_url in there and third in there and nobody in missing and third not in missing


def test_a_preview_is_what_scoring_would_have_said(reward_url):
    """Advantages of any spec over the same components, recombined and scored."""
    groups = scored_by_server(reward_url, 8)
    specs = [
        SPEC,
        {"rewards": [{"name": "length", "weight": -0.3}, {"name": "exact_match"}], "combine": {"normalize": "rank"}},
        {"rewards": [{"name": "exact_match", "sources": ["quiz"]}], "combine": {"skip_unanimous": "exact_match"}},
        {
            "rewards": [
                {"name": "length", "gate": {"reward": "exact_match", "at_least": 1}},
                {"name": "exact_match", "weight": 2.0, "clip": [0.0, 0.5]},
            ],
            "combine": {"order": "sum_then_normalize"},
        },
    ]
    for body in specs:
        spec = RewardSpec.model_validate(body)
        httpx.put(f"{reward_url}/v1/specs/tried", json=spec.model_dump(mode="json")).raise_for_status()

        async def ask():
            async with RewardClient(reward_url) as client:
                bodies = [
                    RewardGroup(
                        group_id=group.group_id,
                        task=group.task.model_copy(update={"source": "quiz"}),
                        completions=[
                            CompletionText(text=made.text, finish_reason="stop", token_ids=[1] * len(made.text))
                            for made in group.completions
                        ],
                    )
                    for group in groups
                ]
                measured = (await client.rewards(bodies, "mine")).groups
                scored = (await client.rewards(bodies, "tried")).groups
                kept = [
                    {
                        "group_id": one.group_id,
                        "source": "quiz",
                        "size": 4,
                        "components": {
                            key: [score.components[key].model_dump(mode="json") for score in one.scores]
                            for key in one.scores[0].components
                        },
                    }
                    for one in measured
                ]
                return scored, kept

        scored, kept = asyncio.run(ask())
        body = {"spec": spec.model_dump(mode="json"), "groups": kept}
        answer = httpx.post(f"{reward_url}/v1/specs/preview", json=body).json()
        assert answer["missing"] == [] and answer["spec_id"] == spec.spec_id
        for one, other in zip(answer["groups"], scored, strict=True):
            assert [score["advantage"] for score in one["scores"]] == [score.advantage for score in other.scores]
            assert [score["valid"] for score in one["scores"]] == [score.valid for score in other.scores]
            assert one["skipped"] == other.skipped


def test_bad_previews_name_the_field(reward_url):
    score = {"value": 1.0, "outcome": "ok"}
    good = {"group_id": "g", "size": 2, "components": {"length": [score, score]}}
    scheduled = {"rewards": [{"name": "length", "schedule": {"kind": "switch", "at": 3}}]}
    for spec, group, field in [
        ({"rewards": [{"name": "nobody"}]}, good, "spec.rewards[0].name"),
        ({"rewards": [{"name": "length"}]}, {**good, "size": 3}, "groups[0]"),
        (scheduled, good, "groups[0].weight_version"),
    ]:
        answer = httpx.post(f"{reward_url}/v1/specs/preview", json={"spec": spec, "groups": [group]})
        assert answer.status_code == 422 and answer.json()["errors"][0]["field"] == field, answer.text
    routed = {"rewards": [{"name": "length", "sources": ["quiz"]}]}
    for source, valid in [("quiz", True), ("other", False)]:
        body = {"spec": routed, "groups": [{**good, "source": source}]}
        answer = httpx.post(f"{reward_url}/v1/specs/preview", json=body).json()
        assert [score["valid"] for score in answer["groups"][0]["scores"]] == [valid] * 2 and answer["missing"] == []
    late = {**good, "weight_version": Version(version=3).model_dump()}
    answer = httpx.post(f"{reward_url}/v1/specs/preview", json={"spec": scheduled, "groups": [late]}).json()
    assert [score["valid"] for score in answer["groups"][0]["scores"]] == [False, False]


# ---- the report ----------------------------------------------------------------------------------------------------


def test_the_report_is_one_file_that_asks_nobody(run, tmp_path):
    run_dir, other = tmp_path / "run", tmp_path / "other"
    for folder in (run_dir, other):
        folder.mkdir()
        rows = [run.step(step, entropy=math.sin(step), **{"components.<x>": 1.0}) for step in range(1, 6)]
        (folder / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "run": {"name": run.name, "dir": str(run_dir)},
        "model": {"path": "unused"},
        "data": {"path": "x.jsonl", "fields": {"prompt": "p"}},
        "rewards": "length",
        "trainer": {"steps": 10, "groups_per_step": 1},
        "queue": {"url": run.url},
    }
    (run_dir / "recipe.yaml").write_text(json.dumps(recipe))
    (group,) = make_groups(1)
    run.keep([group.model_copy(update={"task": Task(task_id="t", prompt=HOSTILE)})])
    run.bury((3, HOSTILE))
    out = tmp_path / "out.html"
    asyncio.run(write(run_dir, out, [other]))
    text = out.read_text()
    page = Page(text)
    assert not [found for _, found in page.elements if found.get("src") or (found.get("href") or "#")[0] != "#"]
    assert "url(" not in text and "2 of 10" in " ".join(page.text.split()) and "answer 0" in page.text
    found = json.loads(text.split('id="found">')[1].split("</script>")[0])
    assert [one["name"] for one in found["runs"]] == [run.name, "other"]
    assert found["runs"][0]["curves"]["entropy"][0] == [1, 2, 3, 4, 5]
    np.testing.assert_allclose(found["runs"][1]["curves"]["entropy"][1], np.sin(np.arange(1, 6)))
    (policy,) = [found["content"] for _, found in page.elements if found.get("http-equiv")]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
