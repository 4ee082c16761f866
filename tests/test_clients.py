"""Clients against a real server that misbehaves on purpose, and routing over several of them."""

import asyncio
import inspect
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import Response
from served import served

from reward_server.app import Settings, create
from services.access import HttpSettings, require_admin
from services.api import (
    RewardGroup,
    RewardsRequest,
    RewardsResponse,
    RolloutGroup,
    RolloutRequest,
    RolloutsRequest,
    RolloutsResponse,
    ScoreItem,
    ScoreRequest,
    ScoreResponse,
    ScoreResult,
    SpecEntry,
)
from services.clients import (
    BlockingRewardClient,
    DeadlinePassed,
    Refused,
    RewardClient,
    RolloutClient,
    ServerFault,
    Unavailable,
    credentials,
    pause_before,
)
from services.contract import Completion, CompletionScore, GroupScores, Score, Task, Version
from services.http import create_app
from services.orchestrator.routing import Routes
from services.problem import Problem
from services.spec import RewardSpec

pytestmark = pytest.mark.alone


class Behaviour:
    """What the server does next (answers to give, or seconds to hang), and what it saw."""

    def __init__(self):
        self.failures: list[Response | float] = []
        self.seen: list[dict] = []
        self.ports: set[int] = set()
        self.model = "m"


def completion(seed: int) -> Completion:
    return Completion(text="é", token_ids=[seed, 70000], logprobs=[-0.1, -2.5], finish_reason="stop")


def make_app(behaviour: Behaviour, settings: HttpSettings) -> FastAPI:
    app = create_app("test", "0", settings, ready=lambda: {"model": "ok"})

    @app.middleware("http")
    async def misbehave(request: Request, call_next):
        behaviour.seen.append(dict(request.headers))
        behaviour.ports.add(request.client.port)
        if behaviour.failures and not request.url.path.startswith("/v1/model"):
            if isinstance(behaviour.failures[0], Response):
                return behaviour.failures.pop(0)
        return await call_next(request)

    @app.get("/v1/model")
    async def model() -> dict:
        return {"model": behaviour.model, "vocab_size": 288}

    @app.post("/v1/rollouts")
    async def rollouts(body: RolloutsRequest) -> RolloutsResponse:
        if behaviour.failures:
            await asyncio.sleep(behaviour.failures.pop(0))
        counts = [6 if r.n == 7 else r.n for r in body.requests]
        groups = [
            RolloutGroup(group_id=r.group_id, prompt_token_ids=[1, 2], completions=[completion(k) for k in range(n)])
            for r, n in zip(body.requests, counts, strict=True)
        ]
        return RolloutsResponse(groups=groups, model=behaviour.model, weight_version=Version(lineage=1, version=4))

    @app.post("/v1/rewards")
    async def rewards(body: RewardsRequest) -> RewardsResponse:
        if body.spec == "unknown":
            raise Problem(422, "Unknown spec", "there is no spec 'unknown'", field="spec")
        score = CompletionScore(components={"r": Score.of(0.5)}, reward=0.5, advantage=0.0, valid=True)
        return RewardsResponse(
            groups=[
                GroupScores(group_id=g.group_id, scores=[score for _ in g.completions], spec_id="s")
                for g in body.groups
            ]
        )

    @app.post("/v1/score")
    async def score(body: ScoreRequest) -> ScoreResponse:
        result = ScoreResult(n_tokens=1, scores=dict.fromkeys(body.metrics, body.temperature))
        return ScoreResponse(results=[result for _ in body.items], model="m", weight_version=Version(), vocab_size=288)

    @app.put("/v1/specs/{name}")
    async def put_spec(name: str, spec: RewardSpec, _: None = require_admin) -> SpecEntry:
        return SpecEntry(name=name, version=1, spec_id=spec.spec_id, built_in=False, updated_at=0.0, spec=spec)

    @app.delete("/v1/specs/{name}", status_code=204)
    async def delete_spec(name: str, _: None = require_admin) -> None:
        assert name

    return app


@pytest.mark.parametrize(
    ("url", "bare", "said"),
    [
        ("http://host:1/v1", "http://host:1/v1", None),
        ("http://:s%40cret@host:1/v1", "http://host:1/v1", "Bearer s@cret"),
        ("http://:s@cret@host", "http://host", "Bearer s@cret"),
        ("http://user:cret@[::1]:1", "http://[::1]:1", "Basic dXNlcjpjcmV0"),
        ("http://:@host/a@b", "http://host/a@b", None),
    ],
)
def test_credentials_are_split_off_a_url(url, bare, said):
    assert credentials(url) == (bare, said)


