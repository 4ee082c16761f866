"""Under which ids a run is known elsewhere: `tracking.json` in its folder, so that a restart goes on with the same."""

import json
from pathlib import Path


def known(run_dir: Path, tracker: str) -> str | None:
    path = run_dir / "tracking.json"
    return json.loads(path.read_text()).get(tracker) if path.exists() else None


def remember(run_dir: Path, tracker: str, run_id: str) -> None:
    path = run_dir / "tracking.json"
    ids = json.loads(path.read_text()) if path.exists() else {}
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps({**ids, tracker: run_id}))
    aside.replace(path)
