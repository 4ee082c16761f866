"""One rlif step against one step of TRL's GRPOTrainer: same model, prompts, group size, lengths, threads; CPU.

    python benchmarks/step.py            # needs the extra `bench` (TRL 1.16); alone on the machine

Each arm runs in processes of its own, one after the other. A step is everything from sampling to updated weights;
rlif's also scores self-certainty with a model of its own and carries groups over HTTP and redis, TRL's gets a
constant-time reward. Reported: median seconds of a step after the first `--warmup` ones.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

PROMPTS, GROUP, TOKENS = 8, 8, 64


def make_inputs(folder: Path) -> None:
    """A random Qwen2 of about 3M parameters that hardly ever samples EOS, and prompts of equal length."""
    from tiny import make_tiny_model

    make_tiny_model(folder / "model", hidden=256, layers=4, scale=1.0)
    rows = [{"prompt": f"say the number {number:04d}", "id": str(number)} for number in range(512)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def rlif_recipe(folder: Path, steps: int, staleness: int, threads: int) -> dict:
    return {
        "run": {"name": "bench", "dir": str(folder / f"rlif-{staleness}"), "seed": 0},
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "data": {"path": str(folder / "prompts.jsonl"), "fields": {"prompt": "prompt", "id": "id"}},
        "rollout": {
            "group_size": GROUP,
            "groups_per_request": PROMPTS,
            "sampling": {"max_tokens": TOKENS},
            "threads": threads,
        },
        "rewards": "self_certainty",
        "scorer": {"threads": threads, "verifier_workers": 1},
        "pacing": {"max_staleness": staleness},
        "trainer": {
            "steps": steps,
            "groups_per_step": PROMPTS,
            "learning_rate": 1e-6,
            "zero_stage": 0,
            "threads": threads,
            "kl_beta": 0.0,
        },
        "tracking": {"tensorboard": False},
    }


def run_rlif(folder: Path, steps: int, staleness: int, threads: int) -> list[float]:
    import yaml

    path = folder / f"rlif-{staleness}.yaml"
    path.write_text(yaml.safe_dump(rlif_recipe(folder, steps, staleness, threads)))
    command = [sys.executable, "-m", "services.cli.main", "up", str(path)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    records = [json.loads(line) for line in (folder / f"rlif-{staleness}" / "steps.jsonl").read_text().splitlines()]
    return [record["seconds"]["total"] for record in records[1:]]


TRL_ARM = """
import json, sys, time
from pathlib import Path
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

folder, steps, prompts, group, tokens, threads = Path(sys.argv[1]), *map(int, sys.argv[2:7])
torch.set_num_threads(threads)
model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(folder / "model")
rows = [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").read_text().splitlines()]
times = []

class Clock(TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        times.append(time.perf_counter())

config = GRPOConfig(
    output_dir=str(folder / "trl"), use_cpu=True, bf16=False, per_device_train_batch_size=prompts * group,
    num_generations=group, max_completion_length=tokens, max_steps=steps, learning_rate=1e-6, beta=0.0,
    temperature=1.0, top_k=0, loss_type="grpo", report_to=[], save_strategy="no",
    logging_strategy="no", disable_tqdm=True,
)
GRPOTrainer(
    model=model, processing_class=tokenizer, args=config, callbacks=[Clock()],
    reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
    train_dataset=Dataset.from_dict({"prompt": rows}),
).train()
print(json.dumps([later - earlier for earlier, later in zip(times, times[1:])]))
"""


def run_trl(folder: Path, steps: int, threads: int) -> list[float]:
    arguments = [str(folder), *map(str, (steps, PROMPTS, GROUP, TOKENS, threads))]
    done = subprocess.run([sys.executable, "-c", TRL_ARM, *arguments], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each process")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rlif-bench-") as name:
        folder = Path(name)
        make_inputs(folder)
        arms = {
            "TRL GRPOTrainer": lambda: run_trl(folder, options.steps, options.threads),
            "rlif, on-policy": lambda: run_rlif(folder, options.steps, 0, options.threads),
            "rlif, max_staleness 1": lambda: run_rlif(folder, options.steps, 1, options.threads),
        }
        medians = {}
        print(f"{PROMPTS} prompts x {GROUP} completions x {TOKENS} tokens, {options.threads} thread(s) a process")
        for arm, run in arms.items():
            medians[arm] = statistics.median(run()[options.warmup :])
            ratio = medians["TRL GRPOTrainer"] / medians[arm]
            print(f"  {arm:<24} {medians[arm]:6.2f} s a step   {ratio:5.2f}x TRL's speed")


if __name__ == "__main__":
    main()
