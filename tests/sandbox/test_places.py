"""Places, turns, start-up and readiness."""

import asyncio
import os
import resource
import shutil
import time

import pytest
from sandbox.programs import run, told
from sandboxes import started

from reward_server import child
from reward_server.sandbox import bubblewrap, provider
from reward_server.sandbox.bubblewrap import Bubblewrap
from reward_server.sandbox.choice import choose
from reward_server.sandbox.piston import Piston
from reward_server.sandbox.provider import Busy, Case, CaseResult, Limits, Places, in_turn
from services.startup import StartupError

pytestmark = pytest.mark.alone


async def test_places_are_bounded_and_so_is_the_queue():
    places, running, most, admitted_at_once = Places(2, 3), 0, 0, 0
    admitted = 2 * provider.PROGRAMS_A_PLACE

    async def one():
        nonlocal running, most, admitted_at_once
        async with places.program(time.monotonic() + 60):
            admitted_at_once = max(admitted_at_once, admitted - places.programs._value)
            async with places.free:
                running += 1
                most = max(most, running)
                await asyncio.sleep(0.01)
                running -= 1

    results = await asyncio.gather(*(one() for _ in range(admitted + 3 + 4)), return_exceptions=True)
    assert most == 2 and admitted_at_once == admitted
    assert sum(isinstance(result, Busy) for result in results) == 4
    assert places.waiting == 0 and places.programs._value == admitted


async def test_programs_that_wait_hold_no_descriptor():
    sandbox = await started(Bubblewrap(frozenset({"python"}), concurrency=1))
    before = len(os.listdir("/proc/self/fd"))
    most = 0

    async def one() -> None:
        nonlocal most
        assert told(await run(sandbox, "print(1)")) == [("ok", "1")]
        most = max(most, len(os.listdir("/proc/self/fd")))

    await asyncio.gather(*(one() for _ in range(30)))
    assert most < before + 24
    await sandbox.stop()


async def test_out_of_descriptors_is_an_error_of_that_program_and_leaks_none():
    sandbox = await started(Bubblewrap(frozenset({"python"}), concurrency=2))
    before = set(map(int, os.listdir("/proc/self/fd")))
    free = [number for number in range(100 + len(before)) if number not in before]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        for spare in range(0, 24, 2):
            resource.setrlimit(resource.RLIMIT_NOFILE, (free[spare], limits[1]))
            results = await asyncio.gather(*(run(sandbox, "print(1)") for _ in range(3)))
            assert {result.status for (result,) in results} <= {"error", "ok"}
            if not spare:
                assert "Too many open files" in results[0][0].detail and "Too many" in sandbox.state()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert told(await run(sandbox, "print(1)")) == [("ok", "1")]
    await asyncio.sleep(0.05)
    assert len(os.listdir("/proc/self/fd")) <= len(before)
    await sandbox.stop()


async def test_a_fault_ends_a_programs_turn():
    statuses = iter(["ok", "crash", "error"])

    async def one(_case):
        return CaseResult(status=next(statuses), detail="down")

    results = await in_turn([Case()] * 5, Limits(), time.monotonic() + 10, one)
    assert [result.status for result in results] == ["ok", "crash", "error", "error", "error"]


async def test_without_bubblewrap_it_does_not_start(monkeypatch, tmp_path):
    for tool in ("python3", "prlimit", "setpriv"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    monkeypatch.setattr(bubblewrap, "PATH", str(tmp_path))
    sandbox = Bubblewrap()
    with pytest.raises(StartupError, match="needs the program bwrap .package bubblewrap"):
        await sandbox.start()
    with pytest.raises(StartupError, match="needs g.. for cpp"):
        await Bubblewrap(frozenset({"cpp"})).start()
    (tmp_path / "python3").unlink()
    with pytest.raises(StartupError, match="neither python3 nor g"):
        await Bubblewrap().start()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("--cap-drop", "ALL"), "capabilities"),
        (("--unshare-all",), "share a namespace with the server (net:"),
        (("--seccomp",), "system call filter"),
        (("--remount-ro",), "outside their folder"),
    ],
)
async def test_a_sandbox_that_does_not_hold_is_refused(change, said):
    """Each protection is taken away in turn: the trial at start-up notices."""
    await (await started(Bubblewrap(frozenset({"python"})))).stop()

    class Weakened(Bubblewrap):
        def _arguments(self, *given):
            arguments = super()._arguments(*given)
            place = arguments.index(change[0])
            if change[0] == "--unshare-all":
                arguments.insert(place + 1, "--share-net")
            elif change[0] == "--cap-drop":
                arguments[place : place + 2] = ["--cap-add", "CAP_CHOWN"]
            else:
                del arguments[place : place + 2]
            return arguments

    with pytest.raises(StartupError, match="does not hold here") as refused:
        await Weakened(frozenset({"python"})).start()
    assert said in str(refused.value) and "\n" not in str(refused.value)


async def test_the_number_of_processes_must_be_limited(monkeypatch):
    await (await started(Bubblewrap(frozenset({"python"})))).stop()
    monkeypatch.setattr(bubblewrap, "_rlimits", lambda _: ["--core=0:0"])
    with pytest.raises(StartupError, match="number of processes is not limited"):
        await Bubblewrap(frozenset({"python"})).start()


async def test_descriptors_of_the_server_are_noticed(monkeypatch):
    await (await started(Bubblewrap(frozenset({"python"})))).stop()
    closing = child.start

    async def leaking(command, *, pass_fds, **options):
        kept = [fd for fd in map(int, os.listdir("/proc/self/fd")) if os.path.exists(f"/proc/self/fd/{fd}")]
        inheritable = [fd for fd in kept if fd > 2 and os.get_inheritable(fd)]
        return await closing(command, pass_fds={*pass_fds, *inheritable}, **options)

    monkeypatch.setattr(child, "start", leaking)
    with pytest.raises(StartupError, match="other descriptors than stdin, stdout and stderr"):
        await Bubblewrap(frozenset({"python"})).start()


async def test_readiness_says_when_it_breaks_and_recovers(sandbox, monkeypatch):
    monkeypatch.setattr("reward_server.sandbox.health.RECOVERY_SECONDS", 0.05)
    whole = sandbox._system
    sandbox._system = ["--ro-bind", "/nowhere", "/nowhere"]
    (result,) = await run(sandbox, "print(1)")
    assert result.status == "error" and "nowhere" in result.detail
    assert "nowhere" in sandbox.state()
    sandbox._system = whole
    ends = time.monotonic() + 10
    while sandbox.state() != "ok" and time.monotonic() < ends:
        await asyncio.sleep(0.05)
    assert sandbox.state() == "ok"


@pytest.mark.parametrize("word", ["docker", "piston", "piston=localhost", "sandboxfusion=ftp://x", "http:/x", ""])
def test_an_unknown_sandbox_is_refused(word):
    with pytest.raises(StartupError, match="--sandbox"):
        choose(word)
    assert choose("none") is None and isinstance(choose("piston=http://localhost:2000"), Piston)