@pytest.mark.parametrize("url", ["http://:s%0Acret@host", "ftp://:secret@host", "http://:sec/ret@host"])
def test_a_refused_url_does_not_tell_its_token(url):
    with pytest.raises(ValueError, match="host") as refused:
        RolloutClient(url)
    assert "ret" not in str(refused.value)


async def test_a_token_in_the_url_is_sent_and_told_nowhere(behaviour):
    url, seen = behaviour[0].replace("//", "//:api@"), behaviour[1].seen
    async with RewardClient(url, "wrong", "admin") as client:
        assert (await client.model())["model"] == "m"
        await client.put_spec("s", RewardSpec.model_validate({"rewards": [{"name": "length"}]}))
        with pytest.raises(Refused) as refused:
            await client.get_spec("s")
    assert [one["authorization"] for one in seen] == ["Bearer api", "Bearer admin", "Bearer api"]
    assert client.url == behaviour[0] and "api@" not in f"{refused.value} {refused.value.url}"


def busy(status: int = 503, **headers: str) -> Response:
    return Response(b'{"title": "Busy", "detail": "loading"}', status, headers, "application/problem+json")


@pytest.fixture(scope="module")
def server():
    behaviour = Behaviour()
    settings = HttpSettings(api_token="api", admin_token="admin")
    with served(make_app(behaviour, settings)) as url:
        yield url, behaviour


@pytest.fixture
def behaviour(server):
    url, behaviour = server
    behaviour.__init__()
    return url, behaviour


