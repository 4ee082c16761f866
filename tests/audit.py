"""What a run trained, read from its `steps.jsonl`."""

import json
from pathlib import Path


def read_steps(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "steps.jsonl").read_text().splitlines()]


def surviving(steps: list[dict]) -> dict[int, list[str]]:
    """step -> group ids, in the lineage that survived: of a step that was trained several times the last one counts.

    A later lineage restarts from a checkpoint at step r and trains r + 1 on, so what an earlier lineage did up to r
    survives and the rest does not.
    """
    kept: dict[int, list[str]] = {}
    for record in steps:  # the file is append-only, so later lineages come later
        kept = {step: groups for step, groups in kept.items() if step < record["step"]}
        kept[record["step"]] = record["group_ids"]
    return kept
