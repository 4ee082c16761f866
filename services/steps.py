"""What a run trained: the lines of its `steps.jsonl` that survived."""

import json
from pathlib import Path
from typing import Any

STOPPED = "stopped.txt"
"""In the run's folder, with the reason, when an order ended the run."""


class StepsError(ValueError):
    """The file does not hold a run's steps; the message names file and line."""


def traces_of_training(run_dir: Path) -> str | None:
    """What shows that a run trained in `run_dir`: a file's or folder's name; none when it never came to a step."""
    steps = run_dir / "steps.jsonl"
    if steps.exists() and steps.stat().st_size:
        return steps.name
    return "checkpoints" if (run_dir / "checkpoints").exists() else None


def why_stopped(run_dir: Path) -> str | None:
    """The reason of the order that ended the run, and whose; none where no order did."""
    stopped = run_dir / STOPPED
    return stopped.read_text().strip() if stopped.exists() else None


def keep(surviving: dict[int, dict[str, Any]], row: dict[str, Any]) -> bool:
    """Add the next line, by its step. A restored trainer goes on in a newer lineage from its checkpoint (`start`), and
    what earlier lineages did after that step is lost. Returns whether something was. Raises KeyError, ValueError and
    TypeError for what is no line of a step."""
    step, start, lineage = int(row["step"]), int(row["start"]), int(row["lineage"])
    last = next(reversed(surviving.values()), None)
    lost = []
    if last is not None and last["lineage"] != lineage:
        lost = [done for done, old in surviving.items() if done > start and old["lineage"] != lineage]
        for done in lost:
            del surviving[done]
    surviving[step] = row
    return bool(lost)


def read_steps(path: Path) -> list[dict[str, Any]]:
    """The surviving line of each step, in order.

    Raises StepsError when there is no step, or a line is not a step's record.
    """
    surviving: dict[int, dict[str, Any]] = {}
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise StepsError(f"cannot read {path}: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        try:
            keep(surviving, json.loads(line))
        except (ValueError, KeyError, TypeError) as error:
            # A trainer killed while writing leaves a torn last line, which the restored one writes anew.
            if number == len(lines) and surviving:
                break
            raise StepsError(f"{path} line {number}: not the record of a step: {line[:80]!r}") from error
    if not surviving:
        raise StepsError(f"{path}: holds no step")
    return [surviving[step] for step in sorted(surviving)]
