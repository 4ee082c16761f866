"""The child of `reward_server.workers`: runs checks one after another, each under limits.

Frames on stdin and stdout: 4 bytes big-endian length, then msgpack. A request names a function of ours as
"module:function" (never the caller's words), its payload, and its limits `cpu_seconds` and `wall_seconds`: the first
bounds the work, whatever else the machine does, the second the waiting. The answer is one of
{"status": "ok", "result": {...}}, {"status": "timeout"}, {"status": "error", "detail": str}.
"""

import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any, BinaryIO

import msgpack

HEADER = 4
AGAIN_SECONDS = 0.5
"""The alarm repeats: library code with a bare `except:` may swallow the first one."""


class SoftLimit(BaseException):
    """The check's time is up. Not an Exception, so that `except Exception` in a library does not swallow it."""


class Exhausted(BaseException):
    """A check raises this for a failure of resources that must not be taken for a verdict."""


armed = False


def _on_alarm(_signum: int, _frame: object) -> None:
    if armed:
        raise SoftLimit


def _arm(cpu_seconds: float, wall_seconds: float) -> None:
    global armed
    # The kernel ends this process should it run on in C code after its parent, who else kills it, is gone.
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + 2 * wall_seconds) + 5, most))
    armed = True
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds, AGAIN_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, wall_seconds, AGAIN_SECONDS)


def _disarm() -> None:
    global armed
    armed = False
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)


def _call(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    module, _, function = name.partition(":")
    return getattr(import_module(module), function)


def _run(request: dict[str, Any]) -> dict[str, Any]:
    try:
        check = _call(request["check"])
        _arm(request["cpu_seconds"], request["wall_seconds"])
        return {"status": "ok", "result": check(request["payload"])}
    except (MemoryError, Exhausted) as error:
        return {"status": "error", "detail": f"out of resources: {str(error) or type(error).__name__}"[:500]}
    except Exception as error:
        # Only plain text: printing an object of a computer-algebra library can itself run for ever.
        said = " ".join(item for item in error.args if isinstance(item, str))
        return {"status": "error", "detail": f"{type(error).__name__}: {said}"[:500]}
    finally:
        _disarm()


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Run one check. The alarm may also strike while `_run` is already leaving, hence the second net."""
    try:
        return _run(request)
    except SoftLimit:
        _disarm()
        return {"status": "timeout"}


def _read(stream: BinaryIO) -> dict[str, Any] | None:
    header = stream.read(HEADER)
    if len(header) < HEADER:
        return None
    body = stream.read(int.from_bytes(header, "big"))
    return msgpack.unpackb(body, raw=False)


def main(memory_bytes: int) -> None:
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever a library prints must not land among the frames
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal group; the parent ends us
    signal.signal(signal.SIGPROF, _on_alarm)
    signal.signal(signal.SIGALRM, _on_alarm)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while (request := _read(sys.stdin.buffer)) is not None:
        body = msgpack.packb(answer(request), use_bin_type=True)
        answers.write(len(body).to_bytes(HEADER, "big") + body)
