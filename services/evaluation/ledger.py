"""What is done already: answers and verdicts, one JSON line each, appended and never changed.

Nothing that has a line is done again, whenever and however an earlier evaluation ended.
"""

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import orjson

from services.contract import FinishReason, Outcome, Score, TokenIds, Version, Wire
from services.startup import StartupError

AGAIN = frozenset({Outcome.timeout, Outcome.error})
"""Failures that may be the machine's: tried anew by the next evaluation. The others would fail the same way."""


class Answer(Wire):
    """`token_ids` and `prompt_token_ids` are none where the server does not tell them."""

    key: str
    task: str
    item: str
    seed: int
    sample: int
    text: str
    token_ids: TokenIds | None = None
    prompt_token_ids: TokenIds | None = None
    finish_reason: FinishReason
    weight_version: Version | None = None


class Verdict(Wire):
    """What one spec said of one answer; `spec` also names the scorer and the reference where they were used."""

    answer: str
    spec: str
    components: dict[str, Score]

    @property
    def is_final(self) -> bool:
        return not any(score.outcome in AGAIN for score in self.components.values())


class Ledger:
    """`answers` by key, `verdicts` by (answer's key, spec); of several, the last counts."""

    def __init__(self, path: Path):
        self.path = path
        self.answers: dict[str, Answer] = {}
        self.verdicts: dict[tuple[str, str], Verdict] = {}

    def read(self) -> int:
        """Take in what is there; returns the length of the whole lines. Raises StartupError."""
        size = 0
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):  # its writer was killed
                    break
                size += len(line)
                try:
                    row = orjson.loads(line)
                    self._take(Answer.model_validate(row) if "key" in row else Verdict.model_validate(row))
                except ValueError as error:
                    raise StartupError(f"{self.path} line {number}: no answer and no verdict: {error}") from error
        return size

    def _take(self, row: Answer | Verdict) -> None:
        if isinstance(row, Answer):
            self.answers[row.key] = row
        else:
            self.verdicts[row.answer, row.spec] = row

    def add(self, rows: Sequence[Answer | Verdict]) -> None:
        """They are on the disk when this returns."""
        content = b"".join(orjson.dumps(row.model_dump(mode="json", exclude_defaults=True)) + b"\n" for row in rows)
        with self.path.open("ab") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        for row in rows:
            self._take(row)


@contextmanager
def opened(folder: Path) -> Iterator[Ledger]:
    """The ledger of an evaluation's folder, for one writer. Raises StartupError: another one writes there, or what is
    there is no ledger."""
    path = folder / "samples.jsonl"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise StartupError(f"--out {folder}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StartupError(f"--out {folder}: another `rlif eval` is writing there") from error
        ledger = Ledger(path)
        os.truncate(path, ledger.read())
        yield ledger
    finally:
        os.close(lock)
