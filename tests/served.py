"""A FastAPI app behind a real uvicorn server in a thread of the test process; ports for others."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from services.address import listen
from services.startup import StartupError


@contextmanager
def served(app: FastAPI, deadline_seconds: float = 60) -> Iterator[str]:
    """Yields the base URL; stops the server at the end."""
    bound = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    ends = time.monotonic() + deadline_seconds
    while not server.started:
        if not thread.is_alive() or time.monotonic() > ends:
            raise RuntimeError("the test server did not start")
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        bound.close()
        assert not thread.is_alive(), "the test server did not stop"


@contextmanager
def two_free_ports() -> Iterator[int]:
    """A port and the next one."""
    for port in range(20000 + os.getpid() % 10000, 60000, 2):
        try:
            with listen("127.0.0.1", port), listen("127.0.0.1", port + 1):
                pass
        except StartupError:
            continue
        yield port
        return
