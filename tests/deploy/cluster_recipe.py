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


def steps_trained(folder: Path) -> list[int]:
    """The step numbers of steps.jsonl, in order of writing."""
    path = folder / "run" / "steps.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith(b"}")]
