"""Child processes of servers: whatever the event loop, they inherit what they are given and nothing else."""

import asyncio
import os
from contextlib import contextmanager

import pytest
import uvloop

from reward_server import child
from reward_server.workers import WorkerPool

pytestmark = pytest.mark.alone

LOOPS = pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])


@contextmanager
def inherited(number: int = 77):
    """A descriptor as a shell, a supervisor or a library leaves it to a server: open, and inherited by children."""
    folder = os.open("/", os.O_RDONLY)
    os.dup2(folder, number, inheritable=True)
    try:
        yield number
    finally:
        os.close(number)
        os.close(folder)


def descriptors(pid: int | str = "self") -> set[int]:
    return {int(name) for name in os.listdir(f"/proc/{pid}/fd")}


@LOOPS
def test_a_child_inherits_what_it_is_given_and_nothing_else(run):
    async def main() -> None:
        reads, writes = os.pipe()
        process = await child.start(["sh", "-c", "echo up; read word"], stderr=child.PIPE, pass_fds=[writes], env={})
        assert process.stdout and await process.stdout.readline() == b"up\n"  # its libraries are loaded
        assert descriptors(process.pid) == {0, 1, 2, writes}
        process.kill()
        assert await process.wait() == process.returncode == -9
        process.close()
        os.close(reads)
        os.close(writes)

    with inherited():
        run(main())


@LOOPS
def test_verifier_processes_inherit_nothing(run):
    async def main() -> None:
        pool = WorkerPool(1)
        pool.start()
        async with asyncio.timeout(30):
            while not pool._alive:
                await asyncio.sleep(0.01)
        for process in pool._alive:
            assert number not in descriptors(process.process.pid)
        await pool.stop()

    with inherited() as number:
        run(main())


@LOOPS
def test_pipes_and_exit_codes_come_through_and_nothing_stays_open(run):
    async def main() -> None:
        await once()  # what the loop itself opens for the first one
        before = descriptors()
        for _ in range(3):
            await once()
        with pytest.raises(FileNotFoundError):
            await child.start(["/nowhere"])
        await asyncio.sleep(0.05)
        assert len(descriptors()) <= len(before)

    async def once() -> None:
        process = await child.start(["sh", "-c", "cat; echo bad >&2; exit 7"], stderr=child.PIPE)
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write(b"x" * 10**6)
        process.stdin.close()
        assert await process.stdout.read() == b"x" * 10**6 and await process.stderr.read() == b"bad\n"
        assert await process.wait() == 7
        process.close()

    run(main())


async def test_a_start_that_is_cancelled_or_out_of_descriptors_leaves_no_process(monkeypatch):
    started: list[int] = []

    class Noted(child.subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            started.append(self.pid)

    def refused(_pid: int) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(child.subprocess, "Popen", Noted)
    before = len(descriptors())
    with monkeypatch.context() as short, pytest.raises(OSError, match="Too many open files"):
        short.setattr(os, "pidfd_open", refused)
        await child.start(["sleep", "100"])
    task = asyncio.create_task(child.start(["sleep", "100"]))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with asyncio.timeout(30):
        while any(os.path.exists(f"/proc/{pid}") for pid in started):
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)
    assert len(started) == 2 and len(descriptors()) <= before
