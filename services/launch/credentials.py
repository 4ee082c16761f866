"""Tokens and the redis password of a run over several machines: made when it is launched, kept in one file of the run's
folder that only this user can read. They are in no argument list, script or log.

The launcher's own RLIF_API_TOKEN, RLIF_ADMIN_TOKEN and RLIF_REDIS_URL are kept where it has them.
"""

import json
import os
import secrets
from pathlib import Path

from services.run_folder import check_own, private_folder, write_private
from services.startup import StartupError

NAMES = ("RLIF_API_TOKEN", "RLIF_ADMIN_TOKEN", "RLIF_REDIS_URL")
PASSWORD = "redis_password"


def _file(run_dir: Path) -> Path:
    return run_dir / "cluster" / "credentials.json"


def write(run_dir: Path) -> None:
    """Raises StartupError: the file cannot be written, or others may write where it lies."""
    found = {name: os.environ[name] for name in NAMES if os.environ.get(name)}
    made = {name: secrets.token_urlsafe(32) for name in ("RLIF_API_TOKEN", "RLIF_ADMIN_TOKEN", PASSWORD)}
    path = _file(run_dir)
    try:
        check_own(run_dir)
        private_folder(path.parent)
        write_private(path, json.dumps({**made, **found}))
    except OSError as error:
        raise StartupError(f"run.dir: cannot write {path}: {error.strerror}") from error


def take(run_dir: Path) -> str:
    """Put them into this process's environment, for its children; returns the redis password. Raises StartupError."""
    try:
        kept = json.loads(_file(run_dir).read_text())
    except OSError as error:
        raise StartupError(f"run.dir: cannot read {_file(run_dir)}: {error.strerror}") from error
    os.environ.update({name: kept[name] for name in NAMES if name in kept})
    return kept[PASSWORD]


def remove(run_dir: Path) -> None:
    """Once training is done: nobody needs them any more, and folders of runs are copied and backed up."""
    for path in (_file(run_dir), run_dir / "redis" / "redis.conf"):
        path.unlink(missing_ok=True)
