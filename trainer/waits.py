"""Whom the trainer waits for: told by its own thread, read by readiness probes in another."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

DEPENDENCIES = ("redis", "model", "groups")
REDIS_PATIENCE_SECONDS = 10.0
GROUPS_PATIENCE_SECONDS = 30.0
"""Shorter waits are part of every step."""


class Waits:
    """A trainer starts without redis and without its model."""

    def __init__(self) -> None:
        now = time.monotonic()
        self._waiting = {"redis": ("not connected yet", now, 0.0), "model": ("not loaded yet", now, 0.0)}

    def over(self, dependency: str) -> None:
        self._waiting.pop(dependency, None)

    @contextmanager
    def on(self, dependency: str, what: str, patience_seconds: float) -> Iterator[None]:
        """Within, the trainer waits for `what`; one that takes longer than `patience_seconds` makes it not ready."""
        self._waiting[dependency] = (what, time.monotonic(), patience_seconds)
        try:
            yield
        finally:
            self.over(dependency)

    def states(self) -> dict[str, str]:
        """By dependency: "ok", or what is waited for, and how long so far."""
        states = dict.fromkeys(DEPENDENCIES, "ok")
        for dependency, (what, since, patience) in self._waiting.copy().items():
            seconds = time.monotonic() - since
            if seconds >= patience:
                states[dependency] = f"{what} ({seconds:.0f} s so far)"
        return states
