"""The code recipe end to end: contests prepared, programs sampled, run against their tests, trained on."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from sandboxes import started
from tiny import make_tiny_model

from reward_server.sandbox.bubblewrap import Bubblewrap
from services.steps import read_steps

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROOT = Path(__file__).parent.parent
RIGHT, WRONG = (f"```python\nprint({factor}*int(input()))\n```" for factor in (2, 3))
PROBLEMS = ["Double it.", "Print twice n.", "n + n?", "Twice!"]


def make_programmer(folder: Path) -> Path:
    """A model that answers any of the problems with the right program or the wrong one, about as often."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    make_tiny_model(folder, seed=0, scale=1.0)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).train()
    optimizer, rng = torch.optim.AdamW(model.parameters(), lr=4e-3), random.Random(0)
    for step in range(150):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1.0, (150 - step) / 75)
        answers = [f"<user>{rng.choice(PROBLEMS)}<assistant>{answer}<eos>" for answer in (RIGHT, WRONG)]
        batch = tokenizer(answers, return_tensors="pt", padding=True, add_special_tokens=False)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(**batch, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def contest(description: str) -> dict:
    """A record of the shape of deepmind/code_contests."""
    cases = {kind: [str(number) for number in numbers] for kind, numbers in [("public", [1]), ("private", [4, -3])]}
    tests = {
        f"{kind}_tests": {"input": given, "output": [f"{2 * int(number)}\n" for number in given]}
        for kind, given in cases.items()
    }
    return {"name": description, "description": description, **tests, "generated_tests": {"input": [], "output": []}}


def rlif(*arguments: object) -> subprocess.CompletedProcess:
    argv = [sys.executable, "-m", "services.cli.main", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(argv, capture_output=True, text=True, timeout=250, env=environment)


async def test_contests_are_prepared_answered_run_and_trained_on(tmp_path):
    await (await started(Bubblewrap(frozenset({"python"})))).stop()
    (tmp_path / "contests.jsonl").write_text("".join(json.dumps(contest(text)) + "\n" for text in PROBLEMS))
    prepared = rlif("data", "prepare", "code_contests", tmp_path / "tasks.jsonl", "--file", tmp_path / "contests.jsonl")
    assert prepared.returncode == 0, prepared.stderr
    one = {"device": "cpu", "threads": 1}
    small = {
        "extends": str(ROOT / "recipes" / "grpo_code_3b.yaml"),
        "run": {"name": "code", "dir": str(tmp_path / "run"), "deterministic": True},
        "model": {"path": str(make_programmer(tmp_path / "model")), "dtype": "float32"},
        "data": {"path": str(tmp_path / "tasks.jsonl"), "prompt": None},
        "rollout": {
            **one, "engine": "transformers", "group_size": 8, "groups_per_request": 4, "max_model_len": None,
            "sampling": {"temperature": 1.0, "max_tokens": 48},
        },
        "scorer": {**one, "engine": "transformers", "max_model_len": None, "verifier_workers": 1},
        "trainer": {
            **one, "steps": 2, "groups_per_step": 4, "zero_stage": 0, "learning_rate": 1e-3, "micro_batch_tokens": 4096,
            "gradient_checkpointing": False, "warmup": 0,
        },
        "tracking": {"tensorboard": False, "samples_every": 1},
    }  # fmt: skip
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    done = rlif("up", tmp_path / "small.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    for step in (1, 2):
        samples = [json.loads(line) for line in (tmp_path / f"run/samples/step-{step}.jsonl").read_text().splitlines()]
        right = [row["completion"] == RIGHT for row in samples]
        assert len(samples) == 32 and 4 <= sum(right) <= 28, samples[:4]
        for row, is_right in zip(samples, right, strict=True):
            assert row["value.code_tests"] == float(is_right) and row["valid"], row
    trained = read_steps(tmp_path / "run" / "steps.jsonl")
    assert [line["step"] for line in trained] == [1, 2] and all(line["grad_norm"] > 0 for line in trained)
