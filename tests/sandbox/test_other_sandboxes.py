"""SandboxFusion and Piston: small servers that speak their documented wire, not the real ones."""

import asyncio
import time

import pytest
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from sandbox.programs import run, told
from served import served

from reward_server.sandbox.piston import Piston
from reward_server.sandbox.sandboxfusion import SandboxFusion
from services.startup import StartupError

pytestmark = pytest.mark.alone


def answering(path: str, answer) -> FastAPI:
    """`answer(body)` gives the JSON of POST `path`; the requests are kept in `app.state.bodies`."""
    app = FastAPI()
    app.state.bodies = []

    @app.post(path)
    async def post(request: Request) -> Response:
        body = await request.json()
        app.state.bodies.append(body)
        given = answer(body)
        return given if isinstance(given, Response) else JSONResponse(given)

    @app.get("/v1/ping")
    async def ping() -> str:
        return "pong"

    @app.get("/api/v2/runtimes")
    async def runtimes() -> list:
        return [
            {"language": "python", "version": "3.12.0", "aliases": ["py"]},
            {"language": "gcc", "version": "10.2.0", "aliases": ["c++", "cpp"]},
        ]

    return app


def ran(stdout="", status="Finished", code=0, stderr=""):
    return {"status": status, "execution_time": 0.1, "return_code": code, "stdout": stdout, "stderr": stderr}


FUSION = {
    "fine": ({"status": "Success", "message": "", "run_result": ran("4\n")}, "ok"),
    "crash": ({"status": "Failed", "message": "", "run_result": ran("", code=1, stderr="boom")}, "crash"),
    "late": ({"status": "Failed", "message": "", "run_result": ran("", "TimeLimitExceeded", None)}, "timeout"),
    "syntax": (
        {"status": "Failed", "message": "", "compile_result": ran(code=1, stderr="bad"), "run_result": None},
        "compile",
    ),
    "flood": ({"status": "Success", "message": "", "run_result": ran("x" * 100)}, "output"),
    "down": ({"status": "SandboxError", "message": "no worker"}, "error"),
    "strange": ({"status": "Success", "message": ""}, "error"),
    "list": ([], "error"),
    "refused": (JSONResponse({"detail": "no"}, 422), "error"),
    "text": (Response("hello"), "error"),
}


async def test_sandboxfusion():
    app = answering("/run_code", lambda body: FUSION[body["code"]][0])
    with served(app) as url:
        fusion = SandboxFusion(url)
        await fusion.start()
        for code, (_, status) in FUSION.items():
            (result,) = await run(fusion, code, "in", language="cpp", wall_seconds=3, memory_mb=64, output_bytes=50)
            assert result.status == status, (code, result)
        assert told(await run(fusion, "fine", "1", "2")) == [("ok", "4"), ("ok", "4")]
        assert fusion.state() == "ok"
        await fusion.stop()
    assert app.state.bodies[0] == {
        "code": "fine",
        "language": "cpp",
        "stdin": "in",
        "compile_timeout": 30.0,
        "run_timeout": 3.0,
        "memory_limit_MB": 64,
        "files": {},
        "fetch_files": [],
    }


def stage(stdout="", code=0, signal=None, **more):
    return {"stdout": stdout, "stderr": "", "output": stdout, "code": code, "signal": signal, **more}


PISTON = {
    "fine": ({"run": stage("4\n")}, "ok"),
    "fine of a newer server": ({"run": stage("4\n", status=None, message=None)}, "ok"),
    "crash": ({"run": stage(code=1)}, "crash"),
    "signal": ({"run": stage(code=None, signal="SIGSEGV")}, "crash"),
    "late": ({"run": stage(code=None, signal="SIGKILL", status="TO")}, "timeout"),
    "flood": ({"run": stage(code=None, signal="SIGKILL", status="OL")}, "output"),
    "syntax": ({"compile": stage(code=1), "run": stage(code=None)}, "compile"),
    "down": ({"run": stage(code=None, status="XX", message="no box")}, "error"),
    "strange": ({"message": "what?"}, "error"),
    "refused": (JSONResponse({"message": "runtime is unknown"}, 400), "error"),
}


async def test_piston():
    app = answering("/api/v2/execute", lambda body: PISTON[body["files"][0]["content"]][0])
    with served(app) as url:
        piston = Piston(url)
        await piston.start()
        assert piston.languages == {"python", "cpp"}
        for code, (_, status) in PISTON.items():
            (result,) = await run(piston, code, "in", language="cpp", wall_seconds=3, memory_mb=64)
            assert result.status == status, (code, result)
        await piston.stop()
    assert app.state.bodies[0] == {
        "language": "c++",
        "version": "10.2.0",
        "files": [{"name": "main.cpp", "content": "fine"}],
        "stdin": "in",
        "compile_timeout": 30000,
        "run_timeout": 3000,
        "run_memory_limit": 64 * 2**20,
    }


async def test_an_older_piston_kills_at_its_time_limit():
    def slowly(_body):
        time.sleep(0.3)
        return {"run": stage(code=None, signal="SIGKILL")}

    with served(answering("/api/v2/execute", slowly)) as url:
        piston = Piston(url)
        await piston.start()
        (late,) = await run(piston, "x", wall_seconds=0.2)
        (early,) = await run(piston, "x", wall_seconds=30)
        assert (late.status, early.status) == ("timeout", "crash")
        await piston.stop()


@pytest.mark.parametrize("provider", [SandboxFusion, Piston])
async def test_a_busy_server_is_asked_again_and_a_dead_one_is_an_error(provider, monkeypatch):
    answers = iter([Response(status_code=429), Response(status_code=503)])
    fine = {"status": "Success", "message": "", "run_result": ran("4"), "run": stage("4")}
    path = "/run_code" if provider is SandboxFusion else "/api/v2/execute"
    monkeypatch.setattr("reward_server.sandbox.health.RECOVERY_SECONDS", 0.05)
    app = answering(path, lambda _: next(answers, fine))
    with served(app) as url:
        sandbox = provider(url)
        await sandbox.start()
        assert told(await run(sandbox, "x")) == [("ok", "4")]
        assert len(app.state.bodies) == 3
    monkeypatch.setattr("reward_server.sandbox.wire.RETRY_SECONDS", 0.0)
    (result,) = await run(sandbox, "x")
    assert result.status == "error" and sandbox.state() != "ok"
    await sandbox.stop()


async def test_a_hanging_server_meets_the_deadline():
    app = FastAPI()

    @app.post("/run_code")
    async def hang() -> None:
        await asyncio.sleep(1)

    with served(app) as url:
        fusion = SandboxFusion(url)
        await fusion.start()
        results = await run(fusion, "x", "1", "2", seconds=0.3)
        assert [result.status for result in results] == ["deadline", "deadline"]
        await fusion.stop()


async def test_a_piston_without_our_languages_does_not_start():
    app = FastAPI()

    @app.get("/api/v2/runtimes")
    async def runtimes() -> list:
        return [{"language": "bash", "version": "5.1.0", "aliases": ["sh"]}]

    with served(app) as url:
        with pytest.raises(StartupError, match="neither python nor c"):
            await Piston(url).start()
