"""kill -9 on every process of a real run: it goes on, loses nothing, trains nothing twice, ends with equal weights."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from audit import read_steps, surviving
from safetensors import safe_open

from services.contract import group_id

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS, GROUPS_PER_STEP = 16, 4


def write_recipe(folder: Path, model: Path, name: str) -> Path:
    tasks = folder / "tasks.jsonl"
    tasks.write_text("".join(json.dumps({"q": f"say {n}", "a": str(n), "id": f"t{n}"}) + "\n" for n in range(40)))
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
        "trainer": {
            "steps": STEPS,
            "groups_per_step": GROUPS_PER_STEP,
            "learning_rate": 1e-3,
            "zero_stage": 0,
            "threads": 1,
            "checkpoints": {"every": 3, "keep": 2},
        },
        "tracking": {"tensorboard": False},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


class Run:
    """`rlif up` as a child process of the test."""

    def __init__(self, recipe: Path, run_dir: Path, *options: str):
        self.dir = run_dir
        self.out = (run_dir.parent / f"{run_dir.name}.out").open("ab")
        argv = [sys.executable, "-m", "services.cli.main", "up", str(recipe), *options]
        self.process = subprocess.Popen(argv, stdout=self.out, stderr=subprocess.STDOUT)

    def pid(self, name: str) -> int:
        return json.loads((self.dir / "logs" / "processes.json").read_text())[name]

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
        return "\n".join([(self.dir.parent / f"{self.dir.name}.out").read_text()[-2000:], *tails])

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


def final_weights(run_dir: Path) -> dict[str, bytes]:
    versions = sorted(path for path in (run_dir / "weights").iterdir() if (path / "manifest.json").exists())
    tensors = {}
    for file in versions[-1].glob("*.safetensors"):
        with safe_open(file, "pt") as handle:
            tensors |= {name: handle.get_tensor(name).numpy().tobytes() for name in handle.keys()}
    assert tensors
    return tensors


@pytest.fixture(scope="module")
def unbroken(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    run = Run(write_recipe(folder, tiny_model, "unbroken"), folder / "unbroken")
    assert run.finish() == 0, run.screen()
    return run


def test_unbroken_run_trains_the_expected_groups(unbroken):
    kept = surviving(read_steps(unbroken.dir))
    assert sorted(kept) == list(range(1, STEPS + 1))
    trained = [group for groups in kept.values() for group in groups]
    assert len(set(trained)) == len(trained) == STEPS * GROUPS_PER_STEP
    epoch_zero = {group_id("kill", 0, f"t{n}") for n in range(40)}
    assert epoch_zero <= set(trained)  # 64 groups: all 40 of the first epoch, 24 of the second


def test_kill_nine_on_every_process(unbroken, tiny_model):
    folder = unbroken.dir.parent
    run = Run(write_recipe(folder, tiny_model, "broken"), folder / "broken")
    try:
        for step, victim in [(2, "trainer"), (4, "orchestrator"), (6, "rollout-0"), (8, "reward-0"), (10, "redis")]:
            run.wait_step(step)
            os.kill(run.pid(victim), signal.SIGKILL)
        run.wait_step(13)
        os.kill(run.pid("trainer"), signal.SIGKILL)
        assert run.finish() == 0, run.screen()
    finally:
        run.close()
    steps = read_steps(run.dir)
    assert len({record["lineage"] for record in steps}) >= 2
    assert surviving(steps) == surviving(read_steps(unbroken.dir))
    assert final_weights(run.dir) == final_weights(unbroken.dir)


def test_a_killed_supervisor_is_resumed(unbroken, tiny_model):
    folder = unbroken.dir.parent
    recipe = write_recipe(folder, tiny_model, "resumed")
    run = Run(recipe, folder / "resumed")
    try:
        run.wait_step(5)
    finally:
        run.process.kill()
        run.close()
    refused = Run(recipe, folder / "resumed")
    assert refused.finish(60) == 2
    again = Run(recipe, folder / "resumed", "--resume")
    assert again.finish() == 0, again.screen()
    assert surviving(read_steps(again.dir)) == surviving(read_steps(unbroken.dir))
    assert final_weights(again.dir) == final_weights(unbroken.dir)


def test_a_lost_redis_costs_nothing_that_a_checkpoint_holds(unbroken, tiny_model):
    folder = unbroken.dir.parent
    recipe = write_recipe(folder, tiny_model, "forgotten")
    run = Run(recipe, folder / "forgotten")
    try:
        run.wait_step(8)
    finally:
        run.process.kill()
        run.close()
    shutil.rmtree(run.dir / "redis")
    again = Run(recipe, folder / "forgotten", "--resume")
    assert again.finish() == 0, again.screen()
    assert surviving(read_steps(again.dir)) == surviving(read_steps(unbroken.dir))
    assert final_weights(again.dir) == final_weights(unbroken.dir)
