"""One rlif step against one step of TRL's GRPOTrainer: same model, prompts, group size, lengths, threads; CPU.

    python benchmarks/step.py                        # needs the extra `bench` (TRL 1.16); alone on the machine
    python benchmarks/step.py --prompt-tokens 256    # prompts as long as a few examples make them

Each arm runs in processes of its own; rounds of all arms follow each other, so that what else the machine does falls on
all of them. A step is everything from sampling to updated weights. rlif carries groups over HTTP and redis and
publishes its weights; with `length` it does no more than TRL does, whose reward is the text's length too; with
self-certainty it also scores with a model of its own. Reported: median seconds of a step after the first `--warmup`
ones, over all rounds, its phases, the CPU time of all processes together (on a machine with other work the steadier
figure, with `--threads 1`), and the tokens generated in a step, which must agree.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

PROMPTS, GROUP, TOKENS = 8, 8, 64
ARMS = {
    "TRL GRPOTrainer": None,
    "rlif, length, on-policy": {"rewards": "length", "staleness": 0},
    "rlif, self-certainty, on-policy": {"rewards": "self_certainty", "staleness": 0},
    "rlif, self-certainty, max_staleness 1": {"rewards": "self_certainty", "staleness": 1},
}
Steps = list[dict[str, float]]
"""Of each step: seconds by phase, `total`, `cpu` of all processes, and `tokens` generated."""


def make_inputs(folder: Path, prompt_tokens: int) -> None:
    """A random Qwen2 of about 3M parameters that hardly ever samples EOS, and prompts of equal length."""
    from tiny import make_tiny_model

    make_tiny_model(folder / "model", hidden=256, layers=4, scale=1.0)
    texts = [f"say the number {number:04d}".rjust(prompt_tokens, ".") for number in range(512)]
    rows = [{"prompt": text, "id": str(number)} for number, text in enumerate(texts)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def rlif_recipe(folder: Path, run: Path, steps: int, threads: int, rewards: str, staleness: int) -> dict:
    return {
        "run": {"name": "bench", "dir": str(run), "seed": 0},
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "data": {"path": str(folder / "prompts.jsonl"), "fields": {"prompt": "prompt", "id": "id"}},
        "rollout": {
            "group_size": GROUP,
            "groups_per_request": PROMPTS,
            "sampling": {"max_tokens": TOKENS},
            "threads": threads,
        },
        "rewards": rewards,
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


def run_rlif(folder: Path, number: int, steps: int, threads: int, arm: dict) -> Steps:
    import yaml

    run = folder / f"rlif-{arm['rewards']}-{arm['staleness']}-{number}"
    path = run.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(rlif_recipe(folder, run, steps, threads, **arm)))
    command = [sys.executable, "-m", "services.cli.main", "up", str(path)]
    log = run.with_suffix(".log")
    with log.open("w") as out:
        process = psutil.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    used: list[float] = []
    while process.poll() is None:
        file = run / "steps.jsonl"
        lines = file.read_text().count("\n") if file.exists() else 0
        used += [cpu_seconds(process)] * (lines - len(used))
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"rlif up ended with {process.returncode}:\n{log.read_text()[-4000:]}")
    records = [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]
    cpu = [later - earlier for earlier, later in zip(used, used[1:], strict=False)]
    return [
        {**record["seconds"], "tokens": record["completion_tokens"], "cpu": seconds}
        for record, seconds in zip(records[1:], cpu, strict=False)
    ]


def cpu_seconds(process: psutil.Process) -> float:
    """What a process and all below it have computed so far."""
    total = 0.0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += sum(one.cpu_times()[:2])
        except psutil.NoSuchProcess:
            pass
    return total


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
done, phases, last, used = [], {}, time.perf_counter(), time.process_time()

def timed(owner, name, phase):
    call = getattr(owner, name)
    def measured(*args, **kwargs):
        start = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            phases[phase] = phases.get(phase, 0) + time.perf_counter() - start
    setattr(owner, name, measured)

class Clock(TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        global last, used
        now, cpu = time.perf_counter(), time.process_time()
        done.append({**phases, "total": now - last, "cpu": cpu - used})
        last, used = now, cpu
        phases.clear()

def reward(completion_ids, completions, **_):
    phases["tokens"] = sum(map(len, completion_ids))
    return [float(len(text)) for text in completions]

config = GRPOConfig(
    output_dir=str(folder / "trl"), use_cpu=True, bf16=False, per_device_train_batch_size=prompts * group,
    num_generations=group, max_completion_length=tokens, max_steps=steps, learning_rate=1e-6, beta=0.0,
    temperature=1.0, top_k=0, loss_type="grpo", report_to=[], save_strategy="no",
    logging_strategy="no", disable_tqdm=True,
)
trainer = GRPOTrainer(
    model=model, processing_class=tokenizer, args=config, callbacks=[Clock()], reward_funcs=reward,
    train_dataset=Dataset.from_dict({"prompt": rows}),
)
timed(trainer, "_generate", "generate")
timed(trainer, "compute_loss", "forward")
timed(trainer.accelerator, "backward", "backward")
trainer.train()
print(json.dumps(done[1:]))
"""


def run_trl(folder: Path, steps: int, threads: int) -> Steps:
    arguments = [str(folder), *map(str, (steps, PROMPTS, GROUP, TOKENS, threads))]
    done = subprocess.run([sys.executable, "-c", TRL_ARM, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"TRL ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def report(steps: dict[str, Steps]) -> None:
    def median(arm: str, phase: str) -> float:
        return statistics.median(step.get(phase, 0.0) for step in steps[arm])

    for arm in steps:
        total, cpu = median(arm, "total"), median(arm, "cpu")
        ratios = [total / median("TRL GRPOTrainer", "total"), cpu / median("TRL GRPOTrainer", "cpu")]
        times = f"{total:6.2f} s a step, {cpu:6.2f} s of CPU"
        print(f"  {arm:<38} {times}   {ratios[0]:5.2f} and {ratios[1]:5.2f} of TRL's")
    for arm, measured in steps.items():
        phases = [phase for phase in measured[-1] if phase not in ("total", "tokens", "cpu")]
        parts = ", ".join(f"{phase} {median(arm, phase):.2f}" for phase in phases)
        print(f"  {arm:<38} {parts}; {median(arm, 'tokens'):.0f} tokens generated")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=0, help="prompts of at least so many characters")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each process")
    options = parser.parse_args()
    # The first step of each arm, which warms up, is never among those measured.
    if options.warmup + 1 >= options.steps:
        parser.error(f"--steps: {options.steps} leaves none after the first and --warmup ({options.warmup}) others")
    steps: dict[str, Steps] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory(prefix="rlif-bench-") as name:
        folder = Path(name)
        make_inputs(folder, options.prompt_tokens)
        for number in range(options.rounds):
            for arm, settings in ARMS.items():
                measured = (
                    run_trl(folder, options.steps, options.threads)
                    if settings is None
                    else run_rlif(folder, number, options.steps, options.threads, settings)
                )
                steps[arm] += measured[options.warmup :]
                seconds = sum(step["total"] for step in measured)
                print(
                    f"round {number + 1} of {options.rounds}, {arm}: {len(measured)} steps, {seconds:.0f} s", flush=True
                )
    print(f"{PROMPTS} prompts x {GROUP} completions x {TOKENS} tokens, {options.threads} thread(s) a process")
    print(f"load of the machine over the last 15 minutes: {os.getloadavg()[2]:.1f}")
    report(steps)


if __name__ == "__main__":
    main()
