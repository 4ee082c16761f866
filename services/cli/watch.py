"""What every process of rlif starts with, so that it can be watched: its log and its traces."""

import os

from services import logs, traces
from services.startup import StartupError


def watch(service: str) -> None:
    """Raises StartupError: an environment variable asks for what is not valid, or not installed."""
    logs.configure(service=service)
    try:
        if os.environ.get("RANK", "0") == "0":  # the other ranks do the same
            traces.start(service)
    except ValueError as error:
        raise StartupError(str(error)) from error
