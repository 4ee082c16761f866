"""An induced collapse, for real: the demo's model, no KL term, far too high a learning rate, one command.

Self-certainty alone is rewarded, and the policy soon falls onto few tokens. The guard has to see it within ten steps of
its first step, and the trainer to go back to a checkpoint from before it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from services.demo import task
from services.steps import read_steps

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parent.parent
PRETRAINED = 60
GUARD = {"action": "roll_back", "baseline": 4, "votes": 2, "window": 3, "again_within": 100}


def collapsing(folder: Path) -> Path:
    """The demo's recipe, made to collapse; small enough for a test."""
    tree = yaml.safe_load((ROOT / "recipes" / "demo.yaml").read_text())
    (folder / "train.jsonl").write_text(task.as_jsonl(task.problems("train")[:200]))
    (folder / "held-out.jsonl").write_text(task.as_jsonl(task.held_out(16)))
    tree["run"]["dir"] = str(folder / "run")
    tree["model"]["path"] = str(folder / "base")
    tree["data"]["path"] = str(folder / "train.jsonl")
    tree["rollout"] |= {"groups_per_request": 8, "group_size": 4}
    tree["trainer"] |= {
        "steps": 24,
        "groups_per_step": 8,
        "learning_rate": 5e-3,
        "kl_beta": 0.0,
        "warmup": 8,
        "checkpoints": {"every": 2, "keep": 3},
    }
    tree["evaluation"] = {
        "data": {**tree["data"], "path": str(folder / "held-out.jsonl")},
        "every": 4,
        "rewards": [tree["rewards"][1]],
        "tasks_per_request": 16,
    }
    tree["guard"] = GUARD
    tree["tracking"] = {"tensorboard": False, "samples_every": 4}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def collapsed(tmp_path_factory):
    from services.demo.base_model import make_demo_model

    folder = tmp_path_factory.mktemp("collapse")
    make_demo_model(folder / "base", seed=0, steps=PRETRAINED)
    argv = [sys.executable, "-m", "services.cli.main", "up", str(collapsing(folder))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(argv, capture_output=True, text=True, timeout=850, env=environment)
    return folder / "run", done


def logged(run: Path, name: str) -> str:
    return (run / "logs" / f"{name}.log").read_text()


def test_the_collapse_is_caught_within_ten_steps_and_rolled_back(collapsed):
    run, done = collapsed
    lines = [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]
    second = [line for line in lines if line["lineage"] == 1]
    alarms = [line for line in logged(run, "orchestrator").splitlines() if "collapse guard: step" in line]
    assert alarms and second, done.stdout + done.stderr + logged(run, "orchestrator")[-4000:]
    step, since = (int(alarms[0].partition(f"{word} ")[2].split()[0].strip(":(")) for word in ("step", "since step"))
    assert step - since < 10
    before = {line["step"]: line for line in lines if line["lineage"] == 0}
    # Nothing was trained after the step that raised it, and what is gone on from lies before its first step.
    assert max(before) == step and second[0]["start"] < since
    start = second[0]["start"]
    assert second[0]["step"] == start + 1 and second[0]["lr"] == pytest.approx(before[start + 1]["lr"] / 2)
    assert second[0]["group_ids"] == before[start + 1]["group_ids"]  # made again, by the policy gone back to
    survived = read_steps(run / "steps.jsonl")
    ids = [group for line in survived for group in line["group_ids"]]
    assert len(ids) == len(set(ids)) == 8 * survived[-1]["step"]


def test_versions_were_evaluated_exactly_and_samples_kept(collapsed):
    run, _ = collapsed
    results = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert [result["version"] for result in results[:2]] == [{"lineage": 0, "version": step} for step in (0, 4)]
    assert all(result["oldest"] == result["newest"] == result["version"] for result in results)
    assert all({"accuracy", "value.self_certainty", "length"} <= result["metrics"].keys() for result in results)
    rows = [json.loads(line) for line in (run / "samples" / "step-4.jsonl").read_text().splitlines()]
    assert len(rows) == 32 and rows[0]["outcome.exact_match"] in ("correct", "wrong", "no_answer")


def test_the_run_ended_as_it_should(collapsed):
    run, done = collapsed
    stopped = run / "stopped.txt"
    assert done.returncode == (1 if stopped.exists() else 0), done.stdout + done.stderr
    assert (run / "checkpoints" / "best").exists()
    if stopped.exists():
        assert "stopped by the collapse guard: again within 100 steps" in " ".join(done.stdout.split())
    else:
        assert read_steps(run / "steps.jsonl")[-1]["step"] == 24
