"""The rules every service's HTTP obeys, through a real server."""

import asyncio
import base64
import socket

import httpx
import pytest
from fastapi import Request
from served import served

from services import codec
from services.access import HttpSettings, require_admin, settings_from_environment
from services.address import listen
from services.api import ScoreItem, ScoreRequest
from services.gate import remaining_seconds
from services.http import create_app
from services.problem import Problem
from services.startup import StartupError

pytestmark = pytest.mark.alone


def make_app(states=None, **settings):
    states = {"model": "ok"} if states is None else states
    app = create_app("test", "1", HttpSettings(**settings), ready=lambda: states)

    @app.post("/echo")
    async def echo(body: ScoreRequest) -> ScoreRequest:
        return body

    @app.post("/slow")
    async def slow(request: Request) -> dict:
        await asyncio.sleep(remaining_seconds(request, 5) + 3)
        return {}

    @app.put("/state", dependencies=[require_admin])
    async def state() -> dict:
        return {"changed": True}

    @app.get("/busy")
    async def busy() -> dict:
        raise Problem(503, "Busy", "later", retry_after=7)

    @app.get("/crash")
    async def crash() -> dict:
        raise RuntimeError("secret detail")

    return app


@pytest.fixture(scope="module")
def open_url():
    with served(make_app(max_body_bytes=2000)) as url:
        yield url


@pytest.fixture(scope="module")
def guarded_url():
    with served(make_app(api_token="user-token", admin_token="admin-token")) as url:
        yield url


ITEM = {"prompt": "a", "completion_token_ids": [1, 2]}


def test_health_metrics_docs(open_url):
    assert httpx.get(f"{open_url}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{open_url}/readyz").status_code == 200
    assert "rlif_http_requests_total" in httpx.get(f"{open_url}/metrics").text
    page = httpx.get(f"{open_url}/docs").text
    assert "swagger" in page and "http://" not in page and "https://" not in page
    assert "/echo" in httpx.get(f"{open_url}/openapi.json").json()["paths"]


def test_not_ready_says_which():
    with served(make_app(states={"model": "ok", "redis": "connection refused"})) as url:
        answer = httpx.get(f"{url}/readyz")
    assert answer.status_code == 503
    assert answer.json()["dependencies"]["redis"] == "connection refused"


