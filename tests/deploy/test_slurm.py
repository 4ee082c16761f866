"""`rlif launch slurm`: the script, and real jobs on a Slurm of several nodes on this machine (`make test-slurm`)."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from cluster_recipe import STOPS, check_newer, everything_newer, steps_trained, write_recipe
from slurm_cluster import HOW, has_slurm, job_facts, slurm
from typer.testing import CliRunner

from services.cli.main import app
from services.launch.slurm import seconds_of
from services.recipe import RecipeError
from services.startup import StartupError

ROOT = Path(__file__).parent.parent.parent
RLIF = [sys.executable, "-m", "services.cli.main"]


def launch(*arguments: str, env: dict[str, str] | None = None, seconds: float = 60) -> subprocess.CompletedProcess:
    argv = [*RLIF, "launch", "slurm", *arguments]
    return subprocess.run(argv, capture_output=True, text=True, timeout=seconds, cwd=ROOT, env=env)


def dry_run(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["launch", "slurm", *arguments, "--dry-run"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def check_shell(script: str) -> None:
    subprocess.run(["bash", "-n"], input=script, text=True, check=True, timeout=20)
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck:
        found = subprocess.run([shellcheck, "-"], input=script, text=True, capture_output=True, timeout=60)
        assert found.returncode == 0, found.stdout


def test_a_published_job_is_one_command_and_nothing_is_written(tmp_path):
    run_dir = tmp_path / "a folder" / "run"
    script = dry_run(
        f"{ROOT}/recipes/intuitor_math_7b.yaml", f"run.dir={run_dir}", "--nodes", "5", "--partition", "gpu",
        "--account", "lab", "--time", "4-00:00:00", "--setup", "module load cuda/12.4", "--sbatch=--qos=high",
    )  # fmt: skip
    check_shell(script)
    directives = {line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")}
    assert directives == {
        "--job-name=rlif-intuitor-math-7b", "--nodes=5", "--ntasks-per-node=1", "--gpus-per-node=8", "--partition=gpu",
        "--account=lab", "--time=4-00:00:00", "--exclusive", "--mem=0", "--requeue", "--open-mode=append",
        f"--output='{run_dir}/slurm-%j.log'", "--signal=B:USR1@300", "--qos=high",
    }  # fmt: skip
    assert "nodes 1-4: trainer, 32 ranks (8 GPUs a node)" in script
    assert script.index("module load cuda/12.4") < script.index("srun")
    assert not run_dir.parent.exists()


@pytest.mark.parametrize("image", ["/images/rlif.sif", "registry#team/rlif:1"])
def test_a_container_sees_the_folders_of_the_run(image, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    script = dry_run("recipes/grpo_math_14b.yaml", f"run.dir={tmp_path}", "--nodes", "9", "--container", image)
    check_shell(script)
    srun = next(line for line in script.splitlines() if line.startswith("srun"))
    data, reference = tmp_path / "test.jsonl", tmp_path / "reference"
    held_out = {"data": {"path": str(data), "fields": {"prompt": "q"}}, "every": 10, "rewards": "exact_match"}
    more = [f"evaluation={json.dumps(held_out)}"]
    more += [f"scorer.reference_model={reference}", "scorer.max_model_len=null"]
    more += ["scorer.engine=transformers", "scorer.tensor_parallel_size=1"]
    more += ["--resume-from", str(tmp_path / "base")]
    all_of_it = dry_run("recipes/grpo_math_14b.yaml", "--nodes", "9", "--container", image, *more)
    assert f" --resume-from {tmp_path}/base" in all_of_it
    for folder in (data, reference, tmp_path / "base"):
        assert f"--bind {folder}" in all_of_it or f"{folder}:{folder}" in all_of_it
    if image.endswith(".sif"):
        assert f"apptainer exec --nv --bind {ROOT} --bind {tmp_path}" in srun and f"{image} rlif launch node" in srun
    else:
        assert f"--container-mounts={ROOT}:{ROOT},{tmp_path}:{tmp_path}" in srun and " rlif launch node " in srun


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nodes", "150"], "64 x 14 = 896 completions leave some of 1192 ranks"),
        (["--nodes", "5", "--sbatch=--nodes=3"], "--sbatch --nodes=3: rlif sets this one itself"),
        (["--nodes", "5", "--time", "soon"], "--time soon: write minutes"),
        (["--nodes", "5", "--sbatch", "high"], "--sbatch high: write an option of sbatch"),
        (["--nodes", "5", "--setup", "a\nb"], "a line break would end the line"),
    ],
)
def test_bad_input_is_refused_in_one_line(arguments, said):
    with pytest.raises((StartupError, RecipeError)) as refusal:
        dry_run(f"{ROOT}/recipes/intuitor_math_7b.yaml", *arguments)
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


def test_without_slurm_the_command_says_so(tmp_path):
    recipe = write_recipe(tmp_path, Path("model"), steps=1)
    env = {**os.environ, "PATH": str(tmp_path)}
    done = launch(str(recipe), "--nodes", "2", "--gpus-per-node", "0", env=env)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "no `sbatch` on PATH" in done.stderr
    assert not (tmp_path / "run").exists()


def pretended(folder: Path, **commands: str) -> dict[str, str]:
    """An environment whose Slurm commands are these shell lines."""
    (folder / "bin").mkdir()
    for name, lines in commands.items():
        path = folder / "bin" / name
        path.write_text(f"#!/bin/sh\n{lines}\n")
        path.chmod(0o755)
    return {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}


def test_what_sbatch_refuses_leaves_the_folder_as_it_was(tmp_path):
    recipe = write_recipe(tmp_path, Path("model"), steps=1)
    env = pretended(tmp_path, sbatch="cat >/dev/null; echo 'sbatch: error: no such account' >&2; exit 1")
    done = launch(str(recipe), "--nodes", "2", "--gpus-per-node", "0", env=env)
    assert (done.returncode, done.stderr) == (2, "rlif: sbatch refuses the job: no such account\n")
    assert not (tmp_path / "run").exists()


def test_a_second_job_of_a_run_is_refused_until_the_first_has_ended(tmp_path):
    recipe = write_recipe(tmp_path, Path("model"), steps=1)
    env = pretended(tmp_path, sbatch='[ "$1" = --test-only ] || echo 17', squeue=f"cat {tmp_path}/state")
    arguments = [str(recipe), "--nodes", "2", "--gpus-per-node", "0"]
    (tmp_path / "state").write_text("PENDING\n")
    assert launch(*arguments, env=env).returncode == 0
    kept = (tmp_path / "run" / "cluster" / "credentials.json").read_text()
    again = launch(*arguments, env=env)
    assert again.returncode == 2 and "job 17 of this run is pending; stop it first: scancel 17" in again.stderr
    assert (tmp_path / "run" / "cluster" / "credentials.json").read_text() == kept
    (tmp_path / "state").write_text("")
    assert launch(*arguments, env=env).returncode == 0


def test_time_limits_in_all_of_slurms_spellings():
    spelt = {"90": 5400, "90:30": 5430, "12:00:00": 43200, "4-0": 345600, "1-2:30": 95400, "1-00:00:05": 86405}
    assert {text: seconds_of(text) for text in spelt} == spelt
    with pytest.raises(StartupError, match="--time 1h"):
        seconds_of("1h")


# ---- a real Slurm ------------------------------------------------------------------------------------------------

real = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.skipif(not has_slurm(), reason=HOW)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm(tmp_path_factory.mktemp("slurm"), nodes=3) as env:
        yield env


def submit(env: dict[str, str], recipe: Path, nodes: int, *overrides: str) -> str:
    done = launch(str(recipe), *overrides, "--nodes", str(nodes), "--gpus-per-node", "0", env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("job ")[1].split(":")[0]


def log_of(folder: Path, job: str) -> str:
    path = folder / "run" / f"slurm-{job}.log"
    return path.read_text() if path.exists() else "(no log)"


def wait_for(condition, folder: Path, job: str, seconds: float = 240):
    ends = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < ends, f"waited too long:\n{log_of(folder, job)[-4000:]}"
        time.sleep(0.2)
    return found


def ended(env: dict[str, str], job: str) -> dict[str, str] | None:
    facts = job_facts(env, job)
    return facts if facts["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL") else None


def left_behind(folder: Path) -> list[str]:
    def lines():
        for process in psutil.process_iter():
            try:
                yield " ".join(process.cmdline())
            except psutil.Error:
                continue

    return [line for line in lines() if str(folder / "run") in line]


@pytest.mark.usefixtures("cluster")
class TestRealSlurm:
    pytestmark = real

    def test_two_nodes_train_to_the_end(self, cluster, tmp_path, tiny_model):
        recipe = write_recipe(tmp_path, tiny_model, steps=3)
        arguments = [str(recipe), "--nodes", "2", "--gpus-per-node", "0", "--wait"]
        done = launch(*arguments, env=cluster, seconds=300)
        assert done.returncode == 0, done.stderr + done.stdout
        assert steps_trained(tmp_path) == [1, 2, 3]
        again = launch(*arguments, env=cluster)
        assert again.returncode == 2 and "go on with --resume" in again.stderr

    def test_a_recipe_with_everything_newer_and_another_that_goes_on_from_it(self, cluster, tmp_path, tiny_model):
        recipe = write_recipe(tmp_path, tiny_model, steps=4)
        job = submit(cluster, recipe, 2, *everything_newer(tmp_path))
        facts = wait_for(lambda: ended(cluster, job), tmp_path, job)
        assert facts["JobState"] == "COMPLETED", log_of(tmp_path, job)
        check_newer(tmp_path / "run", 4)
        exported, second = tmp_path / "exported", tmp_path / "second"
        subprocess.run([*RLIF, "export", str(tmp_path / "run"), str(exported)], check=True, timeout=120, cwd=ROOT)
        job = submit(
            cluster, recipe, 2, "run.name=second", f"run.dir={second}", "trainer.steps=2", "--resume-from",
            str(exported),
        )  # fmt: skip
        facts = wait_for(lambda: ended(cluster, job), second, job)
        assert facts["JobState"] == "COMPLETED", (second / f"slurm-{job}.log").read_text()
        logs = "".join(path.read_text() for path in (second / "logs").glob("*/trainer-0.log"))
        assert f"lineage 0 starts from {exported}" in logs

    def test_a_run_that_the_guard_stops_fails_the_job_with_the_reason(self, cluster, tmp_path, tiny_model):
        job = submit(cluster, write_recipe(tmp_path, tiny_model, steps=500), 2, STOPS)
        facts = wait_for(lambda: ended(cluster, job), tmp_path, job)
        assert (facts["JobState"], facts["ExitCode"]) == ("FAILED", "1:0"), log_of(tmp_path, job)
        assert "stopped by the collapse guard: step " in log_of(tmp_path, job)
        assert not left_behind(tmp_path)

    def test_requeue_and_a_killed_rank_go_on_from_the_checkpoint(self, cluster, tmp_path, tiny_model):
        job = submit(cluster, write_recipe(tmp_path, tiny_model, steps=9), 3)
        wait_for(lambda: len(steps_trained(tmp_path)) >= 2, tmp_path, job)
        subprocess.run(["scontrol", "requeue", job], env=cluster, check=True, timeout=30)
        wait_for(lambda: job_facts(cluster, job)["JobState"] == "PENDING", tmp_path, job)
        # Slurm holds a requeued job back for two minutes.
        subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], env=cluster, check=True, timeout=30)
        wait_for(lambda: max(steps_trained(tmp_path)) >= 5, tmp_path, job)
        ranks = [
            process
            for process in psutil.process_iter(["cmdline"])
            if str(tmp_path / "run") in " ".join(process.info["cmdline"] or [])
            and "train" in process.info["cmdline"]
            and "--node-rank" not in process.info["cmdline"]  # their launchers
        ]
        assert len(ranks) == 2
        ranks[0].send_signal(signal.SIGKILL)
        facts = wait_for(lambda: ended(cluster, job), tmp_path, job)
        assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("COMPLETED", "0:0", "1"), log_of(
            tmp_path, job
        )
        trained = steps_trained(tmp_path)
        assert sorted(set(trained)) == list(range(1, 10))
        assert len(trained) <= 9 + 3  # not from the start again
        assert not left_behind(tmp_path)

    def test_a_part_that_refuses_fails_the_job_with_its_code_and_reason(self, cluster, tmp_path, tiny_model):
        recipe = write_recipe(tmp_path, tiny_model, steps=3)
        job = submit(cluster, recipe, 2, f"data.path={tmp_path}/gone.jsonl")
        facts = wait_for(lambda: ended(cluster, job), tmp_path, job)
        assert (facts["JobState"], facts["ExitCode"]) == ("FAILED", "2:0")
        assert "gone.jsonl" in log_of(tmp_path, job) and "orchestrator refused to start" in log_of(tmp_path, job)
        assert not left_behind(tmp_path)

    def test_a_rank_that_refuses_too(self, cluster, tmp_path, tiny_model):
        recipe = write_recipe(tmp_path, tiny_model, steps=3)
        job = submit(cluster, recipe, 2, "trainer.device=cuda")
        facts = wait_for(lambda: ended(cluster, job), tmp_path, job)
        assert (facts["JobState"], facts["ExitCode"]) == ("FAILED", "2:0")
        assert "trainer-0 refused to start" in log_of(tmp_path, job)
        assert "trainer.device: cuda, but torch sees no CUDA device" in log_of(tmp_path, job)

    def test_asked_before_the_time_limit_it_writes_a_checkpoint_and_stops(self, cluster, tmp_path, tiny_model):
        job = submit(cluster, write_recipe(tmp_path, tiny_model, steps=500, every=1000), 2, "--time", "1:00:00")
        wait_for(lambda: len(steps_trained(tmp_path)) >= 2, tmp_path, job)
        subprocess.run(["scancel", "--batch", "--signal=USR1", job], env=cluster, check=True, timeout=30)
        facts = wait_for(lambda: ended(cluster, job), tmp_path, job)
        assert facts["ExitCode"] == "143:0", log_of(tmp_path, job)
        last = steps_trained(tmp_path)[-1]
        assert (tmp_path / "run" / "checkpoints" / f"0-{last}" / "state.json").exists()
        assert not left_behind(tmp_path)

    def test_what_sbatch_refuses_is_one_line(self, cluster, tmp_path, tiny_model):
        recipe = write_recipe(tmp_path, tiny_model, steps=1)
        done = launch(str(recipe), "--nodes", "2", "--gpus-per-node", "0", "--partition", "nowhere", env=cluster)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
        assert "sbatch refuses the job: invalid partition specified: nowhere" in done.stderr
