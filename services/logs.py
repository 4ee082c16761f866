"""Logging for a service's process: one line an event, with the request id where there is one."""

import logging
import os
import sys

import orjson

from services.http import StartupError
from services.problem import request_id


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        rid = request_id.get()
        record.rid = "" if rid == "-" else f" [{rid}]"
        return super().format(record)


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "request_id": request_id.get(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line).decode()


def configure(level: str = "INFO") -> None:
    """Log to stderr; `RLIF_LOG_FORMAT=json` for machines, `RLIF_LOG_LEVEL` to override the level."""
    handler = logging.StreamHandler(sys.stderr)
    if os.environ.get("RLIF_LOG_FORMAT") == "json":
        handler.setFormatter(_Json())
    else:
        handler.setFormatter(_Text("%(asctime)s %(levelname)-7s %(name)s%(rid)s %(message)s", "%H:%M:%S"))
    wanted = os.environ.get("RLIF_LOG_LEVEL", level).upper()
    if wanted not in logging.getLevelNamesMapping():
        raise StartupError(f"RLIF_LOG_LEVEL {wanted}: choose one of {', '.join(logging.getLevelNamesMapping())}")
    logging.basicConfig(level=wanted, handlers=[handler], force=True)
    # Said at import on every machine without a GPU, by anything that loads transformers.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
    for noisy in ("httpx", "httpcore", "uvicorn.error", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
