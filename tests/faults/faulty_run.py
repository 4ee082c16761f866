"""A small deterministic on-policy run by the real `rlif up`, to break: its recipe, its processes, its weights."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import yaml
from audit import read_steps, surviving
from safetensors import safe_open

SUPERVISED = str(Path(__file__).with_name("up.py"))
"""`rlif up` that starts again whatever ends, as a cluster does: the usual one gives up after ten deaths in a row."""


def write_recipe(folder: Path, model: Path, name: str, **trainer: Any) -> Path:
    tasks = folder / "tasks.jsonl"
    tasks.write_text("".join(json.dumps({"q": f"say {n}", "a": str(n), "id": f"t{n}"}) + "\n" for n in range(40)))
    settings = {
        "steps": 16,
        "groups_per_step": 4,
        "learning_rate": 1e-3,
        "zero_stage": 0,
        "threads": 1,
        "checkpoints": {"every": 3, "keep": 2},
    }
    recipe = {
        "run": {"name": "kill", "dir": str(folder / name), "seed": 3, "deterministic": True},
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"path": str(tasks), "fields": {"prompt": "q", "answer": "a", "id": "id"}},
        "rollout": {
            "group_size": 4,
            "groups_per_request": 2,
            "sampling": {"temperature": 1.0, "max_tokens": 12},
            "threads": 1,
        },
        "rewards": [{"name": "self_certainty"}, {"name": "exact_match", "weight": 0.0}],
        "scorer": {"follow": "match", "threads": 1, "verifier_workers": 1},
        "pacing": {"max_staleness": 0},
        "trainer": settings | trainer,
        "tracking": {"tensorboard": False},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


class Run:
    """`rlif up` as a child process of the test."""

    def __init__(
        self, recipe: Path, run_dir: Path, *options: str, tireless: bool = False, env: dict[str, str] | None = None
    ):
        self.dir = run_dir
        self.log = recipe.with_suffix(".out")
        self.out = self.log.open("ab")
        command = [SUPERVISED] if tireless else ["-m", "services.cli.main"]
        argv = [sys.executable, *command, "up", str(recipe), *options]
        self.process = subprocess.Popen(
            argv, stdout=self.out, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})}
        )

    def pid(self, name: str) -> int:
        return json.loads((self.dir / "logs" / "processes.json").read_text())[name]

    def rank(self, rank: int) -> int | None:
        """The process of one of the trainer's ranks; none while there is none."""
        for child in psutil.Process(self.pid("trainer")).children():
            if child.environ().get("RANK") == str(rank):
                return child.pid
        return None

    def last_step(self) -> int:
        path = self.dir / "steps.jsonl"
        lines = path.read_bytes().splitlines() if path.exists() else []
        return max((json.loads(line)["step"] for line in lines if line.endswith(b"}")), default=0)

    def wait_step(self, step: int, seconds: float = 240) -> None:
        ends = time.monotonic() + seconds
        while self.last_step() < step:
            assert self.process.poll() is None, f"the run ended before step {step}:\n{self.screen()}"
            assert time.monotonic() < ends, f"no step {step} after {seconds} s:\n{self.screen()}"
            time.sleep(0.02)

    def screen(self) -> str:
        logs = sorted((self.dir / "logs").glob("*.log"))
        tails = [f"--- {path.name}\n" + "\n".join(path.read_text().splitlines()[-15:]) for path in logs]
        return "\n".join([self.log.read_text()[-2000:], *tails])

    def finish(self, seconds: float = 400) -> int:
        try:
            return self.process.wait(seconds)
        finally:
            self.close()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.out.close()


def newest_weights(run_dir: Path) -> Path:
    def version(path: Path) -> tuple[int, ...]:
        return tuple(int(part) for part in path.name.split("-"))

    finished = [path for path in (run_dir / "weights").iterdir() if path.suffix != ".tmp"]
    return max((path for path in finished if (path / "manifest.json").exists()), key=version)


def final_weights(run_dir: Path) -> dict[str, bytes]:
    tensors = {}
    for file in newest_weights(run_dir).glob("*.safetensors"):
        with safe_open(file, "pt") as handle:
            tensors |= {name: handle.get_tensor(name).numpy().tobytes() for name in handle.keys()}
    assert tensors
    return tensors


def assert_unharmed(broken: Path, unbroken: Path) -> None:
    """No group was lost, none trained twice in the lineage that survived, and the weights are the same bits."""
    kept = surviving(read_steps(broken))
    trained = [group for groups in kept.values() for group in groups]
    assert len(set(trained)) == len(trained), "groups were trained twice"
    assert kept == surviving(read_steps(unbroken))
    assert final_weights(broken) == final_weights(unbroken)
