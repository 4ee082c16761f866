"""The E2B provider with E2B's real SDK, against a small server that speaks the SDK's wire: not the real service."""

import asyncio
import json
import time
from base64 import b64encode

import pytest
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from served import served

from reward_server.sandbox.e2b import E2B
from reward_server.sandbox.provider import Case, Limits, Program
from services.startup import StartupError

pytestmark = pytest.mark.alone

pytest.importorskip("e2b")

FRAME, LAST = 0, 2
"""Flags of the Connect protocol's envelopes: a message, and the end of the stream."""


def envelope(flag: int, body: bytes) -> bytes:
    return bytes([flag]) + len(body).to_bytes(4, "big") + body


def cloud(home) -> FastAPI:
    """Sandboxes that all live in the folder `home`; commands are run by the machine's own bash."""
    app = FastAPI()
    app.state.asked, app.state.killed, app.state.is_down = [], [], False

    @app.post("/v2/sandboxes", status_code=201)
    async def make(request: Request) -> Response:
        if app.state.is_down:
            return JSONResponse({"code": 500, "message": "out of capacity"}, 500)
        app.state.asked.append(await request.json())
        box = {"templateID": "base", "sandboxID": "box", "clientID": "x", "envdVersion": "0.5.8"}
        return JSONResponse(box, 201)

    @app.delete("/sandboxes/{name}", status_code=204)
    async def kill(name: str) -> Response:
        app.state.killed.append(name)
        return Response(status_code=204)

    @app.post("/files")
    async def write(path: str, request: Request) -> list:
        form = await request.form()
        (home / path).write_bytes(await form["file"].read())
        return [{"name": path, "type": "file", "path": str(home / path)}]

    @app.post("/process.Process/Start")
    async def start(request: Request) -> Response:
        assert request.headers["content-type"] == "application/connect+json"
        config = json.loads((await request.body())[5:])["process"]
        bash = await asyncio.create_subprocess_exec(
            config["cmd"], *config["args"][1:], cwd=home, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )

        def event(**told: dict) -> bytes:
            return envelope(FRAME, json.dumps({"event": told}).encode())

        async def stream():
            yield event(start={"pid": bash.pid})
            try:
                stdout, stderr = await bash.communicate()
            except asyncio.CancelledError:
                bash.kill()
                raise
            yield event(data={"stdout": b64encode(stdout).decode()})
            yield event(data={"stderr": b64encode(stderr).decode()})
            yield event(end={"exitCode": bash.returncode, "exited": True})
            yield envelope(LAST, b"{}")

        return StreamingResponse(stream(), media_type="application/connect+json")

    return app


@pytest.fixture
def server(tmp_path, monkeypatch):
    app = cloud(tmp_path)
    with served(app) as url:
        settings = {"E2B_API_URL": url, "E2B_SANDBOX_URL": url, "E2B_HTTP_VERSION": "1.1"}
        for name, value in {**settings, "E2B_API_KEY": f"e2b_{'0' * 40}"}.items():
            monkeypatch.setenv(name, value)
        yield app


async def run(source, *stdins, language="python", **limits):
    sandbox = E2B()
    await sandbox.start()
    program = Program(language=language, source=source)
    cases = [Case(stdin=stdin) for stdin in stdins]
    results = await sandbox.run(program, cases, Limits(**limits), time.monotonic() + 60)
    await sandbox.stop()
    return results, sandbox


async def test_programs_run_by_the_sdk(server):
    source = "word = input()\nif word == 'bad': 1 / 0\nprint(word)"
    results, _ = await run(source, "a", "bad", "ü")
    assert [(result.status, result.stdout.strip()) for result in results] == [("ok", "a"), ("crash", ""), ("ok", "ü")]
    assert "ZeroDivisionError" in results[1].stderr and results[1].exit_code == 1
    assert server.state.asked[0]["allow_internet_access"] is False and server.state.killed == ["box"]


@pytest.mark.usefixtures("server")
async def test_cpp_is_compiled_once():
    source = "#include <iostream>\nint main() { long x; std::cin >> x; std::cout << 2 * x; }"
    results, _ = await run(source, "1", "21", language="cpp", memory_mb=1024)
    assert [result.stdout for result in results] == ["2", "42"]
    results, _ = await run("int main() { return x; }", "1", "2", language="cpp")
    assert [result.status for result in results] == ["compile", "compile"] and "not declared" in results[0].stderr


@pytest.mark.usefixtures("server")
async def test_limits_are_reported():
    results, _ = await run("print('x' * 1000)", "", output_bytes=100)
    assert results[0].status == "output"
    results, _ = await run("while True: print('x' * 1000)", "", output_bytes=100)
    assert results[0].status == "output"
    results, _ = await run("import time\nif input(): time.sleep(100)\nprint(1)", "1", "\n", wall_seconds=1)
    assert [result.status for result in results] == ["timeout", "ok"]


async def test_a_failing_cloud_is_no_zero(server):
    server.state.is_down = True
    results, sandbox = await run("print(1)", "", "")
    assert [result.status for result in results] == ["error", "error"] and "E2B failed" in results[0].detail


async def test_without_a_key_it_does_not_start(monkeypatch):
    monkeypatch.delenv("E2B_API_KEY", raising=False)
    with pytest.raises(StartupError, match="set E2B_API_KEY"):
        await E2B().start()
