"""Files in the run's folder: `samples/step-N.jsonl`, and every number in `numbers.jsonl`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson


class JsonLines:
    """Samples of a step that is trained again replace the earlier ones; numbers are appended."""

    name = "jsonl"

    def __init__(self, run_dir: Path):
        self.directory = run_dir / "samples"
        self.directory.mkdir(parents=True, exist_ok=True)
        self.numbers = (run_dir / "numbers.jsonl").open("ab")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self.numbers.write(orjson.dumps({"step": step, **numbers}) + b"\n")
        self.numbers.flush()

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        path = self.directory / f"step-{step}.jsonl"
        aside = path.with_suffix(".tmp")
        aside.write_bytes(b"".join(orjson.dumps(dict(row)) + b"\n" for row in rows))
        aside.replace(path)

    def close(self) -> None:
        self.numbers.close()
