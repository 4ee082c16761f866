"""Logging for a service's process: one line an event, with the request id where there is one."""

import io
import logging
import os
import sys
import threading
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, TextIO

import orjson

from services import traces, trail
from services.request import request_id
from services.startup import StartupError

_CONTROLS = {code: f"\\x{code:02x}" for code in [*range(32), 127] if chr(code) not in "\t\n"} | {10: "\n    "}
"""A message may quote what a client or a completion said: it cannot begin a line, nor move a terminal's cursor."""


class _Text(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = record.message.translate(_CONTROLS)
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        rid = request_id.get()
        record.rid = "" if rid == "-" else f" [{rid}]"
        return super().format(record)


class JsonLines(logging.Formatter):
    """Times are ISO 8601 in UTC. The ids of `services.trail.FIELDS` stand beside the message where they are known."""

    def __init__(self, service: str = ""):
        super().__init__()
        self.service = service

    def format(self, record: logging.LogRecord) -> str:
        try:
            message = record.getMessage()
        except Exception as error:  # another library's mistake must not cost the line
            message = f"{record.msg} ({len(record.args or ())} arguments: {error})"
        line: dict[str, Any] = _line(record.levelname, record.name, message, self.service, record.created)
        for name in trail.FIELDS:
            value = getattr(record, name, None)
            if value is not None:
                line[name] = value if isinstance(value, int) else str(value)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return _dump(line)


def _line(level: str, logger: str, message: str, service: str, created: float) -> dict[str, Any]:
    time = datetime.fromtimestamp(created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    rid, place = request_id.get(), traces.here()
    return (
        {"time": time, "level": level.lower(), "logger": logger}
        | ({"service": service} if service else {})
        | {"message": message}
        | ({} if rid == "-" else {"request_id": rid})
        | ({"trace_id": place.split("-")[1]} if place else {})
    )


def _dump(line: dict[str, Any]) -> str:
    try:
        return orjson.dumps(line).decode()
    except TypeError:  # half a character: no UTF-8, but no reason to lose the line
        clean = {name: _utf8(value) if isinstance(value, str) else value for name, value in line.items()}
        return orjson.dumps(clean).decode()


def _utf8(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()


class _Wrapped(io.TextIOBase):
    """stdout or stderr for what does not go through our handler (prints, warnings, other libraries' handlers): each
    line becomes a JSON line. What native code writes goes past it."""

    def __init__(self, stream: TextIO, name: str, service: str):
        self.stream, self.name, self.service = stream, name, service
        self._rest, self._lock = "", threading.RLock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.stream.fileno()

    def write(self, text: str) -> int:
        with self._lock:
            *lines, self._rest = (self._rest + text).split("\n")
            for line in lines:
                if line.strip():
                    self.stream.write(self._json(line.rstrip("\r")) + "\n")
        return len(text)

    def flush(self) -> None:
        self.stream.flush()

    def _json(self, text: str) -> str:
        """Also of what is JSON already: else whoever gets something printed could say anything in any logger's name."""
        return _dump(_line("INFO", self.name, text, self.service, datetime.now().timestamp()))


def configure(level: str = "INFO", service: str = "") -> None:
    """Log to stderr; `RLIF_LOG_LEVEL` overrides the level.

    `RLIF_LOG_FORMAT=json` is for machines: then everything that Python code of a `service` writes is lines of JSON.
    Raises StartupError: one of the two variables has a value that is not valid.
    """
    form = os.environ.get("RLIF_LOG_FORMAT") or "text"
    if form not in ("text", "json"):
        raise StartupError(f"RLIF_LOG_FORMAT {form}: choose text or json")
    wanted = (os.environ.get("RLIF_LOG_LEVEL") or level).upper()
    if wanted not in logging.getLevelNamesMapping():
        raise StartupError(f"RLIF_LOG_LEVEL {wanted}: choose one of {', '.join(logging.getLevelNamesMapping())}")
    handler = logging.StreamHandler(sys.stderr)
    if form == "json":
        handler.setFormatter(JsonLines(service))
        if service:
            _wrap(service)
    else:
        handler.setFormatter(_Text("%(asctime)s %(levelname)-7s %(name)s%(rid)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=wanted, handlers=[handler], force=True)
    trail.log.setLevel(logging.INFO if form == "json" or wanted == "DEBUG" else logging.WARNING)
    # Said at import on every machine without a GPU, by anything that loads transformers.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
    for noisy in ("httpx", "httpcore", "uvicorn.error", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _wrap(service: str) -> None:
    logging.captureWarnings(True)
    sys.stdout, sys.stderr = (_Wrapped(getattr(sys, name), name, service) for name in ("stdout", "stderr"))

    def on_crash(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        logging.getLogger("rlif").critical("the process ends: %s", error, exc_info=(kind, error, trace))

    sys.excepthook = on_crash