@contextmanager
def dropping_server(drops: int, answer: bytes = b""):
    """A raw socket that resets `drops` connections after reading the request, then answers every one with `answer`."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.1)
    stop, accepted = threading.Event(), []

    def run() -> None:
        while not stop.is_set():
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            with connection:
                accepted.append(1)
                connection.settimeout(5)
                connection.recv(65536)
                if len(accepted) <= drops:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                else:
                    connection.sendall(answer)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", accepted
    finally:
        stop.set()
        thread.join(10)
        listener.close()


def request(n: int = 2, group_id: str = "g") -> RolloutRequest:
    return RolloutRequest(group_id=group_id, prompt="p", n=n)


async def test_arrays_tokens_and_deadline_on_the_wire(behaviour):
    url, server = behaviour
    async with RolloutClient(url + "/", "api") as client:
        response = await client.rollouts([request(2, "a"), request(1, "b")], deadline_seconds=7)
    assert [g.group_id for g in response.groups] == ["a", "b"]
    made = response.groups[0].completions[1]
    assert (made.token_ids, made.text) == ([1, 70000], "é")
    assert made.logprobs == pytest.approx([-0.1, -2.5], rel=1e-7)
    assert response.weight_version == Version(lineage=1, version=4)
    headers = server.seen[-1]
    assert headers["content-type"] == headers["accept"] == "application/msgpack"
    assert headers["authorization"] == "Bearer api"
    assert 6 < float(headers["x-deadline-seconds"]) <= 7


async def test_connections_are_reused(behaviour):
    url, server = behaviour
    async with RolloutClient(url, "api") as client:
        for _ in range(5):
            await client.rollouts([request()])
    assert len(server.seen) == 5 and len(server.ports) == 1


@pytest.mark.parametrize("status", [429, 502, 503])
async def test_a_busy_server_is_asked_again(behaviour, status):
    url, server = behaviour
    server.failures = [busy(status), busy(status)]
    async with RolloutClient(url, "api") as client:
        await client.rollouts([request()])
    assert len(server.seen) == 3


async def test_retry_after_is_never_undercut(behaviour):
    url, server = behaviour
    server.failures = [busy(**{"Retry-After": "1"})]
    async with RolloutClient(url, "api") as client:
        started = time.monotonic()
        await client.rollouts([request()])
        assert time.monotonic() - started >= 1
        server.failures = [busy(**{"Retry-After": "3600"})]
        with pytest.raises(Unavailable, match="503 Busy: loading") as caught:
            await client.rollouts([request()])
    assert caught.value.retry_after == 3600
    assert len(server.seen) == 3, "an hour is beyond the budget: no second try"


async def test_the_retry_budget_ends(behaviour):
    url, server = behaviour
    server.failures = [busy() for _ in range(100)]
    async with RolloutClient(url, "api", retry_seconds=1.5) as client:
        with pytest.raises(Unavailable):
            await client.rollouts([request()])
    assert 2 <= len(server.seen) < 20
    server.seen.clear()
    async with RolloutClient(url, "api", retry_seconds=0) as client:
        with pytest.raises(Unavailable):
            await client.rollouts([request()])
    assert len(server.seen) == 1


async def test_a_hanging_server_does_not_outlast_the_deadline(behaviour):
    url, server = behaviour
    async with RolloutClient(url, "api") as client:
        server.failures = [30.0]
        with pytest.raises(DeadlinePassed, match="v1/rollouts"):
            await client.rollouts([request()], deadline_seconds=1.0)
        assert len(server.seen) == 1, "a call whose deadline passed is not tried again"
    with socket.create_server(("127.0.0.1", 0)) as mute:  # accepts and never says a word
        async with RolloutClient(f"http://127.0.0.1:{mute.getsockname()[1]}") as client:
            with pytest.raises(DeadlinePassed, match="no answer within 0.3 s"):
                await client.rollouts([request()], deadline_seconds=0.3)


async def test_dropped_connections_are_retried():
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 13\r\nConnection: close\r\n\r\n"
    answer = head + b'{"model":"m"}'
    with dropping_server(2, answer) as (url, accepted):
        async with RewardClient(url) as client:
            assert await client.model() == {"model": "m"}
        assert len(accepted) == 3


async def test_nobody_listening():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    async with RewardClient(f"http://127.0.0.1:{port}", retry_seconds=0.5) as client:
        with pytest.raises(Unavailable, match=f"127.0.0.1:{port}/v1/model"):
            await client.model()


async def test_a_refusal_is_final_and_says_why(behaviour):
    url, server = behaviour
    async with RewardClient(url, "api") as client:
        group = RewardGroup(group_id="g", task=Task(task_id="t", prompt="p"), completions=[{"text": "x"}])
        with pytest.raises(Refused, match="422 Unknown spec: there is no spec 'unknown'") as caught:
            await client.rewards([group], spec="unknown")
        assert (caught.value.status, caught.value.fields) == (422, {"spec"})
        assert len(server.seen) == 1
    async with RewardClient(url, "wrong") as client:
        with pytest.raises(Refused, match="401 Wrong token"):
            await client.model()


async def test_admin_calls_carry_the_admin_token(behaviour):
    url, _ = behaviour
    spec = RewardSpec(rewards=[{"name": "random"}])
    async with RewardClient(url, "api", "admin") as client:
        assert (await client.put_spec("mine", spec)).spec_id == spec.spec_id
        await client.delete_spec("mine")
    async with RewardClient(url, "api") as client:
        with pytest.raises(Refused, match="403 Admin token needed"):
            await client.put_spec("mine", spec)


async def test_an_answer_to_another_question_is_a_fault(behaviour):
    url, server = behaviour
    async with RolloutClient(url, "api") as client:
        with pytest.raises(ServerFault, match="asked for groups"):
            await client.rollouts([request(n=7)])  # the server gives one too few
        server.failures = [Response(b"\xc1", 200, media_type="application/msgpack")]
        with pytest.raises(ServerFault, match="cannot be read"):
            await client.rollouts([request()])
        server.failures = [Response(b"{}", 200, media_type="application/json")]
        with pytest.raises(ServerFault, match="groups: Field required"):
            await client.rollouts([request()])
        server.failures = [Response(b"<html>oops", 500)]
        with pytest.raises(ServerFault, match="500 Internal Server Error: <html>oops"):
            await client.rollouts([request()])


@pytest.mark.parametrize("url", ["http://[bad", "localhost:8100", "ftp://host", "", "http://"])
def test_not_a_url(url):
    with pytest.raises(ValueError, match="is not a server's URL: write it as http://host:port"):
        RewardClient(url)
    threads = threading.active_count()
    with pytest.raises(ValueError, match="is not a server's URL"):
        BlockingRewardClient(url)
    assert threading.active_count() == threads  # one left behind would keep the interpreter from ending


def test_blocking_client(behaviour):
    url, _ = behaviour
    with BlockingRewardClient(url, "api") as client:
        response = client.score([ScoreItem(prompt="p", completion="c")], ["entropy"], temperature=0.5)
        assert response.results[0].scores == {"entropy": 0.5}
        group = RewardGroup(group_id="g", task=Task(task_id="t", prompt="p"), completions=[{"text": "x"}])
        assert client.rewards([group]).groups[0].scores[0].reward == 0.5
        with pytest.raises(Refused):
            client.rewards([group], spec="unknown")


def both(server: tuple[str, str, str], method: str, *args):
    """Asks a real server by both clients and returns the one answer."""

    async def asked():
        async with RewardClient(*server) as client:
            return await getattr(client, method)(*args)

    answer = asyncio.run(asked())
    with BlockingRewardClient(*server) as client:
        blocked = getattr(client, method)(*args)
    assert method == "put_spec" or blocked == answer  # each put is a version
    return blocked


def test_specs_and_rewards_of_the_real_server():
    settings = Settings(http=HttpSettings(api_token="api", admin_token="admin"))
    with served(create(settings)) as url:
        server = (url, "api", "admin")
        listed = {entry.name: entry for entry in both(server, "list_rewards")}
        assert listed["length"].available and "scale" in listed["length"].params["properties"]
        assert not listed["self_certainty"].available and "model" in listed["self_certainty"].unavailable_because
        first, second = (RewardSpec(rewards=[{"name": name}]) for name in ("random", "length"))
        both(server, "put_spec", "a.b", first)
        entry = both(server, "put_spec", "a.b", second)
        assert (entry.name, entry.version, entry.spec, entry.built_in) == ("a.b", 4, second, False)
        assert both(server, "get_spec", "a.b") == entry
        assert both(server, "get_spec", "a.b", 1).spec == first
        assert [item.version for item in both(server, "spec_versions", "a.b")] == [1, 2, 3, 4]
        assert "a.b" in {item.name for item in both(server, "list_specs")}
        found = both(server, "list_specs", second.spec_id)
        assert {item.spec_id for item in found} == {second.spec_id} and {3, 4} <= {item.version for item in found}
        with BlockingRewardClient(url, "api", admin_token="admin") as client:
            assert client.ready()["status"] == "ready"
            client.delete_spec("a.b")
            with pytest.raises(Refused, match="404 Unknown spec"):
                client.get_spec("a.b")
            with pytest.raises(Refused, match="404"):
                client.get_spec("no/such?name#at all")  # arrives as one name, not as a path
            with pytest.raises(Refused, match="404 No model"):
                client.model()


def test_both_clients_have_the_same_methods():
    def methods(kind: type) -> dict[str, dict]:
        found = inspect.getmembers(kind, inspect.isfunction)
        ours = [(name, each) for name, each in found if name[0] != "_" and name not in ("call", "authorization")]
        return {name: dict(inspect.signature(each).parameters) for name, each in ours}

    assert methods(BlockingRewardClient) == methods(RewardClient)


def test_one_client_in_several_event_loops(behaviour):
    url, server = behaviour
    client = RewardClient(url, "api", retry_seconds=0)

    async def twice() -> None:
        await client.model()
        await client.model()

    for _ in range(3):
        asyncio.run(twice())
    assert len(server.seen) == 6 and len(server.ports) == 3


async def test_blocking_client_in_a_running_loop_and_in_many_threads(behaviour):
    url, server = behaviour
    with BlockingRewardClient(url, "api") as client:
        assert client.model()["vocab_size"] == 288  # this thread's loop stands still meanwhile
        found = await asyncio.gather(*(asyncio.to_thread(client.model) for _ in range(50)))
        assert len(found) == 50 and len(server.seen) == 51
        name = "reward client"
        assert [thread.name for thread in threading.enumerate()].count(name) == 1
    assert name not in [thread.name for thread in threading.enumerate()]
    assert client.model()["vocab_size"] == 288  # closed, and open again
    client.close()


FORKING = """
import os, sys
from services.clients import BlockingRewardClient
client = BlockingRewardClient(sys.argv[1], "api")
assert client.model()["vocab_size"] == 288
children = []
for _ in range(3):
    child = os.fork()
    if child == 0:
        os._exit(0 if client.model()["vocab_size"] == 288 else 1)
    children.append(child)
