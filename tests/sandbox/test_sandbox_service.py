"""The service that runs programs for others, and its command."""

import asyncio
import re
import signal
import socket
import subprocess
import sys

import httpx
import pytest
from sandbox.programs import DOUBLE, SLOW, run, told
from sandboxes import started
from served import served

from reward_server.sandbox import app as sandbox_app
from reward_server.sandbox.bubblewrap import Bubblewrap
from reward_server.sandbox.remote import RemoteSandbox
from services.access import HttpSettings
from services.startup import StartupError

pytestmark = pytest.mark.alone


@pytest.fixture
async def service():
    await (await started(Bubblewrap(frozenset({"python"})))).stop()
    app = sandbox_app.create(HttpSettings(api_token="word"), Bubblewrap(frozenset({"python"}), concurrency=2))
    with served(app) as url:
        yield url


async def test_the_service_runs_programs_for_a_reward_server(service):
    remote = RemoteSandbox(service, "word")
    await remote.start()
    assert remote.languages == {"python"}
    results = await run(remote, SLOW, "a", "slow", "bad", "ü", wall_seconds=1.5)
    assert told(results) == [("ok", "a"), ("timeout", ""), ("crash", ""), ("ok", "ü")]
    late = await run(remote, SLOW, "a", "slow", "b", wall_seconds=100, seconds=3)
    assert told(late) == [("ok", "a"), ("deadline", ""), ("deadline", "")]
    (refused,) = await run(remote, DOUBLE["cpp"], language="cpp")
    assert refused.status == "error" and "program.language" not in remote.state() and remote.state() == "ok"
    await remote.stop()


async def test_the_service_refuses_by_field_and_without_its_token(service):
    headers = {"Authorization": "Bearer word"}
    async with httpx.AsyncClient(base_url=service, headers=headers, timeout=60) as http:
        assert (await http.get("/readyz")).json()["dependencies"] == {"sandbox": "ok"}
        body = {"program": {"language": "python", "source": "print(1)"}, "cases": [{}]}
        assert (await http.post("/v1/execute", json=body)).json()["results"][0]["stdout"] == "1\n"
        for change, field in (
            ({"cases": []}, "cases"),
            ({"program": {"language": "cobol", "source": ""}}, "program.language"),
            ({"program": {"language": "cpp", "source": ""}}, "program.language"),
            ({"limits": {"memory_mb": 1}}, "limits.memory_mb"),
            ({"limits": {"root": True}}, "limits.root"),
        ):
            answer = await http.post("/v1/execute", json={**body, **change})
            assert answer.status_code == 422 and answer.json()["errors"][0]["field"] == field, answer.text
        assert (await http.post("/v1/execute", json=body, headers={"Authorization": ""})).status_code == 401


async def test_a_call_whose_client_has_gone_ends(service):
    """Both places sleep for clients that do not wait: the next call is served all the same."""
    body = {"program": {"language": "python", "source": "import time\ntime.sleep(100)"}, "cases": [{}] * 3}
    body["limits"] = {"wall_seconds": 200}
    async with httpx.AsyncClient(base_url=service, headers={"Authorization": "Bearer word"}, timeout=60) as http:

        async def abandoned() -> None:
            with pytest.raises(httpx.ReadTimeout):
                await http.post("/v1/execute", json=body, timeout=httpx.Timeout(60, read=2))

        await asyncio.gather(*(abandoned() for _ in range(12)))
        answer = await http.post(
            "/v1/execute",
            json={"program": {"language": "python", "source": "print(1)"}, "cases": [{}]},
            headers={"X-Deadline-Seconds": "40"},
        )
        assert answer.json()["results"][0]["status"] == "ok", answer.text
        metrics = (await http.get("/metrics")).text
    assert re.search(r'requests_total\{route="/v1/execute",service="sandbox",status="499"\} \d+', metrics)


async def test_a_service_that_is_not_there_is_no_zero(monkeypatch):
    monkeypatch.setattr("reward_server.sandbox.remote.RETRY_SECONDS", 0.0)
    remote = RemoteSandbox("http://127.0.0.1:9")
    with pytest.raises(StartupError, match="127.0.0.1:9"):
        await remote.start()
    (result,) = await run(remote, "print(1)")
    assert result.status == "error" and "127.0.0.1:9" in remote.state()
    await remote.stop()


def rlif(*arguments, **options):
    return subprocess.Popen([sys.executable, "-m", "services.cli.main", *arguments], stderr=subprocess.PIPE, **options)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["serve", "sandbox", "--languages", "cobol"], b"rlif: --languages cobol: choose from python, cpp\n"),
        (["serve", "reward", "--sandbox", "docker"], b"rlif: --sandbox docker: choose none, bubblewrap, "),
    ],
)
def test_the_command_refuses_in_one_line(arguments, said):
    process = rlif(*arguments)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2 and stderr.startswith(said) and stderr.count(b"\n") == 1


async def test_the_command_serves_a_sandbox_and_ends_at_sigterm():
    await (await started(Bubblewrap(frozenset({"python"})))).stop()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = rlif("serve", "sandbox", "--languages", "python", "--concurrency", "1", "--port", str(port))
    try:
        remote = RemoteSandbox(f"http://127.0.0.1:{port}")
        await remote.start()
        assert told(await run(remote, DOUBLE["python"], "21")) == [("ok", "42")]
        await remote.stop()
        process.terminate()
        assert await asyncio.to_thread(process.wait, 60) == -signal.SIGTERM
    finally:
        process.kill()
        process.communicate()
