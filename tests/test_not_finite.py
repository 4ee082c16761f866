"""Gradients and losses that are no numbers end the run before anything is published or saved of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ranks_command import command
from scored_groups import make_groups

pytestmark = pytest.mark.slow
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
CASES = [(2, "float32", "gradient"), (2, "bfloat16", "gradient"), (3, "bfloat16", "gradient"), (2, "float32", "weight")]
"""DeepSpeed has its own ways with what overflows, by stage and dtype: it may skip an update, or say -1 for a norm."""


def make_recipe(model: Path, stage: int, dtype: str) -> dict:
    keys = {"steps": 1, "groups_per_step": 3, "kl_beta": 0.0, "zero_stage": stage, "device": "cpu", "threads": 1}
    return {
        "run": {"name": "broken", "dir": "unused"},
        "model": {"path": str(model), "dtype": dtype},
        "data": {"path": "unused.jsonl", "fields": {"prompt": "p"}},
        "rewards": "intuitor",
        "trainer": keys,
    }


def test_what_is_no_number_is_refused_at_every_stage(tiny_model):
    done = subprocess.run(
        command(1, __file__, str(tiny_model)), env=ENVIRONMENT, timeout=240, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == ["the gradient's norm at step 0 is inf"] * 3 + ["the loss of step 0 is nan"]


def outcomes(model: Path) -> list[str]:
    """Of each case, with an infinite gradient at a finite loss, or with a weight that is NaN."""
    import torch

    from services import recipe
    from trainer import engine as engines
    from trainer import policy as policies
    from trainer.batch import sequences
    from trainer.ranks import join
    from trainer.step import NotFinite, train_step

    words = []
    with join(recipe.parse(make_recipe(model, 2, "float32")).trainer) as ranks:
        for stage, dtype, fault in CASES:
            chosen = recipe.parse(make_recipe(model, stage, dtype))
            policy = policies.load(chosen.model)
            weight = policy.model.get_submodule("model.layers.0.mlp.up_proj").weight
            if fault == "gradient":
                weight.register_hook(lambda gradient: gradient * torch.inf)
            else:
                weight.data[0, 0] = torch.nan
            engine = engines.start(policy, chosen, ranks)
            batch = sequences(make_groups(3, seed=1), policy.vocab_size)
            try:
                train_step(engine, None, batch, 0, chosen.trainer, ranks)
                words.append("taken")
            except NotFinite as error:
                words.append(str(error))
            engine.destroy()
    return words


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(outcomes(Path(sys.argv[1]))) + "\n")
