"""What the nodes of one start of a run tell each other: small JSON files in a folder that all of them share.

`<run.dir>/cluster/<attempt>/` belongs to one start (a job's requeue is another). Files are written aside and renamed,
so that whoever reads sees all of one or none of it, and only this user can enter.
"""

import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from services.run_folder import private_folder

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Outcome:
    """How the start ended: an exit code, and why for whoever reads the log. `node` said so."""

    code: int
    reason: str
    node: str


class Ended(Exception):
    """The start has ended."""

    def __init__(self, outcome: Outcome):
        super().__init__(f"node {outcome.node}: {outcome.reason}")
        self.outcome = outcome


class Board:
    """Raises StartupError when the folder cannot be made, or is not this user's alone."""

    def __init__(self, run_dir: Path, attempt: str):
        self.run_dir, self.folder = run_dir, run_dir / "cluster" / attempt
        for folder in (self.folder.parent, self.folder):
            private_folder(folder)

    def post(self, name: str, value: Any) -> None:
        self._aside(value).replace(self.folder / f"{name}.json")

    def read(self, name: str) -> Any:
        """What was posted under `name`; none when nothing was."""
        try:
            return json.loads((self.folder / f"{name}.json").read_text())
        except FileNotFoundError:
            return None

    def gather(self, names: list[str], deadline_seconds: float) -> list[Any]:
        """What was posted under each of `names`, once all of it is there.

        Raises Ended when there is an outcome before, and TimeoutError listing what is missing.
        """
        ends = time.monotonic() + deadline_seconds
        while True:
            outcome = self.outcome()
            if outcome:
                raise Ended(outcome)
            found = [self.read(name) for name in names]
            if None not in found:
                return found
            if time.monotonic() > ends:
                raise TimeoutError(", ".join(name for name, value in zip(names, found, strict=True) if value is None))
            time.sleep(POLL_SECONDS)

    def settle(self, outcome: Outcome) -> Outcome:
        """The first outcome is the one that counts; returns that."""
        aside = self._aside(asdict(outcome))
        try:
            os.link(aside, self.folder / "outcome.json")
        except FileExistsError:
            pass
        aside.unlink()
        settled = self.outcome()
        assert settled
        return settled

    def outcome(self) -> Outcome | None:
        found = self.read("outcome")
        return Outcome(**found) if found else None

    @property
    def stop_asked(self) -> bool:
        """Whether somebody left a file `stop` in the folder: stop cleanly, with a checkpoint."""
        return (self.folder / "stop").exists()

    def _aside(self, value: Any) -> Path:
        path = self.folder / f".{socket.gethostname()}-{os.getpid()}-{time.monotonic_ns()}"
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as handle:
            json.dump(value, handle)
        return path
