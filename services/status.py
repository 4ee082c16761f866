"""Health, readiness and metrics of a process that is no server: a small app in a thread beside its work."""

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import uvicorn
from fastapi import APIRouter

from services import connections
from services.access import HttpSettings, settings_from_environment
from services.address import listen
from services.http import create_app
from services.startup import StartupError

log = logging.getLogger(__name__)

MOST_CONNECTIONS = 128


@contextmanager
def serving_status(
    service: str,
    port: int,
    ready: Callable[[], dict[str, str]],
    status: Callable[[], dict[str, Any]] | None = None,
    routes: Callable[[HttpSettings], APIRouter] | None = None,
    pages: frozenset[str] = frozenset(),
) -> Iterator[int]:
    """`/healthz`, `/readyz`, `/metrics` and, with `status`, `GET /v1/status` on `port` (0: any free one, yielded).
    `routes` makes further ones, of which `pages` are for browsers (`create_app`).

    Both functions are called in another thread than the caller's. With RLIF_API_TOKEN set it listens on
    RLIF_STATUS_HOST, or everywhere, otherwise on loopback. Raises StartupError when the port is taken.
    """
    host = os.environ.get("RLIF_STATUS_HOST", "0.0.0.0") if os.environ.get("RLIF_API_TOKEN") else "127.0.0.1"
    settings = settings_from_environment(host)
    app = create_app(service, version("rlif"), settings, ready, pages=pages)
    if routes is not None:
        app.include_router(routes(settings))
    if status is not None:

        @app.get("/v1/status", tags=["run"])
        async def run_status() -> dict[str, Any]:
            """What the process has done, and where the run stands."""
            return status()

    try:
        bound = listen(host, port)
    except StartupError as error:
        raise StartupError(f"tracking.metrics_port: the {service} {error}") from error
    # In a thread uvicorn leaves the process's signals alone.
    config = uvicorn.Config(
        app,
        http=connections.protocol(min(MOST_CONNECTIONS, connections.raise_open_files())),
        ws="none",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=2,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, name="status", daemon=True)
    thread.start()
    log.info("status and metrics on http://%s:%d", host, bound.getsockname()[1])
    try:
        yield bound.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(10)
        bound.close()
