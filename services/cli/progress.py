"""The live line of a run on the terminal, read from the run's own files."""

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from services.supervisor import Service


class StepFile:
    """Reads `steps.jsonl` as it grows; a half-written last line waits for its end."""

    def __init__(self, path: Path):
        self.path, self.offset = path, 0

    def new(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        with self.path.open("rb") as handle:
            handle.seek(self.offset)
            data = handle.read()
        whole = data[: data.rfind(b"\n") + 1]
        self.offset += len(whole)
        return [json.loads(line) for line in whole.splitlines()]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def describe(step: dict[str, Any], steps: int, seconds_left: float | None) -> str:
    """One line of a finished step: number, components, length, speed, staleness, time left."""
    parts = [f"step {step['step']}/{steps}"]
    for key in sorted(key for key in step if key.startswith("components.")):
        parts.append(f"{key.removeprefix('components.')} {step[key]:.3f}")
    parts.append(f"length {step['completion_length']:.1f}")
    if step["kl"] is not None:
        parts.append(f"kl {step['kl']:.4f}")
    parts.append(f"{step['tokens_per_second']:,.0f} tok/s")
    parts.append(f"staleness {step['staleness_mean']:.1f}")
    if seconds_left is not None:
        parts.append(f"{_clock(seconds_left)} left")
    return "  ".join(parts)


class Progress:
    """Call it on every tick; a live line on a terminal, a printed line every `every` steps elsewhere."""

    def __init__(self, run_dir: Path, steps: int, console: Console, every: int = 10):
        self.steps, self.console, self.every = steps, console, every
        self.file = StepFile(run_dir / "steps.jsonl")
        self.started = time.monotonic()
        self.first: tuple[int, float] | None = None
        self.last: dict[str, Any] | None = None
        self.live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None

    def __enter__(self) -> "Progress":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()
            if self.last:
                self.console.print(Text(describe(self.last, self.steps, None)))

    def _left(self, step: int) -> float | None:
        if self.first is None:
            return None
        number, when = self.first
        done = step - number
        return (self.steps - step) * (time.monotonic() - when) / done if done > 0 else None

    def __call__(self, services: list[Service]) -> None:
        for step in self.file.new():
            self.last = step
            if self.first is None or step["step"] < self.first[0]:
                self.first = (step["step"], time.monotonic())
            if self.live is None and (step["step"] % self.every == 0 or step["step"] == self.steps):
                line = describe(step, self.steps, self._left(step["step"]))
                self.console.print(Text(line), soft_wrap=True)
        if self.live is None:
            return
        elapsed = _clock(time.monotonic() - self.started)
        if self.last is None:
            waiting = ", ".join(service.name for service in services if not service.finished)
            self.live.update(Text(f"{elapsed}  starting: {waiting}"))
        else:
            self.live.update(Text(f"{elapsed}  {describe(self.last, self.steps, self._left(self.last['step']))}"))
