"""compose.yaml as Compose reads it: secrets and settings filled in, one service's settings, its command line."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from podman_compose import rec_subs

ROOT = Path(__file__).parent.parent.parent
SECRETS = ("RLIF_API_TOKEN", "RLIF_ADMIN_TOKEN", "RLIF_SANDBOX_TOKEN", "REDIS_PASSWORD", "GRAFANA_ADMIN_PASSWORD")
PARTS = ("rollout", "reward", "sandbox", "orchestrator", "trainer")


def composed(**settings: str) -> dict[str, Any]:
    """The services by name, with `settings` as the environment; secrets are their own names where none is given."""
    return yaml.safe_load(interpolated({name: name.lower() for name in SECRETS} | settings))["services"]


def interpolated(settings: dict[str, str]) -> str:
    """The file's text. Raises what podman-compose raises where a needed setting is missing."""
    return rec_subs((ROOT / "compose.yaml").read_text(), settings)


def ours(services: dict[str, Any]) -> dict[str, Any]:
    """Those that run an image of this project."""
    return {name: service for name, service in services.items() if "build" in service}


def arguments(service: dict[str, Any]) -> list[str]:
    """What follows `rlif` on the service's command line, the way Compose splits it."""
    words = shlex.split(service["command"]) if isinstance(service.get("command"), str) else service.get("command", [])
    return words[2:] if words[:2] == ["-m", "services.cli.main"] else words


def run(*words: object, seconds: float = 60, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, words)),
        capture_output=True,
        text=True,
        timeout=seconds,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


def python(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, *words, **environment)
