"""`rlif launch ray`: refusals, and real runs on a Ray cluster of several nodes on this machine (`make test-ray`)."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from cluster_recipe import STOPS, check_newer, everything_newer, steps_trained, write_recipe
from typer.testing import CliRunner

from services.cli.main import app
from services.recipe import RecipeError

ROOT = Path(__file__).parent.parent.parent
RLIF = [sys.executable, "-m", "services.cli.main"]


def test_a_dry_run_says_who_runs_where(tmp_path):
    arguments = [f"{ROOT}/recipes/intuitor_math_14b.yaml", f"run.dir={tmp_path}/run", "--dry-run"]
    done = CliRunner().invoke(app, ["launch", "ray", *arguments, "--nodes", "9"], catch_exceptions=False)
    assert "nodes 1-8: trainer, 64 ranks (8 GPUs a node)" in done.stdout
    assert not (tmp_path / "run").exists()
    with pytest.raises(RecipeError, match="896 completions leave some of 1192 ranks"):
        CliRunner().invoke(app, ["launch", "ray", *arguments, "--nodes", "150"], catch_exceptions=False)


# ---- a real Ray --------------------------------------------------------------------------------------------------

real = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is missing: pip install 'rlif[ray]'"),
]


@pytest.mark.ray
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is missing: pip install 'rlif[ray]'")
def test_without_a_cluster_the_command_says_so(tmp_path, tiny_model):
    """Before the others, which start one: `auto` would find it."""
    recipe = write_recipe(tmp_path, tiny_model, steps=1)
    env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    argv = [*RLIF, "launch", "ray", str(recipe), "--nodes", "2", "--gpus-per-node", "0"]
    for more in ([], ["--address", "127.0.0.1:9"]):
        done = subprocess.run([*argv, *more], capture_output=True, text=True, timeout=120, cwd=ROOT, env=env)
        assert done.returncode == 2, done.stderr
        assert "no Ray cluster answers" in done.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def cluster():
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0})
    made.add_node(num_cpus=1, num_gpus=0)
    yield made
    made.shutdown()


def start(cluster, recipe: Path, nodes: int, *options: str) -> subprocess.Popen:
    argv = [*RLIF, "launch", "ray", str(recipe), "--nodes", str(nodes), "--gpus-per-node", "0"]
    out = (recipe.parent / "screen.log").open("ab")
    return subprocess.Popen([*argv, "--address", cluster.address, *options], stdout=out, stderr=out, cwd=ROOT)


def screen(folder: Path) -> str:
    return (folder / "screen.log").read_text()


def wait_step(folder: Path, step: int, process: subprocess.Popen, seconds: float = 240) -> None:
    ends = time.monotonic() + seconds
    while max(steps_trained(folder), default=0) < step:
        assert process.poll() is None, screen(folder)
        assert time.monotonic() < ends, screen(folder)
        time.sleep(0.1)


def left_behind(folder: Path) -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return [line for line in found if str(folder / "run") in line]


def wait_gone(folder: Path, seconds: float = 30) -> None:
    ends = time.monotonic() + seconds
    while left_behind(folder):
        assert time.monotonic() < ends, left_behind(folder)
        time.sleep(0.2)


class TestRealRay:
    pytestmark = real

    def test_two_nodes_train_to_the_end(self, cluster, tmp_path, tiny_model):
        process = start(cluster, write_recipe(tmp_path, tiny_model, steps=3), 2)
        assert process.wait(300) == 0, screen(tmp_path)
        assert steps_trained(tmp_path) == [1, 2, 3]
        assert "training is done" in screen(tmp_path)
        assert len(list((tmp_path / "run" / "logs").iterdir())) == 2  # a folder a node
        wait_gone(tmp_path)

    def test_a_lost_node_is_replaced_and_the_run_goes_on(self, cluster, tmp_path, tiny_model):
        process = start(cluster, write_recipe(tmp_path, tiny_model, steps=6), 2)
        wait_step(tmp_path, 2, process)
        cluster.remove_node(cluster.list_all_nodes()[1], allow_graceful=False)
        cluster.add_node(num_cpus=1, num_gpus=0)
        assert process.wait(300) == 0, screen(tmp_path)
        trained = steps_trained(tmp_path)
        assert sorted(set(trained)) == list(range(1, 7))
        assert "a node is lost" in screen(tmp_path)

    def test_a_recipe_with_everything_newer(self, cluster, tmp_path, tiny_model):
        recipe = write_recipe(tmp_path, tiny_model, steps=4)
        process = start(cluster, recipe, 2, *everything_newer(tmp_path), "--resume-from", str(tiny_model))
        assert process.wait(300) == 0, screen(tmp_path)
        check_newer(tmp_path / "run", 4)
        logs = "".join(path.read_text() for path in (tmp_path / "run" / "logs").glob("*/trainer-0.log"))
        assert f"lineage 0 starts from {tiny_model}" in logs

    def test_a_run_that_the_guard_stops_fails_with_the_reason(self, cluster, tmp_path, tiny_model):
        process = start(cluster, write_recipe(tmp_path, tiny_model, steps=500), 2, STOPS)
        assert process.wait(300) == 1, screen(tmp_path)
        assert "stopped by the collapse guard: step " in screen(tmp_path)
        wait_gone(tmp_path)

    def test_a_part_that_refuses_ends_the_run_with_its_code_and_reason(self, cluster, tmp_path, tiny_model):
        recipe = write_recipe(tmp_path, tiny_model, steps=3)
        process = start(cluster, recipe, 2, f"model.path={tmp_path}/gone")
        assert process.wait(300) == 2, screen(tmp_path)
        assert f"{tmp_path}/gone" in screen(tmp_path)
        wait_gone(tmp_path)

    def test_a_stop_signal_leaves_a_checkpoint(self, cluster, tmp_path, tiny_model):
        process = start(cluster, write_recipe(tmp_path, tiny_model, steps=500, every=1000), 2)
        wait_step(tmp_path, 2, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(300) == 143, screen(tmp_path)
        last = steps_trained(tmp_path)[-1]
        assert (tmp_path / "run" / "checkpoints" / f"0-{last}" / "state.json").exists()
        wait_gone(tmp_path)

    def test_a_killed_driver_leaves_no_process(self, cluster, tmp_path, tiny_model):
        process = start(cluster, write_recipe(tmp_path, tiny_model, steps=500), 2)
        wait_step(tmp_path, 1, process)
        process.kill()
        process.wait(10)
        wait_gone(tmp_path, 60)

    def test_too_few_nodes_are_named(self, cluster, tmp_path, tiny_model, monkeypatch, capfd):
        import ray

        from services.launch import ray as driver

        monkeypatch.setattr(driver, "NODES_SECONDS", 2.0)
        recipe = write_recipe(tmp_path, tiny_model, steps=3)
        arguments = ["launch", "ray", str(recipe), "--nodes", "3", "--gpus-per-node", "0", "--address", cluster.address]
        try:
            with pytest.raises(driver.StartupError, match=r"--nodes 3 .*it has 2 \(1 CPU/0 GPU, 1 CPU/0 GPU\)"):
                CliRunner().invoke(app, arguments, catch_exceptions=False)
        finally:
            ray.shutdown()
