"""Keeps the processes of one run on one machine alive until the main one is done.

A process that ends is started again with growing pauses, at most `MAX_RESTARTS` times without `CALM_SECONDS` in
between; exit code 2 (`EXIT_REFUSED`: it cannot start as asked) is final. Each child leads its own process group, so
that what it started goes with it, and is ended by the kernel when the supervisor dies.
"""

import ctypes
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

log = logging.getLogger(__name__)

EXIT_FAILED = 1
EXIT_REFUSED = 2
MAX_RESTARTS = 10
CALM_SECONDS = 120.0
STOP_SECONDS = 30.0
"""How long a process may take to stop after SIGTERM before it is killed."""
CHECKPOINT_SECONDS = 120
"""How long a trainer may take for that: it finishes its step and saves a checkpoint."""
TICK_SECONDS = 0.2
PR_SET_PDEATHSIG = 1


@dataclass
class Service:
    """One supervised process. `restart_args` are added from the second start on (the trainer's `--resume`)."""

    name: str
    argv: list[str]
    env: dict[str, str] = field(default_factory=dict)
    restart_args: list[str] = field(default_factory=list)
    may_finish: bool = False
    """Exit code 0 means done, not gone."""
    max_restarts: int | None = None
    """None: `MAX_RESTARTS`."""
    stop_seconds: float = STOP_SECONDS
    start_when: Callable[[], bool] = lambda: True
    """Asked on every tick until it says yes; the process starts then."""

    fault: str = ""
    """Why the run could not go on, where it was this process's doing."""
    process: subprocess.Popen | None = None
    noted: bool = True
    """Whether `processes.json` has the process."""
    restarts: int = 0
    started_at: float = 0.0
    start_after: float = 0.0
    finished: bool = False


def die_with_parent() -> None:
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _note_pid(logs: Path, service: Service) -> None:
    """`processes.json` beside the logs: who runs under which pid."""
    assert service.process
    path = logs / "processes.json"
    try:
        pids = json.loads(path.read_text()) if path.exists() else {}
        aside = path.with_suffix(".tmp")
        aside.write_text(json.dumps({**pids, service.name: service.process.pid}))
        aside.replace(path)
        service.noted = True
    except OSError as error:
        # A disk that is full for a while is no reason to end a run: the next tick tries again.
        if service.noted:
            log.warning("cannot note the processes in %s: %s", path, error)
        service.noted = False


def _start(service: Service, logs: Path) -> None:
    again = service.process is not None
    argv = service.argv + (service.restart_args if again else [])
    with (logs / f"{service.name}.log").open("ab") as out:
        service.process = subprocess.Popen(
            argv,
            env={**os.environ, **service.env},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent if sys.platform == "linux" else None,
        )
    service.started_at = time.monotonic()
    _note_pid(logs, service)
    log.info("%s %s (pid %d)", service.name, "started again" if again else "started", service.process.pid)


def _kill_group(process: subprocess.Popen, number: int) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass


def log_tail(logs: Path, name: str, lines: int = 12) -> str:
    path = logs / f"{name}.log"
    if not path.exists():
        return ""
    with path.open("rb") as handle:
        handle.seek(max(0, path.stat().st_size - 16384))
        text = handle.read().decode(errors="replace")
    return "\n".join(text.splitlines()[-lines:])


def _stop(services: list[Service]) -> None:
    """SIGTERM one after the other, the last started first, so that each still finds what it needs to stop cleanly."""
    for service in reversed(services):
        process = service.process
        if process is None:
            continue
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(service.stop_seconds)
            except subprocess.TimeoutExpired:
                log.warning("%s did not stop within %.0f s: killing it", service.name, service.stop_seconds)
        _kill_group(process, signal.SIGKILL)
        process.wait(10)


def _review(service: Service, logs: Path) -> str | None:
    """Note what became of a process; returns why the run cannot go on, if it cannot."""
    assert service.process
    code = service.process.poll()
    if code is None or service.start_after:
        return None
    _kill_group(service.process, signal.SIGKILL)
    if code == 0 and service.may_finish:
        service.finished = True
        return None
    if code == EXIT_REFUSED:
        return f"{service.name} refused to start:\n{log_tail(logs, service.name)}"
    if time.monotonic() - service.started_at > CALM_SECONDS:
        service.restarts = 0
    service.restarts += 1
    limit = MAX_RESTARTS if service.max_restarts is None else service.max_restarts
    if service.restarts > limit:
        times = f"{service.restarts} times in a row" if limit else f"with exit code {code}"
        return f"{service.name} ended {times}:\n{log_tail(logs, service.name)}"
    pause = min(30.0, 0.5 * 2 ** (service.restarts - 1))
    service.start_after = time.monotonic() + pause
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    log.warning("%s ended (%s); starting it again in %.1f s", service.name, how, pause)
    return None


def supervise(
    services: list[Service],
    main: str | None,
    logs: Path,
    on_tick: Callable[[list[Service]], None] | None = None,
    until: Callable[[], int | None] = lambda: None,
) -> int:
    """Run `services` until the one named `main` has finished, or a stop signal comes. Returns an exit code.

    `on_tick` is called a few times a second (for progress), and so is `until`: an exit code of it ends everything.
    SIGINT and SIGTERM stop everything cleanly: 130 or 143.
    """
    stop_signal = 0

    def on_signal(number: int, _frame: object) -> None:
        nonlocal stop_signal
        stop_signal = number

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        logs.mkdir(parents=True, exist_ok=True)
        while True:
            for service in services:
                if service.finished:
                    continue
                if service.process is None:
                    if service.start_when():
                        _start(service, logs)
                    continue
                if service.start_after and time.monotonic() >= service.start_after:
                    service.start_after = 0.0
                    _start(service, logs)
                if not service.noted:
                    _note_pid(logs, service)
                fatal = _review(service, logs)
                if fatal:
                    service.fault = fatal
                    log.error("%s", fatal)
                    assert service.process
                    return EXIT_REFUSED if service.process.returncode == EXIT_REFUSED else EXIT_FAILED
                if service.finished and service.name == main:
                    return 0
            if stop_signal:
                log.info("stopping (%s)", signal.Signals(stop_signal).name)
                return 128 + stop_signal
            code = until()
            if code is not None:
                return code
            if on_tick:
                on_tick(services)
            time.sleep(TICK_SECONDS)
    except OSError as error:  # a full disk, or no more processes
        log.error("the run cannot go on: %s", error)
        return EXIT_FAILED
    finally:
        _stop(services)
        for number, handler in previous.items():
            signal.signal(number, handler)
