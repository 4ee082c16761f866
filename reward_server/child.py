"""A child process on the event loop that inherits no descriptor but those it is given.

uvloop's own processes leave open whatever a server has inherited, and fork, which takes hundreds of milliseconds in a
process of gigabytes. `subprocess` closes all others, and blocks the loop for less than a millisecond (vfork).
"""

import asyncio
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import IO

PIPE = subprocess.PIPE


class Child:
    """`stdin`, `stdout` and `stderr` are there where they are pipes. Use inside the event loop that started it."""

    def __init__(self, process: subprocess.Popen, pidfd: int):
        self.process, self.pid = process, process.pid
        self.stdin: asyncio.StreamWriter | None = None
        self.stdout: asyncio.StreamReader | None = None
        self.stderr: asyncio.StreamReader | None = None
        self._pidfd = pidfd
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[int] = self._loop.create_future()
        self._readers: list[asyncio.ReadTransport] = []
        self._loop.add_reader(pidfd, self._reap)

    @property
    def returncode(self) -> int | None:
        """The exit code, or minus the signal that ended it; none while it runs. Until then its pid is its own."""
        return self.process.returncode

    def kill(self) -> None:
        """Does nothing when it has ended."""
        self.process.kill()

    async def wait(self) -> int:
        return await asyncio.shield(self._ended)

    def close(self) -> None:
        """Close our ends of its pipes, also while somebody else still holds the others."""
        if self.stdin:
            self.stdin.close()
        for transport in self._readers:
            transport.close()

    def _reap(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._ended.set_result(self.process.wait())

    async def _reader(self, pipe: IO[bytes]) -> asyncio.StreamReader:
        reader = asyncio.StreamReader()
        transport, _ = await self._loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
        self._readers.append(transport)
        return reader

    async def _writer(self, pipe: IO[bytes]) -> asyncio.StreamWriter:
        transport, protocol = await self._loop.connect_write_pipe(
            lambda: asyncio.streams.FlowControlMixin(self._loop), pipe
        )
        return asyncio.StreamWriter(transport, protocol, None, self._loop)


async def start(
    command: list[str],
    *,
    stdin: int = PIPE,
    stderr: int | None = None,
    pass_fds: Iterable[int] = (),
    env: dict[str, str] | None = None,
    folder: Path | None = None,
) -> Child:
    """Start `command`, whose stdout is a pipe, and stdin and stderr where PIPE is asked for.

    Raises OSError: it cannot be started. Cancelled, or failed, it leaves no process and no descriptor.
    """
    process = subprocess.Popen(
        command, bufsize=0, stdin=stdin, stdout=PIPE, stderr=stderr, pass_fds=tuple(pass_fds), env=env, cwd=folder
    )
    try:
        child = Child(process, os.pidfd_open(process.pid))
    except OSError:
        _discard(process)
        process.wait()
        raise
    try:
        assert process.stdout is not None
        child.stdout = await child._reader(process.stdout)
        child.stderr = await child._reader(process.stderr) if process.stderr else None
        child.stdin = await child._writer(process.stdin) if process.stdin else None
    except BaseException:
        _discard(process)
        child.close()
        raise
    return child


def _discard(process: subprocess.Popen) -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe:
            pipe.close()
