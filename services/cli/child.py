"""A server as a child process of a command that needs one for a while."""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx

from services.address import free_port
from services.cli.launch import RLIF
from services.startup import StartupError
from services.supervisor import die_with_parent


@contextmanager
def starting(kind: str, *options: str, env: dict[str, str] | None = None) -> Iterator[Callable[[float], str]]:
    """`rlif serve <kind> <options>` on a free loopback port, stopped at the end; `env` is added to the environment.

    Yields what waits for it, at most so many seconds, and returns its URL once it is ready. That raises StartupError
    with the end of the server's log when it does not become ready.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(
            [*RLIF, "serve", kind, "--port", str(port), *options],
            env={**os.environ, **(env or {})},
            stdout=out,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent,
        )

        def ready(deadline_seconds: float) -> str:
            _wait_ready(kind, url, process, out, deadline_seconds)
            return url

        try:
            yield ready
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def serving(kind: str, *options: str, deadline_seconds: float = 300.0) -> Iterator[str]:
    """`starting`, waited for: yields the URL of a server that is ready."""
    with starting(kind, *options) as ready:
        yield ready(deadline_seconds)


def _wait_ready(kind: str, url: str, process: subprocess.Popen, out, deadline_seconds: float) -> None:
    ends = time.monotonic() + deadline_seconds
    while True:
        try:
            if httpx.get(f"{url}/readyz", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        if process.poll() is not None or time.monotonic() > ends:
            out.seek(0)
            said = out.read().decode(errors="replace").strip().splitlines()
            what = "ended" if process.poll() is not None else f"was not ready within {deadline_seconds:.0f} s"
            raise StartupError(f"the {kind} server {what}: " + "\n".join(said[-5:]).removeprefix("rlif: "))
        time.sleep(0.1)
