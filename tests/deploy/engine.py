"""podman and podman-compose, for the tests that build the images and run compose.yaml.

RLIF_BASE_IMAGE names a Debian 12 image that podman has or can pull; RLIF_BUILD_ARGS are further arguments of `podman
build` (a pip.conf as --secret id=pip,src=FILE, folders that it names as --volume).
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from composition import PARTS, ROOT, SECRETS, run

BUILD_SECONDS = 3600
STARTED = ("redis", "prepare", "rollout", "reward", "orchestrator", "trainer", "prometheus")


def podman(*words: object, seconds: float = 120) -> subprocess.CompletedProcess[str]:
    return run("podman", *words, seconds=seconds)


def said(*words: object, seconds: float = 120) -> str:
    """What podman printed. Fails the test when it fails."""
    done = podman(*words, seconds=seconds)
    assert done.returncode == 0, f"podman {shlex.join(map(str, words))}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def eventually(what: str, holds: Callable[[], Any], seconds: float) -> Any:
    """The first true answer of `holds`."""
    ends = time.monotonic() + seconds
    while not (answer := holds()):
        assert time.monotonic() < ends, f"not within {seconds:.0f} s: {what}"
        time.sleep(1)
    return answer


def need_podman() -> None:
    if shutil.which("podman") is None:
        pytest.fail("podman is missing (Debian: apt install podman buildah runc netavark aardvark-dns)", pytrace=False)
    done = podman("info", "--format", "{{.Host.NetworkBackend}}")
    if done.returncode:
        pytest.fail(f"podman does not work here: {done.stderr.strip()}", pytrace=False)


def build(dockerfile: Path, target: str, tag: str) -> None:
    words = ["build", "--layers", "-f", str(dockerfile), "--target", target, "-t", tag]
    if base := os.environ.get("RLIF_BASE_IMAGE"):
        words += ["--build-arg", f"BASE_IMAGE={base}"]
    words += shlex.split(os.environ.get("RLIF_BUILD_ARGS", ""))
    # Only Docker's own format has health checks.
    done = run("podman", *words, ".", seconds=BUILD_SECONDS, BUILDAH_FORMAT="docker")
    assert done.returncode == 0, f"{target}\n{done.stdout[-6000:]}\n{done.stderr[-2000:]}"


def build_all() -> None:
    for part in PARTS:
        build(ROOT / "docker/Dockerfile", part, f"rlif-{part}:local")
    for service in ("redis", "prometheus"):
        build(ROOT / "tests/deploy/Dockerfile", service, f"rlif-test-{service}:local")


class Stack:
    """compose.yaml as a project of its own, with secrets of its own."""

    def __init__(self, folder: Path, **settings: str):
        self.project = f"rlif-test-{os.getpid()}"
        self.env = folder / "env"
        images = {f"{name}_IMAGE": f"localhost/rlif-test-{name.lower()}:local" for name in ("REDIS", "PROMETHEUS")}
        chosen = {name: f"{name.lower()}{os.getpid()}" for name in SECRETS} | {"COMPOSE_PROFILES": "cpu"}
        self.settings = chosen | images | settings
        self.env.write_text("".join(f"{key}={value}\n" for key, value in self.settings.items()))

    def compose(self, *words: str, seconds: float = 900) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "podman_compose", "-p", self.project, "--env-file", str(self.env)]
        return run(*command, "-f", ROOT / "compose.yaml", *words, seconds=seconds)

    def name(self, service: str) -> str:
        return f"{self.project}_{service}_1"

    def state(self, service: str) -> dict[str, Any]:
        return json.loads(said("inspect", self.name(service)))[0]["State"]

    def log(self, service: str) -> str:
        done = podman("logs", self.name(service))
        return done.stdout + done.stderr

    def inside(self, service: str, *words: object) -> subprocess.CompletedProcess[str]:
        return podman("exec", self.name(service), *words)

    def get(self, service: str, url: str, token: str = "") -> tuple[int, str]:
        """Status and body of a GET from within a service's container."""
        program = (
            "import sys, urllib.request as r, urllib.error as e\n"
            "q = r.Request(sys.argv[1], headers={'Authorization': 'Bearer ' + sys.argv[2]} if sys.argv[2] else {})\n"
            "try: a = r.urlopen(q, timeout=10)\n"
            "except e.HTTPError as error: a = error\n"
            "print(a.status); print(a.read().decode())"
        )
        done = self.inside(service, "python3", "-c", program, url, token)
        assert done.returncode == 0, done.stderr
        status, _, body = done.stdout.partition("\n")
        return int(status), body

    def steps(self) -> list[dict[str, Any]]:
        """The run's audit trail."""
        return [json.loads(line) for line in self.kept("steps.jsonl").splitlines() if line.endswith("}")]

    def kept(self, name: str) -> str:
        """A file of the run's folder, from a container that mounts it, whether or not the trainer runs; empty before
        there is one."""
        volume = f"{self.project}_runs:/runs:ro"
        words = ("run", "--rm", "--network", "none", "-v", volume, "--entrypoint", "cat", "rlif-trainer:local")
        return podman(*words, f"/runs/demo/{name}").stdout


@contextmanager
def started(folder: Path, **settings: str) -> Iterator[Stack]:
    stack = Stack(folder, **settings)
    try:
        done = stack.compose("up", "-d", *STARTED)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        yield stack
    finally:
        stack.compose("down", "-v", "-t", "5", seconds=300)