@pytest.mark.parametrize(
    ("content", "field"),
    [
        (b"{", "body"),
        (b'{"items": []}', "items"),
        (b'{"items": [{"prompt": "a"}]}', "items[0]"),
        (b'{"items": [{"prompt": "a", "completion": 3}]}', "items[0].completion"),
        (b'{"items": [{"prompt": "a", "completion": "b"}], "temperature": NaN}', "body"),
        (b'{"items": [{"prompt": "a", "completion": "b"}], "temperature": 1e999}', "body"),
        (b'{"items": [{"prompt": "a", "completion": "b"}], "temprature": 1}', "temprature"),
        (b'{"items": [{"prompt": "a", "completion_token_ids": ["x"]}]}', "items[0].completion_token_ids[0]"),
    ],
)
def test_bad_bodies_name_the_field(open_url, content, field):
    answer = httpx.post(f"{open_url}/echo", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"
    assert field in [error["field"] for error in answer.json()["errors"]]


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/yaml", None])
def test_a_body_of_another_type_names_the_header(open_url, kind):
    content = b'{"items": [{"prompt": "a", "completion": "b"}]}'
    answer = httpx.post(f"{open_url}/echo", content=content, headers={"content-type": kind} if kind else {})
    assert answer.status_code == 415
    assert "Content-Type: send application/json or application/msgpack" in answer.json()["detail"]


def test_msgpack_both_ways(open_url):
    body = ScoreRequest(items=[ScoreItem(**ITEM)])
    headers = {"content-type": "application/msgpack", "accept": "application/msgpack"}
    answer = httpx.post(f"{open_url}/echo", content=codec.pack(body), headers=headers)
    assert answer.headers["content-type"] == "application/msgpack"
    assert codec.unpack_as(ScoreRequest, answer.content) == body
    broken = httpx.post(f"{open_url}/echo", content=b"\xc1\xff", headers=headers)
    assert broken.status_code == 422 and broken.json()["errors"][0]["field"] == "body"


def test_body_limit_with_and_without_a_length(open_url):
    big = b'{"items": "' + b"x" * 3000 + b'"}'
    assert httpx.post(f"{open_url}/echo", content=big).status_code == 413
    chunks = (big[start : start + 500] for start in range(0, len(big), 500))
    answer = httpx.post(f"{open_url}/echo", content=chunks, headers={"content-type": "application/json"})
    assert answer.status_code == 413


def test_request_id_is_echoed_and_hostile_ones_are_replaced(open_url):
    assert httpx.get(f"{open_url}/healthz", headers={"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"
    made = httpx.get(f"{open_url}/healthz", headers={"X-Request-Id": "a b<script>"}).headers["x-request-id"]
    assert len(made) == 32
    wrong = httpx.get(f"{open_url}/nowhere", headers={"X-Request-Id": "abc-2"})
    assert wrong.status_code == 404 and wrong.json()["request_id"] == "abc-2"


def test_deadline_ends_the_call(open_url):
    answer = httpx.post(f"{open_url}/slow", headers={"X-Deadline-Seconds": "0.2"})
    assert answer.status_code == 504
    for bad in ("0", "-1", "nan", "soon"):
        answer = httpx.post(f"{open_url}/slow", headers={"X-Deadline-Seconds": bad})
        assert answer.status_code == 400 and answer.json()["errors"][0]["field"] == "X-Deadline-Seconds"


def test_problem_and_crash(open_url):
    busy = httpx.get(f"{open_url}/busy")
    assert busy.status_code == 503 and busy.headers["retry-after"] == "7"
    crash = httpx.get(f"{open_url}/crash")
    assert crash.status_code == 500 and crash.headers["content-type"] == "application/problem+json"
    assert "secret" not in crash.text and crash.headers["x-request-id"]


def test_tokens(guarded_url):
    def put(token):
        return httpx.put(f"{guarded_url}/state", headers={"Authorization": f"Bearer {token}"}).status_code

    def post(headers):
        return httpx.post(f"{guarded_url}/echo", json={"items": [ITEM]}, headers=headers).status_code

    assert post({}) == 401
    assert post({"Authorization": "Bearer wrong"}) == 401
    assert post({"Authorization": "Basic user-token"}) == 401
    assert post({"Authorization": "Basic " + base64.b64encode(b"any:user-token").decode()}) == 200
    assert post({"Authorization": "Basic " + base64.b64encode(b":admin-token").decode()}) == 401
    assert post({"Authorization": "Bearer user-token"}) == 200
    assert post({"Authorization": "Bearer admin-token"}) == 200
    assert put("user-token") == 403
    assert put("admin-token") == 200
    assert httpx.get(f"{guarded_url}/healthz").status_code == 200
    assert httpx.get(f"{guarded_url}/docsx").status_code == 401


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LocalHost:8100", 200),
        ("127.0.0.1:1", 200),
        ("127.8.8.8", 200),
        ("[::1]:8100", 200),
        ("evil.example", 421),
        ("evil.example:8100", 421),
        ("127.0.0.1.evil.example", 421),
        ("localhost@evil.example", 421),
        ("10.0.0.7", 421),
        ("[::1", 421),
        ("", 421),
    ],
)
def test_without_a_token_only_names_of_this_machine_are_served(open_url, guarded_url, host, status):
    answer = httpx.put(f"{open_url}/state", headers={"Host": host})
    assert answer.status_code == status
    if status != 200:
        assert answer.json()["errors"][0]["field"] == "Host" and "localhost, 127.0.0.1" in answer.json()["detail"]
    for probe in ("healthz", "readyz", "metrics"):
        assert httpx.get(f"{open_url}/{probe}", headers={"Host": host}).status_code == 200
    headers = {"Host": host, "Authorization": "Bearer admin-token"}
    assert httpx.put(f"{guarded_url}/state", headers=headers).status_code == 200


def test_the_bound_address_is_a_name_of_the_server():
    with served(make_app(host="box.example")) as url:
        assert httpx.post(f"{url}/echo", json={"items": [ITEM]}, headers={"Host": "Box.example:1"}).status_code == 200
        assert httpx.post(f"{url}/echo", json={"items": [ITEM]}, headers={"Host": "other.example"}).status_code == 421


def test_concurrency_limit():
    with served(make_app(max_concurrent=2)) as url:

        async def flood() -> list[httpx.Response]:
            async with httpx.AsyncClient() as client:
                headers = {"X-Deadline-Seconds": "3"}  # in which all of them come, on a busy machine too
                return await asyncio.gather(*(client.post(f"{url}/slow", headers=headers) for _ in range(6)))

        answers = asyncio.run(flood())
    statuses = sorted(answer.status_code for answer in answers)
    assert statuses == [429] * 4 + [504] * 2
    assert all(answer.headers["retry-after"] for answer in answers if answer.status_code == 429)


def test_a_client_that_never_sends_the_rest_of_its_body_loses_its_place():
    with served(make_app(max_concurrent=1, body_seconds=0.3)) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as client:
            head = b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            client.sendall(head + b"Content-Length: 99\r\n\r\n{")
            assert client.recv(100).startswith(b"HTTP/1.1 408")
        assert httpx.post(f"{url}/echo", json={"items": [ITEM]}).status_code == 200


def test_a_path_cannot_forge_log_lines(open_url, caplog):
    caplog.set_level("INFO", logger="services.gate")
    assert httpx.get(f"{open_url}/%0A2026%20ERROR%20forged%1b[31m").status_code == 404
    assert httpx.get(f"{open_url}/nowhere").status_code == 404
    assert "GET /%0A2026%20ERROR%20forged%1B%5B31m -> 404" in caplog.text


def test_no_token_beyond_loopback(monkeypatch):
    monkeypatch.delenv("RLIF_API_TOKEN", raising=False)
    assert settings_from_environment("127.0.0.1").api_token is None
    with pytest.raises(StartupError, match="RLIF_API_TOKEN"):
        settings_from_environment("0.0.0.0")


def test_busy_port_is_one_clear_line():
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(StartupError, match=r"cannot listen on 127.0.0.1:\d+: Address already in use"):
            listen("127.0.0.1", taken.getsockname()[1])


def test_one_token_for_both_is_refused(monkeypatch):
    monkeypatch.setenv("RLIF_API_TOKEN", "same")
    monkeypatch.setenv("RLIF_ADMIN_TOKEN", "same")
    with pytest.raises(StartupError, match="RLIF_ADMIN_TOKEN: is the same as RLIF_API_TOKEN"):
        settings_from_environment("0.0.0.0")


async def test_a_caller_without_a_token_does_not_say_which_traces_are_kept(monkeypatch):
    from contextlib import nullcontext

    from services import traces

    parents = []
    monkeypatch.setattr(traces, "span", lambda *_, parent: parents.append(parent) or nullcontext())
    app = create_app("x", "1", HttpSettings(api_token="known"), lambda: {})
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
        for token in ("known", "guessed"):
            await client.get("/v1/x", headers={"traceparent": "00-1-2-01", "authorization": f"Bearer {token}"})
    assert parents == ["00-1-2-01", ""]
