"""What a trainer says of itself while it runs: health, readiness, metrics on its port."""

import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
import yaml

from services import recipe
from services.address import listen
from services.startup import StartupError
from trainer.train import main
from trainer.waits import Waits

pytestmark = pytest.mark.alone


def make_tree(model: Path, run_dir: Path, port: int) -> dict:
    return {
        "run": {"name": "alone", "dir": str(run_dir)},
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"path": "unused.jsonl", "fields": {"prompt": "p"}},
        "rewards": "intuitor",
        "trainer": {"steps": 4, "groups_per_step": 1, "device": "cpu", "threads": 1},
        "tracking": {"tensorboard": False, "metrics_port": port},
    }


def test_readiness_says_whom_the_trainer_waits_for():
    waits = Waits()
    assert {name: state.split(" (")[0] for name, state in waits.states().items()} == {
        "redis": "not connected yet",
        "model": "not loaded yet",
        "groups": "ok",
    }
    waits.over("redis")
    waits.over("model")
    with waits.on("groups", "4 scored groups", patience_seconds=60):
        assert set(waits.states().values()) == {"ok"}
    with waits.on("groups", "4 scored groups", patience_seconds=0):
        assert waits.states() == {"redis": "ok", "model": "ok", "groups": "4 scored groups (0 s so far)"}
    assert set(waits.states().values()) == {"ok"}


def test_a_trainer_without_redis_answers_probes_and_a_busy_port_is_refused(tiny_model, tmp_path):
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        tree = make_tree(tiny_model, tmp_path / "run", port)
        taken.listen()
        with pytest.raises(StartupError, match=f"tracking.metrics_port: the trainer cannot listen on 127.0.0.1:{port}"):
            main(recipe.parse(tree), "unix:///nowhere")
    with run_trainer_alone(tree, tmp_path) as url:
        assert answer_of(f"{url}/healthz") == (200, {"status": "ok"})
        status, body = answer_of(f"{url}/readyz")
        assert status == 503 and body["dependencies"]["redis"].startswith("not connected yet")
        assert b"rlif_trainer_planned_steps" in httpx.get(f"{url}/metrics").content


def answer_of(url: str) -> tuple[int, dict]:
    answer = httpx.get(url)
    return answer.status_code, answer.json()


@contextmanager
def run_trainer_alone(tree: dict, folder: Path):
    """`rlif train` on a redis that is not there; yields the URL of its status once it answers."""
    path = folder / "alone.yaml"
    path.write_text(yaml.safe_dump({**tree, "queue": {"url": f"unix://{folder}/none.sock"}}))
    url = f"http://127.0.0.1:{tree['tracking']['metrics_port']}"
    with (folder / "alone.log").open("wb") as out:
        argv = [sys.executable, "-m", "services.cli.main", "train", str(path)]
        process = subprocess.Popen(argv, stdout=out, stderr=out)
    try:
        ends = time.monotonic() + 60
        while True:
            with suppress(httpx.TransportError):
                httpx.get(f"{url}/healthz", timeout=5)
                break
            assert process.poll() is None and time.monotonic() < ends, (folder / "alone.log").read_text()
            time.sleep(0.1)
        yield url
    finally:
        process.kill()
        process.wait()
