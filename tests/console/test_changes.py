"""What changes a run, and who may."""

import asyncio
import time

from console.watched import ADMIN, API, CHANGES, DATA, GUARDED, PAGES, SPEC, Page, console

from services import pause
from services.commands import Stop, parse
from services.console.pages import ASSETS, PATHS
from services.redis import connect


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
        for orchestrator, silent in [({"at": long_ago}, True), ({"at": time.time()}, False)]:
            run.status(trainer={"state": "waiting", "lineage": 0, "at": long_ago}, orchestrator=orchestrator)
            answer = client.post("/v1/run/stop")
            assert answer.status_code == 202 and run.redis.llen(run.keys.commands) == 1
            assert "with a checkpoint; the trainer was last heard of 5 min 0" in answer.text
            assert (", the orchestrator 5 min 0" in answer.text) == ("if the trainer is gone" in answer.text) == silent
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
