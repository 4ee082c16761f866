"""The model card of an export, and the export on a hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hub import Hub
from safetensors.torch import load, load_file
from served import served

from services import recipe
from services.contract import Version
from services.weights import disk
from trainer import card
from trainer.export import export

SECRET = "hunter2"


@pytest.fixture(scope="module")
def run_dir(tiny_model, tmp_path_factory) -> Path:
    """What a run of three steps leaves behind."""
    folder = tmp_path_factory.mktemp("exported") / "run"
    weights = folder / "weights" / "0-3"
    weights.mkdir(parents=True)
    tree = {
        "run": {"name": "cards", "dir": str(folder)},
        "model": {"path": str(tiny_model), "dtype": "float32"},
        "data": {"path": "/secret/place/tasks.jsonl", "fields": {"prompt": "q", "answer": "a"}},
        "rollout": {"urls": ["http://10.0.0.7:9000"]},
        "rewards": [
            {"name": "self_certainty"},
            {"name": "llm_judge", "weight": 0.5, "params": {"url": f"https://me:{SECRET}@judge.internal/v1"}},
        ],
        "trainer": {"steps": 9, "groups_per_step": 2},
        "queue": {"url": f"redis://:{SECRET}@10.0.0.8:6379"},
    }
    (folder / "recipe.yaml").write_text(recipe.dump(recipe.parse(tree)))
    manifest = disk.write_tensors(weights, load_file(tiny_model / "model.safetensors").items())
    disk.copy_config(tiny_model, weights, manifest)
    version = {"run_id": "cards", "lineage": 0, "version": 3, "transport": "disk", "location": str(weights)}
    version |= {"manifest": [entry.model_dump() for entry in manifest], "created_at": 0.0}
    (weights / "manifest.json").write_text(json.dumps(version))
    rows = [
        {"lineage": 0, "start": 0, "step": step, "group_ids": [f"g{step}a", f"g{step}b"], "reward_mean": step / 4}
        | {"accuracy.llm_judge": 0.125 * step}
        for step in range(1, 5)
    ]
    (folder / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    marks = [{"version": {"lineage": 0, "version": at}, "metrics": {"accuracy": at / 10}} for at in (2, 4)]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(mark) + "\n" for mark in marks) + '{"torn')
    return folder


def test_the_card_has_recipe_and_results_and_nothing_of_this_machine(run_dir, tmp_path):
    assert export(run_dir, tmp_path / "model") == Version(version=3)
    text = (tmp_path / "model" / "README.md").read_text()
    _, header, body = text.split("---\n", 2)
    assert yaml.safe_load(header)["library_name"] == "transformers" and "base_model" not in yaml.safe_load(header)
    assert "# cards, step 3" in body and "`llm_judge` (weight 0.5)" in body
    # Steps 1 to 3, as step 4 is not in these weights; the evaluation of step 2 alone.
    assert "| reward_mean | 0.25 | 0.75 |" in body and "| accuracy.llm_judge | 0.125 | 0.375 |" in body
    assert "| 2 | 0.2 |" in body and "| 4 |" not in body
    shown = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert shown["data"]["path"] == "tasks.jsonl" and shown["trainer"]["steps"] == 9 and "queue" not in shown
    for private in (SECRET, "10.0.0", "judge.internal", "/secret/", str(run_dir), str(run_dir.parent)):
        assert private not in text, private


def test_a_card_without_records_is_short(tmp_path):
    text = card.write(tmp_path, Version(version=2))
    assert text.startswith("---\n") and "step 2" in text and "## " not in text


def test_an_export_says_which_groups_it_was_trained_on(run_dir, tmp_path):
    export(run_dir, tmp_path / "model")
    about = json.loads((tmp_path / "model" / "rlif.json").read_text())
    assert (about["run"], about["lineage"], about["step"]) == ("cards", 0, 3)
    assert about["trained"] == ["g1a", "g1b", "g2a", "g2b", "g3a", "g3b"]


def push(run_dir: Path, repository: str, *options: str, **env: str) -> subprocess.CompletedProcess:
    argv = [sys.executable, "-m", "services.cli.main", "push-to-hub", str(run_dir), repository, *options]
    quiet = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_TOKEN": ""}
    environment = {**os.environ, **quiet, **env, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120)


def test_a_push_puts_the_model_on_the_hub(run_dir, tiny_model):
    hub = Hub(token="hf_good")
    with served(hub.app()) as url:
        done = push(run_dir, "me/cards", "--private", HF_ENDPOINT=url, HF_TOKEN="hf_good")
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == f"{url}/me/cards"
        refused = push(run_dir, "me/other", HF_ENDPOINT=url, HF_TOKEN="hf_bad")
    files = hub.files["me/cards"]
    assert hub.private == {"me/cards": True} and hub.messages == ["rlif: weights 0.3"]
    assert {"README.md", "rlif.json", "config.json", "tokenizer.json", "model.safetensors"} <= set(files)
    weights = load_file(tiny_model / "model.safetensors")
    assert all(tensor.equal(weights[name]) for name, tensor in load(files["model.safetensors"]).items())
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert refused.stderr.startswith("rlif: me/other: the hub at ") and "401" in refused.stderr
    assert "hf_bad" not in refused.stderr
    assert not list(run_dir.glob(".push-*"))


def test_a_push_needs_a_token(run_dir):
    done = push(run_dir, "me/cards")
    assert done.returncode == 2 and done.stderr.startswith("rlif: HF_TOKEN: is not set")
