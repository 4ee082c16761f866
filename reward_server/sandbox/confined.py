"""One command under bubblewrap: its outputs read with a cap, its process tree watched, and all of it ended."""

import asyncio
import fcntl
import json
import logging
import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from reward_server import child
from reward_server.sandbox import process_tree
from reward_server.sandbox.provider import Limits

log = logging.getLogger(__name__)

STDERR_TAIL = 4096
MOST_FILES = 4096
FIRST_PAUSE, LONGEST_PAUSE = 0.01, 0.05
"""Seconds between two looks at the process tree: it overshoots a limit by what it can do in that time."""
END_SECONDS = 10.0
MOST_WALL = 3
"""Times the wall limit that a program gets where others have the CPUs."""

Limit = Literal["timeout", "memory", "output", "deadline"]


class SetupFailed(Exception):
    """The command was never started: the sandbox could not be set up."""


@dataclass
class Run:
    """`over` names the limit at which the command was ended; `exit_code` is there when it ended by itself."""

    stdout: bytearray = field(default_factory=bytearray)
    stderr: bytearray = field(default_factory=bytearray)
    exit_code: int | None = None
    over: Limit | None = None
    detail: str = ""
    seconds: float = 0.0
    stopped: asyncio.Event = field(default_factory=asyncio.Event)

    def stop(self, over: Limit, detail: str) -> None:
        if self.over is None:
            self.over, self.detail = over, detail
            self.stopped.set()


def sealed(content: bytes) -> int:
    """A file in memory that nobody can change any more, not even through /proc. The caller closes it."""
    fd = os.memfd_create("rlif", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(fd), "wb") as file:
            file.write(content)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
        os.fchmod(fd, 0o555)
    except BaseException:
        os.close(fd)
        raise
    return fd


def reopened(fd: int) -> int:
    """The same file from its beginning, whoever else reads it. The caller closes it."""
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)


async def run(command: list[str], stdin: int, fds: list[int], report: int, limits: Limits, most_stdout: int) -> Run:
    """Run `command`, a bubblewrap call that inherits `fds`; `report` is the end we read of its --json-status-fd.
    More than `most_stdout` bytes to stdout end it.

    Raises SetupFailed, and OSError where it cannot be started or watched. However it ends, cancelled too, no process of
    the tree is left.
    """
    run = Run()
    work = asyncio.create_task(_run(run, command, stdin, fds, report, limits, most_stdout))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        # Not the work itself is cancelled, which may be about to start the process.
        run.stopped.set()
        with suppress(SetupFailed, OSError):
            await work
        raise


async def _run(
    run: Run, command: list[str], stdin: int, fds: list[int], report: int, limits: Limits, most_stdout: int
) -> Run:
    started = time.monotonic()
    process = await child.start(command, stdin=stdin, stderr=child.PIPE, pass_fds=fds, env={}, folder=Path("/"))
    assert process.stdout is not None and process.stderr is not None
    ended = asyncio.create_task(process.wait())
    stopped = asyncio.create_task(run.stopped.wait())
    watcher = asyncio.create_task(_watch(process.pid, run, limits))
    readers = [
        asyncio.create_task(_read(process.stdout, run.stdout, most_stdout, run, "stdout", most_stdout)),
        asyncio.create_task(_read(process.stderr, run.stderr, STDERR_TAIL, run, "stderr", limits.output_bytes)),
    ]
    try:
        most = MOST_WALL * limits.wall_seconds
        await asyncio.wait({ended, stopped, watcher}, timeout=most, return_when=asyncio.FIRST_COMPLETED)
        if not any(task.done() for task in (ended, stopped, watcher)):
            run.stop("deadline", f"no end within {most:g} s, in which it waited for a CPU: the machine is too busy")
    finally:
        watcher.cancel()
        stopped.cancel()
        if process.returncode is None:
            await _kill(process.pid)
        _, still = await asyncio.wait({ended, *readers}, timeout=END_SECONDS)
        if still:
            log.error("a sandbox did not end within %.0f s of being killed", END_SECONDS)
            for task in still:
                task.cancel()
        process.close()
    run.seconds = time.monotonic() - started
    with suppress(asyncio.CancelledError):
        await watcher  # it may have failed: what was not watched has no result
    _conclude(run, report)
    return run


async def _kill(pid: int) -> None:
    """Kill bubblewrap and its only child, the first process of the sandbox: the whole namespace dies with that one.

    bubblewrap binds the child's life to its own (--die-with-parent) only once it has set the sandbox up; it is stopped
    first, so that it cannot start the child after we looked.
    """
    with suppress(OSError):  # it is gone, or we are out of descriptors; --die-with-parent is then all there is
        os.kill(pid, signal.SIGSTOP)
        ends = time.monotonic() + END_SECONDS
        while process_tree.state(pid) not in "TtZX" and time.monotonic() < ends:
            await asyncio.sleep(0.001)
        for first in process_tree.children(pid):
            os.kill(first, signal.SIGKILL)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


async def _read(stream: asyncio.StreamReader, kept: bytearray, keep: int, run: Run, name: str, most: int) -> None:
    """Read to the end, whatever comes, so that no writer blocks; keep the last `keep` bytes."""
    count = 0
    while chunk := await stream.read(65536):
        count += len(chunk)
        if count > most:
            run.stop("output", f"more than {most} bytes to {name}")
        kept += chunk
        del kept[:-keep]


async def _watch(pid: int, run: Run, limits: Limits) -> None:
    """The wall limit is for waiting that is the program's own. What does not count is time in which it wanted a CPU and
    had none: a task of the tree can run, and no CPU time came of it."""
    pause, before, own_seconds = FIRST_PAUSE, time.monotonic(), 0.0
    usage = process_tree.Usage([pid])
    while not run.stopped.is_set():
        await asyncio.sleep(pause)
        pause = min(LONGEST_PAUSE, 1.5 * pause)
        now, last, usage = time.monotonic(), usage, process_tree.usage(pid, usage)
        took, got = now - before, usage.cpu_seconds - last.cpu_seconds
        own_seconds += min(took, max(0.0, got)) if usage.is_runnable else took
        before = now
        if own_seconds > limits.wall_seconds:
            run.stop("timeout", f"no end within {limits.wall_seconds:g} s")
        if usage.cpu_seconds > limits.seconds:
            run.stop("timeout", f"more than {limits.seconds:g} s of CPU time")
        most = limits.memory_mb * 2**20
        if usage.memory_bytes > most and process_tree.memory(usage.pids) > most:
            run.stop("memory", f"more than {limits.memory_mb} MB of memory")
        if process_tree.files_in(usage.pids[-1], "/tmp") > MOST_FILES:
            run.stop("output", f"more than {MOST_FILES} files")


def _conclude(run: Run, report: int) -> None:
    """Take the exit code from bubblewrap's own report, which is there only if the command was started."""
    os.set_blocking(report, False)
    try:
        lines = os.read(report, 65536).splitlines()
    except BlockingIOError:
        lines = []
    codes = [code for line in lines if (code := json.loads(line).get("exit-code")) is not None]
    if codes:
        run.exit_code = codes[-1]
    elif not run.stopped.is_set():
        said = run.stderr.decode(errors="replace").strip().splitlines()
        raise SetupFailed(said[-1][:300] if said else "bubblewrap ended without a word")
