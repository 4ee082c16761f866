"""A recipe small enough to be trained on several nodes of one machine."""

import json
from pathlib import Path

import yaml


def write_recipe(folder: Path, model: Path, steps: int, every: int = 1) -> Path:
    tasks = folder / "tasks.jsonl"
    tasks.write_text("".join(json.dumps({"q": f"say {n}", "a": str(n), "id": f"t{n}"}) + "\n" for n in range(40)))
    recipe = {
        "run": {"name": "cluster", "dir": str(folder / "run"), "seed": 3, "deterministic": True},
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"path": str(tasks), "fields": {"prompt": "q", "answer": "a", "id": "id"}},
        "rollout": {
            "group_size": 4,
            "groups_per_request": 2,
            "sampling": {"temperature": 1.0, "max_tokens": 8},
            "threads": 1,
        },
        "rewards": [{"name": "self_certainty"}],
        "scorer": {"follow": "match", "threads": 1, "verifier_workers": 1},
        "pacing": {"max_staleness": 0},
        "trainer": {
            "steps": steps,
            "groups_per_step": 4,
            "learning_rate": 1e-3,
            "zero_stage": 0,
            "threads": 1,
            "checkpoints": {"every": every, "keep": 2},
        },
        "tracking": {"tensorboard": False},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def everything_newer(folder: Path) -> list[str]:
    """Overrides of such a recipe: deltas that running completions do not wait for, an evaluation, W&B without a
    network, samples."""
    data = {"path": str(folder / "tasks.jsonl"), "fields": {"prompt": "q", "answer": "a", "id": "id"}, "limit": 3}
    evaluation = {"data": data, "every": 2, "rewards": [{"name": "exact_match"}], "certainty": False}
    tracking = {"tensorboard": False, "samples_every": 2, "wandb": {"project": "clusters", "mode": "offline"}}
    return [
        "run.deterministic=false",
        "pacing.max_staleness=1",
        "trainer.checkpoints.every=2",
        f"weights={json.dumps({'transport': 'delta', 'snapshot_every': 3, 'in_flight': 'keep'})}",
        f"evaluation={json.dumps(evaluation)}",
        f"tracking={json.dumps(tracking)}",
    ]


STOPS = "guard={action: stop, votes: 1, window: 1, bands: {length: {at_most: 0.5}}}"
"""The collapse guard stops the run at its first steps: completions are never shorter than a token."""


def check_newer(run_dir: Path, steps: int) -> None:
    """What such a run leaves in its folder."""
    lines = [json.loads(line) for line in (run_dir / "evaluations.jsonl").read_text().splitlines()]
    assert [line["version"]["version"] for line in lines] == [0, *range(2, steps + 1, 2)]
    assert all("accuracy" in line["metrics"] for line in lines) and (run_dir / "checkpoints" / "best").exists()
    made = [json.loads(path.read_text())["transport"] for path in (run_dir / "weights").glob("*/manifest.json")]
    assert "delta" in made
    assert (run_dir / "samples" / "step-2.jsonl").exists() and list(run_dir.glob("wandb/offline-run-*"))


def steps_trained(folder: Path) -> list[int]:
    """The step numbers of steps.jsonl, in order of writing."""
    path = folder / "run" / "steps.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith(b"}")]
