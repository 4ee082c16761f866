"""Processes that read untrusted text are given no secrets."""

import asyncio
import time
from contextlib import suppress

import psutil

from reward_server.workers import WorkerPool

SECRETS = {
    "RLIF_API_TOKEN": "hidden-1",
    "RLIF_ADMIN_TOKEN": "hidden-2",
    "RLIF_REDIS_URL": "unix:///hidden-3",
    "RLIF_KEY_JUDGE": "hidden-4",
    "HF_TOKEN": "hidden-5",
    "AWS_PROFILE": "hidden-6",
    "WANDB_API_KEY": "hidden-7",
    "DATABASE": "postgres://me:hidden-8@db/x",
}


def of_workers() -> list[dict[str, str]]:
    """The pool's own; other tests' children may end while they are looked at."""
    found = []
    for process in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if "worker_process" in " ".join(process.cmdline()):
                found.append(process.environ())
    return found


async def test_a_verifier_process_knows_no_secret(monkeypatch):
    for name, text in SECRETS.items():
        monkeypatch.setenv(name, text)
    monkeypatch.setenv("KEYBOARD", "plain")
    pool = WorkerPool(1)
    pool.start()
    try:
        ends = time.monotonic() + 30
        while not of_workers():
            assert time.monotonic() < ends
            await asyncio.sleep(0.05)
        (environment, *_) = of_workers()
        assert "hidden-" not in str(environment)
        assert environment["KEYBOARD"] == "plain" and "PATH" in environment
    finally:
        await pool.stop()
