"""What `rlif recipe check --gpu-gib` estimates for a rank against what a trainer's process holds; CPU, one rank.

    python benchmarks/memory.py

Each case trains a random Qwen2 (29M parameters) for two steps in a process of its own, with a GPU's LM-head tile. Its
memory is the largest `RssAnon` after the imports' is taken off; the allocator gives back what is freed. The estimate is
without CUDA's allowance and without overlapping reduction, which needs a GPU.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent / "tests")]

CASES = {
    "float32, stage 0": {"zero_stage": 0},
    "float32, stage 2": {"zero_stage": 2},
    "float32, stage 0, checkpointed": {"zero_stage": 0, "gradient_checkpointing": True},
    "bfloat16, stage 2": {"zero_stage": 2, "dtype": "bfloat16"},
    "float32, stage 0, LoRA": {"zero_stage": 0, "lora": {"rank": 16}},
    "float32, stage 0, reference": {"zero_stage": 0, "kl_beta": 0.1},
}
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
"""For glibc, which else keeps much of what is freed."""


def recipe_of(folder: Path, case: dict) -> dict:
    case = dict(case)
    model = {"path": str(folder / "model"), "dtype": case.pop("dtype", "float32"), "lora": case.pop("lora", None)}
    trainer = {"steps": 2, "groups_per_step": 4, "kl_beta": 0.0, "micro_batch_tokens": 512, "device": "cpu"}
    return {
        "run": {"name": "memory", "dir": str(folder / "run")},
        "model": model,
        "data": {"path": "unused.jsonl", "fields": {"prompt": "p"}, "max_prompt_tokens": 64},
        "rollout": {"sampling": {"max_tokens": 192}},
        "rewards": "intuitor",
        "trainer": {**trainer, "threads": 1, **case},
    }


def make_model(folder: Path) -> None:
    from tiny import make_tiny_model

    make_tiny_model(folder / "model", hidden=512, layers=8, vocab_size=16000, scale=1.0)


def held() -> int:
    """Bytes of this process that are in no file."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


def measure(tree: dict) -> int:
    """Bytes that training held at most, of this process."""
    import deepspeed  # noqa: F401 - before the measurement starts
    import numpy as np
    import peft  # noqa: F401

    from services import memory, recipe
    from trainer import engine as engines
    from trainer import policy as policies
    from trainer import reference as references
    from trainer.batch import Sequences
    from trainer.ranks import join
    from trainer.step import train_step

    chosen = recipe.parse(tree)
    rng = np.random.default_rng(0)
    # Two micro-batches: all gradients are there in the second one's backward pass.
    lengths = np.full(4, 256, "<i4")
    before, most, over = held(), [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            most[0] = max(most[0], held())

    with join(chosen.trainer) as ranks:
        policy = policies.load(chosen.model, chosen.trainer.gradient_checkpointing)
        policy.head.tile_elements = memory.TILE
        engine = engines.start(policy, chosen, ranks)
        reference = references.start(chosen, ranks, policy)
        watcher = threading.Thread(target=watch)
        watcher.start()
        for step in range(2):
            tokens = rng.integers(0, 16000, 4 * 256).astype("<i4")
            given = {"prompts": lengths // 16, "completions": lengths - lengths // 16}
            logprobs = np.full(int(given["completions"].sum()), -10, "<f4")
            numbers = {
                "advantages": np.ones(4, "<f4"),
                "temperatures": np.ones(4, "<f4"),
                "groups": np.arange(4, dtype="<i4"),
            }
            batch = Sequences(tokens=tokens, logprobs=logprobs, **given, **numbers)
            train_step(engine, reference, batch, step, chosen.trainer, ranks)
        over.set()
        watcher.join()
    return most[0] - before


def compare(folder: Path, name: str) -> tuple[int, int]:
    """(estimated, measured) bytes."""
    from services import memory, recipe

    tree = recipe_of(folder, CASES[name])
    command = [sys.executable, __file__, "--case", json.dumps(tree)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **GIVES_BACK})
    chosen = recipe.parse(tree)
    needed = memory.need(chosen, memory.shape(chosen.model), overlaps=False)
    return needed.total - needed.cuda, int(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(measure(json.loads(options.case)))
        return
    with tempfile.TemporaryDirectory(prefix="rlif-bench-") as name:
        folder = Path(name)
        make_model(folder)
        for case in CASES:
            estimated, measured = compare(folder, case)
            sizes = f"estimated {estimated / 2**20:6.0f} MiB, held {measured / 2**20:6.0f} MiB"
            print(f"  {case:<34} {sizes}   {estimated / measured:4.2f}", flush=True)


if __name__ == "__main__":
    main()