assert client.model()["vocab_size"] == 288
print([os.waitpid(child, 0)[1] for child in children])
"""


def test_forked_processes_and_a_client_that_is_never_closed(behaviour):
    url, _ = behaviour
    ran = subprocess.run([sys.executable, "-c", FORKING, url], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout) == (0, "[0, 0, 0]\n"), ran.stderr


def test_pauses_double_with_jitter_and_never_undercut_the_server():
    for attempt, middle in [(1, 0.25), (2, 0.5), (5, 4.0), (500, 30.0)]:
        pauses = [pause_before(attempt) for _ in range(200)]
        assert 0.5 * middle <= min(pauses) < 0.8 * middle and 1.2 * middle < max(pauses) <= 1.5 * middle
    assert pause_before(1, retry_after=9) == 9


# ---- routing ---------------------------------------------------------------------------------------------------


async def no_preparation(_: RolloutClient) -> None:
    pass


@contextmanager
def two_servers():
    one, two = Behaviour(), Behaviour()
    one.model, two.model = "one", "two"
    with served(make_app(one, HttpSettings())) as a, served(make_app(two, HttpSettings())) as b:
        yield (a, one), (b, two)


@pytest.fixture(scope="module")
def pair_of_servers():
    with two_servers() as pair:
        yield pair


@pytest.fixture
def pair(pair_of_servers):
    for _, behaviour in pair_of_servers:
        model = behaviour.model
        behaviour.__init__()
        behaviour.model = model
    return pair_of_servers


def routes_to(urls, **settings) -> Routes[RolloutClient]:
    settings = {"prepare": no_preparation, "patience": 20.0} | settings
    return Routes("rollout", [RolloutClient(url, retry_seconds=0) for url in urls], **settings)


async def generate(client: RolloutClient) -> str:
    return (await client.rollouts([request()], deadline_seconds=20)).model


async def test_load_is_spread(pair):
    (a, one), (b, two) = pair
    one.failures = [1.5]
    routes = routes_to([a, b])
    slow = asyncio.create_task(routes.call(generate))
    while not one.seen:
        await asyncio.sleep(0.01)
    assert [await routes.call(generate) for _ in range(3)] == ["two"] * 3, "the other one is busy"
    assert await slow == "one"
    assert sorted([await routes.call(generate) for _ in range(4)]).count("one") >= 2, "idle ones take turns"
    await routes.close()


async def test_a_failing_server_is_set_aside_and_tried_again(pair):
    (a, one), (b, two) = pair
    one.failures = [busy()]
    prepared = []

    async def prepare(client: RolloutClient) -> None:
        prepared.append(client.url)

    routes = routes_to([a, b], prepare=prepare)
    assert [await routes.call(generate) for _ in range(3)] == ["two", "two", "two"]
    assert len(one.seen) == 1, "set aside at the first failure"
    until = time.monotonic() + 10
    while await routes.call(generate) != "one":
        assert time.monotonic() < until
        await asyncio.sleep(0.05)
    assert sorted(prepared) == sorted([a, b]), "each once: a busy server is still the same one"
    await routes.close()


async def test_a_server_that_was_gone_is_prepared_again(pair):
    (a, _), _ = pair
    with dropping_server(10**6) as (bad, accepted):
        prepared = []

        async def prepare(client: RolloutClient) -> None:
            prepared.append(client.url)

        routes = routes_to([bad, a], prepare=prepare)
        for _ in range(40):
            assert await routes.call(generate) == "one"
            await asyncio.sleep(0.05)
        assert len(accepted) >= 2
        assert prepared.count(bad) == len(accepted) and prepared.count(a) == 1
        await routes.close()


async def test_many_calls_failing_at_once_count_as_one_failure(pair):
    (a, one), _ = pair
    one.failures = [busy() for _ in range(16)]
    routes = routes_to([a])
    started = time.monotonic()
    assert await asyncio.gather(*(routes.call(generate) for _ in range(16))) == ["one"] * 16
    assert time.monotonic() - started < 10, "sixteen doublings would be a day"
    await routes.close()


async def test_patience_ends_and_names_the_servers():
    with dropping_server(10**6) as (one, _), dropping_server(10**6) as (two, _):
        routes = routes_to([one, two], patience=0.5)
        with pytest.raises(Unavailable, match=f"(?s){one}.*{two}"):
            await routes.call(generate)
        await routes.close()


async def test_an_hour_of_rest_does_not_outlast_the_patience(pair):
    (a, one), _ = pair
    one.failures = [busy(**{"Retry-After": "3600"})]
    routes = routes_to([a], patience=0.5)
    with pytest.raises(Unavailable, match="no rollout server could be used for 0.5 s: .*503 Busy: loading"):
        await routes.call(generate)
    await routes.close()


async def test_refusals_pass_through(pair):
    (a, one), _ = pair
    one.failures = [Response(b'{"title": "No"}', 400)]
    routes = routes_to([a])
    with pytest.raises(Refused, match="400 No"):
        await routes.call(generate)
    assert routes.routes[0].in_flight == 0 and routes.routes[0].rests_until == 0
    await routes.close()
