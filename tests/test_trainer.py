"""The trainer's update against plain torch in float64; whole runs over a real redis, killed, stopped and resumed."""

import asyncio
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from audit import read_steps, surviving
from plain_trainer import plain_training
from prometheus_client import REGISTRY
from ranks_command import command
from safetensors.torch import load_file
from scored_groups import make_groups

from services import codec, recipe
from services.contract import Completion, CompletionScore, Score, Version
from services.keys import Keys
from services.queue import GroupQueue
from services.recipe import RecipeError
from services.redis import connect, connect_sync
from trainer import checkpoint
from trainer.engine import learning_rate
from trainer.export import begin_from, export
from trainer.metrics import StepLog, of_groups
from trainer.reference import Reference
from trainer.train import main

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


def make_recipe(model: Path, run_dir: Path, name: str = "test", dtype: str = "float32", **trainer) -> dict:
    # With so large an eps an update is about proportional to the gradient: no sign of a rounding error decides it.
    defaults = {
        "steps": 4,
        "groups_per_step": 3,
        "learning_rate": 1e-2,
        "adam_eps": 1e-2,
        "weight_decay": 0.1,
        "grad_clip": 1.0,
        "kl_beta": 0.1,
        "micro_batch_tokens": 40,
        "device": "cpu",
        "threads": 1,
    }
    return {
        "run": {"name": name, "dir": str(run_dir), "deterministic": True},
        "model": {"path": str(model), "dtype": dtype},
        "data": {"path": "unused.jsonl", "fields": {"prompt": "p"}},
        "rewards": "intuitor",
        "trainer": {**defaults, **trainer},
        "tracking": {"tensorboard": False},
    }


# ---- the update ------------------------------------------------------------------------------------------------

SEVERAL = {"minibatches": 3, "epochs_per_batch": 2}
CASES = {
    "zero 0": {"zero_stage": 0},
    "zero 1": {"zero_stage": 1},
    "zero 2": {"zero_stage": 2},
    "zero 3": {"zero_stage": 3},
    "zero 3, checkpointed": {"zero_stage": 3, "gradient_checkpointing": True},
    "one micro-batch": {"zero_stage": 2, "micro_batch_tokens": 100_000},
    "token mean, rollout ratios": {"zero_stage": 2, "aggregation": "token_mean", "old_logprobs": "rollout"},
    "no importance weight, no clip": {"zero_stage": 1, "importance": None, "grad_clip": 1e6},
    "dapo, several updates": {"zero_stage": 0, "algorithm": "dapo", **SEVERAL},
    "gspo, several updates, zero 3": {"zero_stage": 3, "algorithm": "gspo", **SEVERAL, "kl_beta": 0.1},
    "reinforce++, offloaded reference": {"zero_stage": 2, "algorithm": "reinforce_pp", "reference": {"offload": True}},
    "cispo, entropy bonus, offloaded reference, zero 3": {
        "zero_stage": 3,
        "algorithm": "cispo",
        "entropy_bonus": 0.05,
        "reference": {"offload": True},
        **SEVERAL,
    },
    "rloo, moving reference": {"zero_stage": 1, "algorithm": "rloo", "reference": {"kind": "ema", "decay": 0.5}},
    "bfloat16, zero 1": {"zero_stage": 1, "dtype": "bfloat16"},
    "bfloat16, zero 2": {"zero_stage": 2, "dtype": "bfloat16"},
    "bfloat16, zero 3": {"zero_stage": 3, "dtype": "bfloat16"},
}


def batches():
    """Two ordinary steps, one with fewer sequences than ranks, one without any."""
    ordinary = [make_groups(3, seed=seed) for seed in range(2)]
    first, second = make_groups(2, seed=9, size=3)
    nothing = [score.model_copy(update={"valid": False}) for score in first.scores]
    one = [score.model_copy(update={"valid": place == 0}) for place, score in enumerate(second.scores)]
    answer = second.completions[0].model_copy(
        update={"token_ids": [1, 2, 3], "logprobs": [-5.0, -6.0, -5.5], "finish_reason": "stop"}
    )
    single = second.model_copy(update={"scores": one, "completions": [answer, *second.completions[1:]]})
    return [*ordinary, [single], [first.model_copy(update={"scores": nothing})]]


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def trained(request, tiny_model, tmp_path_factory):
    """Every case trained in one start of the ranks: folder by case."""
    folder = tmp_path_factory.mktemp("cases")
    packed = [[codec.pack(group).hex() for group in groups] for groups in batches()]
    cases = [
        {
            "recipe": make_recipe(tiny_model, folder / "run", ranks=request.param, **case),
            "batches": packed,
            "out": str(folder / name),
            "tile_elements": 7 * 288,
        }
        for name, case in CASES.items()
    ]
    (folder / "cases.json").write_text(json.dumps(cases))
    worker = str(Path(__file__).with_name("trainer_worker.py"))
    done = subprocess.run(
        command(request.param, worker, str(folder / "cases.json")),
        env=ENVIRONMENT,
        timeout=240,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout.decode()[-4000:]
    return folder


def test_ranks_of_one_machine_listen_on_loopback_alone(trained):
    """torchrun's agent listened on every interface and unpickled what it found in its store."""
    found = [json.loads(path.read_text()) for path in trained.glob("listening-*.json")]
    assert {address for listening in found for address in listening} <= {"127.0.0.1", "::1"}
    assert len(found) == 1 or all(found)


@pytest.fixture(scope="module")
def oracle(tiny_model):
    """Plain training in float64, once for all cases that only differ in how the same update is computed."""
    known: dict[str, tuple] = {}

    def train(case: dict) -> tuple:
        same = {"zero_stage", "dtype", "gradient_checkpointing", "micro_batch_tokens"}
        objective = {key: value for key, value in case.items() if key not in same}
        if str(objective) not in known:
            settings = recipe.parse(make_recipe(tiny_model, Path("unused"), **objective)).trainer
            known[str(objective)] = plain_training(tiny_model, batches(), settings, learning_rate)
        return known[str(objective)]

    return train


@pytest.mark.parametrize("name", CASES)
def test_the_update_is_that_of_plain_torch(trained, oracle, tiny_model, name):
    losses, norms, expected = oracle(CASES[name])
    results = json.loads((trained / name / "results.json").read_text())
    weights = load_file(trained / name / "weights.safetensors")
    base = load_file(tiny_model / "model.safetensors")
    assert set(weights) == set(expected)
    moved = max(float((base[key].double() - expected[key]).abs().max()) for key in expected)
    assert moved > 5e-3
    if "bfloat16" in name:
        # Weights of up to about 0.5 have steps of 2^-9 there; losses follow the rounded weights.
        assert [result["loss"] for result in results] == pytest.approx(losses, abs=5e-3)
        assert [result["grad_norm"] for result in results] == pytest.approx(norms, rel=0.02, abs=1e-6)
        tolerance = 6e-3
    else:
        assert [result["loss"] for result in results] == pytest.approx(losses, rel=2e-6, abs=1e-6)
        assert [result["grad_norm"] for result in results] == pytest.approx(norms, rel=1e-5, abs=1e-6)
        tolerance = 1e-6
    for key in expected:
        assert (weights[key].double() - expected[key]).abs().max() < tolerance, key


def test_micro_batches_are_several_unless_one_holds_all(trained):
    def count(name):
        return [result["micro_batches"] for result in json.loads((trained / name / "results.json").read_text())]

    assert max(count("zero 2")) > 1 and max(count("one micro-batch")) == 1


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]), ("linear", [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25])],
)
def test_learning_rate_warms_up_and_follows_the_schedule(tiny_model, tmp_path, schedule, expected):
    tree = make_recipe(tiny_model, tmp_path, steps=6, warmup=2, schedule=schedule, learning_rate=0.5)
    settings = recipe.parse(tree).trainer
    assert [learning_rate(step, settings) / 0.5 for step in range(6)] == pytest.approx(expected)


def test_cosine_falls_from_the_full_rate_towards_zero(tiny_model, tmp_path):
    settings = recipe.parse(make_recipe(tiny_model, tmp_path, steps=10, warmup=0.1, learning_rate=1.0 / 2)).trainer
    rates = [learning_rate(step, settings) for step in range(10)]
    assert rates[0] == 0.25 and rates[1] == 0.5
    assert rates[4] == pytest.approx(0.25 * (1 + math.cos(math.pi / 3)))
    assert rates[1:] == sorted(rates[1:], reverse=True) and 0 < rates[-1] < 0.05


# ---- records ---------------------------------------------------------------------------------------------------


def test_numbers_of_groups_leave_missing_scores_out():
    (group,) = make_groups(1)

    def completion(tokens, reason, version):
        return Completion(
            text="", token_ids=[1] * tokens, logprobs=[-1.0] * tokens, finish_reason=reason, weight_version=version
        )

    failed = {"certainty": Score.failed("timeout", "slow"), "format": Score.of(0.5), "right": Score.of(0.0, "wrong")}
    certain = {"certainty": Score.of(2.0), "right": Score.of(1.0, "correct")}
    group = group.model_copy(
        update={
            "completions": [completion(4, "stop", Version(version=3)), completion(2, "length", Version(version=5))],
            "scores": [
                CompletionScore(components=certain, reward=2.0, advantage=-1.0, valid=True),
                CompletionScore(components=failed, reward=None, advantage=0.0, valid=False),
            ],
        }
    )
    assert of_groups([group], step=7) == {
        "reward_mean": 2.0,
        "advantage_abs_mean": 1.0,
        "valid_fraction": 0.5,
        "stop_share": 0.5,
        "completion_length": 3.0,
        "staleness_mean": 2.0,
        "staleness_max": 3,
        "components.certainty": 2.0,
        "components.format": 0.5,
        "components.right": 0.5,
        "accuracy.right": 0.5,
        "distinct_2": 0.25,
        "answer_diversity": 0.5,
    }


def test_a_torn_line_goes_and_the_next_stands_alone(tiny_model, tmp_path):
    line = {"lineage": 1, "step": 2, "group_ids": ["a"], "tokens": 5, "completions": 2, "seconds": {}, "loss": 0.5}
    (tmp_path / "steps.jsonl").write_text('{"lineage": 0, "step": 1}\n{"lineage": 0, "st')
    records = StepLog(recipe.parse(make_recipe(tiny_model, tmp_path)), start=1)
    records.write(line)
    with pytest.raises(ValueError):
        records.write({**line, "loss": math.nan})
    records.close()
    assert read_steps(tmp_path) == [{"lineage": 0, "step": 1}, line]


def sample(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(name, labels)


def test_numbers_go_to_tensorboard_and_prometheus(tiny_model, tmp_path):
    chosen = recipe.parse(make_recipe(tiny_model, tmp_path), ["trainer.steps=9", "tracking.tensorboard=true"])
    records = StepLog(chosen, start=1)
    assert sample("rlif_trainer_planned_steps") == 9 and sample("rlif_trainer_step") == 1
    seconds = {"wait": 0.25, "total": 0.25}
    line = {"lineage": 3, "step": 2, "group_ids": ["a"], "tokens": 5, "completions": 2, "seconds": seconds, "loss": 0.5}
    before = sample("rlif_trainer_tokens_total"), sample("rlif_trainer_phase_seconds_count", phase="wait") or 0
    records.write({**line, "components.x": 2.0, "accuracy.x": 0.25, "components.y": 1.0})
    assert sample("rlif_trainer_component", component="x") == 2 and sample("rlif_trainer_loss") == 0.5
    assert sample("rlif_trainer_accuracy_ratio", component="x") == 0.25
    assert math.isnan(sample("rlif_trainer_reward"))  # not in the line: no number, rather than the last one
    records.write({**line, "step": 3, "components.y": 3.0})
    assert sample("rlif_trainer_component", component="x") is None  # gone from the spec
    assert sample("rlif_trainer_component", component="y") == 3
    records.close()
    assert sample("rlif_trainer_step") == 3 and sample("rlif_trainer_lineage") == 3
    assert sample("rlif_trainer_phase_seconds_count", phase="total") is None
    after = sample("rlif_trainer_tokens_total"), sample("rlif_trainer_phase_seconds_count", phase="wait")
    assert after == (before[0] + 10, before[1] + 2)
    assert time.time() - sample("rlif_trainer_last_step_timestamp_seconds") < 60
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(2, 0.5), (3, 0.5)]


# ---- refusals --------------------------------------------------------------------------------------------------


def refused(tree: dict, redis_url: str = "unix:///nowhere", resume: bool = False) -> str:
    with pytest.raises(RecipeError) as caught:
        main(recipe.parse(tree), redis_url, resume)
    return str(caught.value)


def test_what_cannot_run_is_refused_by_key(tiny_model, tmp_path):
    assert "trainer.zero_stage" in refused(make_recipe(tiny_model, tmp_path, dtype="bfloat16", zero_stage=0))
    assert "trainer.ranks: 2" in refused(make_recipe(tiny_model, tmp_path, ranks=2))
    if not torch.cuda.is_available():
        assert "trainer.device" in refused(make_recipe(tiny_model, tmp_path, device="cuda"))
    (tmp_path / "steps.jsonl").write_text("{}\n")
    assert "run.dir" in refused(make_recipe(tiny_model, tmp_path))


# ---- whole runs ------------------------------------------------------------------------------------------------

STEPS, GROUPS_PER_STEP = 6, 2
# What a checkpoint must bring back beside DeepSpeed's state, and what is drawn.
MOVING = {"reference": {"kind": "ema", "decay": 0.5}, "minibatches": 2, "epochs_per_batch": 2}


class Run:
    """A trainer process on the groups that the test pushes."""

    def __init__(self, folder: Path, model: Path, redis_url: str, name: str, ranks: int = 1, **trainer):
        self.dir, self.name, self.redis_url, self.ranks = folder / name, name, redis_url, ranks
        options = {
            "steps": STEPS,
            "groups_per_step": GROUPS_PER_STEP,
            "checkpoints": {"every": 2, "keep": 2},
            "ranks": ranks,
            **trainer,
        }
        tree = make_recipe(model, self.dir, name, **options)
        self.recipe_path = folder / f"{name}.yaml"
        self.recipe_path.write_text(yaml.safe_dump({**tree, "queue": {"url": redis_url}}))
        self.recipe = recipe.load(self.recipe_path)
        self.groups = make_groups(STEPS * GROUPS_PER_STEP, seed=4, run=name)
        self.log = folder / f"{name}.log"
        self.process: subprocess.Popen | None = None

    def push(self, start: int, end: int) -> None:
        async def push() -> None:
            async with connect(self.redis_url) as client:
                queue = GroupQueue(client, self.name)
                for group in self.groups[start:end]:
                    assert await queue.push(group)

        asyncio.run(push())

    def depth(self):
        async def depth():
            async with connect(self.redis_url) as client:
                return await GroupQueue(client, self.name).depth()

        return asyncio.run(depth())

    def status(self) -> dict:
        with connect_sync(self.redis_url) as client:
            return json.loads(client.hget(Keys(self.name).status, "trainer"))

    def start(self, *options: str) -> "Run":
        argv = [sys.executable, "-m", "services.cli.main", "train", str(self.recipe_path), *options]
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(argv, env=ENVIRONMENT, stdout=out, stderr=subprocess.STDOUT)
        return self

    def wait_for(self, step: int, lineage: int, seconds: float = 120) -> None:
        """Until the trainer has trained that step and waits for more groups."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            assert self.process and self.process.poll() is None, self.log.read_text()[-4000:]
            with connect_sync(self.redis_url) as client:
                status = json.loads(client.hget(Keys(self.name).status, "trainer") or "{}")
            if (status.get("state"), status.get("step"), status.get("lineage")) == ("waiting", step, lineage):
                return
            time.sleep(0.05)
        raise AssertionError(f"never waited at step {step}:\n{self.log.read_text()[-4000:]}")

    def end(self, seconds: float = 120) -> int:
        assert self.process
        return self.process.wait(seconds)

    def weights(self) -> dict[str, torch.Tensor]:
        folders = [path for path in self.recipe.weights_dir.iterdir() if path.name.endswith(f"-{STEPS}")]
        return load_file(max(folders) / "model.safetensors")

    def close(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def runs(tiny_model, redis_url, tmp_path_factory):
    """An unbroken run, and one that is killed, stopped and twice resumed; both over."""
    folder = tmp_path_factory.mktemp("runs")
    unbroken = Run(folder, tiny_model, redis_url, "unbroken", **MOVING)
    broken = Run(folder, tiny_model, redis_url, "broken", **MOVING)
    try:
        unbroken.push(0, STEPS * GROUPS_PER_STEP)
        unbroken.start("--resume")  # nothing to resume yet: a container's command line is the same at every start
        broken.push(0, 3 * GROUPS_PER_STEP)
        broken.start().wait_for(step=3, lineage=0)
        assert broken.process
        broken.process.kill()
        broken.end()
        # The checkpoint was of step 2: step 3 is lost, and its groups come again.
        broken.start("--resume").wait_for(step=3, lineage=1)
        for _ in range(3):  # who is impatient spoils nothing
            broken.process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
        # The third may come when nothing is left to be done, and nobody to hear it.
        assert broken.end() in (143, -signal.SIGTERM), broken.log.read_text()[-4000:]
        assert broken.depth().pending == 0 and broken.status()["state"] == "stopped"
        broken.push(3 * GROUPS_PER_STEP, STEPS * GROUPS_PER_STEP)
        assert broken.start("--resume").end() == 0, broken.log.read_text()[-4000:]
        assert unbroken.end() == 0, unbroken.log.read_text()[-4000:]
        yield unbroken, broken
    finally:
        unbroken.close()
        broken.close()


def test_a_broken_run_ends_with_the_same_bits(runs):
    unbroken, broken = (run.weights() for run in runs)
    assert set(unbroken) == set(broken)
    for name in unbroken:
        assert torch.equal(unbroken[name], broken[name]), name


def test_a_run_ends_with_plain_torchs_weights(runs, tiny_model):
    run = runs[0]
    steps = [run.groups[at : at + GROUPS_PER_STEP] for at in range(0, len(run.groups), GROUPS_PER_STEP)]
    losses, _, expected = plain_training(tiny_model, steps, run.recipe.trainer, learning_rate)
    assert [line["loss"] for line in read_steps(run.dir)] == pytest.approx(losses, rel=2e-6, abs=1e-6)
    weights = run.weights()
    for name in expected:
        assert (weights[name].double() - expected[name]).abs().max() < 2e-6, name


def test_every_group_is_trained_once_in_the_surviving_lineage(runs):
    for run in runs:
        lines = read_steps(run.dir)
        kept = surviving(lines)
        assert sorted(kept) == list(range(1, STEPS + 1))
        assert [group for step in sorted(kept) for group in kept[step]] == [group.group_id for group in run.groups]
    assert [(line["lineage"], line["step"], line["start"]) for line in lines] == [
        (0, 1, 0), (0, 2, 0), (0, 3, 0), (1, 3, 2), (2, 4, 3), (2, 5, 3), (2, 6, 3),
    ]  # fmt: skip


def test_the_queue_is_empty_and_the_status_done(runs):
    for run in runs:
        depth = run.depth()
        assert (depth.queued, depth.pending, depth.dead) == (0, 0, 0)
        status = run.status()
        assert (status["state"], status["step"], status["steps"]) == ("done", STEPS, STEPS)


def test_lines_hold_what_console_and_report_read(runs):
    line = read_steps(runs[0].dir)[-1]
    numbers = {"loss", "kl", "entropy", "clip_fraction", "ratio_mean", "importance_mean", "importance_truncated"}
    numbers |= {
        "rollout_kl",
        "clip_cov_fraction",
        "updates",
        "logprob_gap_mean",
        "logprob_gap_max",
        "grad_norm",
        "lr",
        "tokens",
        "tokens_per_second",
    }
    numbers |= {"staleness_mean", "staleness_max", "completion_length", "valid_fraction", "stop_share"}
    numbers |= {"reward_mean", "components.certainty"}
    for name in numbers:
        assert isinstance(line[name], int | float), name
    assert {"wait", "pack", "compute", "optimizer", "publish", "total"} <= set(line["seconds"])


def test_checkpoints_and_versions_are_pruned(runs):
    unbroken, broken = runs
    assert sorted(path.name for path in (unbroken.dir / "checkpoints").iterdir()) == ["0-4", "0-6", "latest"]
    assert sorted(path.name for path in (broken.dir / "checkpoints").iterdir()) == ["2-4", "2-6", "latest"]
    assert (broken.dir / "checkpoints" / "latest").read_text() == "2-6"
    assert len(list(broken.recipe.weights_dir.iterdir())) == broken.recipe.weights.keep
    # What a crash between the checkpoint and the acknowledgement would leave to be acknowledged: two steps' entries.
    assert len(checkpoint.state(unbroken.dir / "checkpoints" / "0-6")["unacknowledged"]) == 2 * GROUPS_PER_STEP


def test_a_moving_reference_needs_a_checkpoint_that_has_one(runs, tmp_path):
    moving = Reference(torch.nn.Linear(2, 2), decay=0.5)
    with pytest.raises(RecipeError, match="trainer.reference.kind: ema"):
        moving.load(tmp_path)
    assert (runs[0].dir / "checkpoints" / "0-6" / "reference.safetensors").exists()


@pytest.mark.parametrize("fault", ["truncated", "flipped", "missing", "unfinished"])
def test_a_damaged_checkpoint_is_passed_over(runs, tmp_path, caplog, fault):
    run = runs[1]
    folder = tmp_path / "checkpoints"
    shutil.copytree(run.dir / "checkpoints", folder)
    victim = folder / "2-6" / "rank-0" / "model.safetensors"
    if fault == "truncated":
        os.truncate(victim, victim.stat().st_size // 2)
    elif fault == "flipped":
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    elif fault == "missing":
        (folder / "2-6" / "state.json").unlink()
    else:
        (folder / "2-6").rename(folder / ".2-6.tmp")
    found = checkpoint.newest(folder, run.recipe)
    assert found is not None and found[0].name == "2-4" and found[1].step == 4
    assert fault == "unfinished" or "2-6 is damaged" in caplog.text


def test_the_best_checkpoint_is_named_verified_and_replaced(runs, tmp_path, caplog):
    run, folder = runs[1], tmp_path / "checkpoints"
    shutil.copytree(run.dir / "checkpoints", folder)
    assert checkpoint.best(folder, run.recipe) is None
    for name in ("2-6", "2-4"):
        checkpoint.mark_best(folder, name)
        found = checkpoint.best(folder, run.recipe)
        assert found is not None and found[0] == folder / name and found[1].step == int(name[2:])
    for absent in ("2-5", ".", "latest"):
        with pytest.raises(ValueError, match="no checkpoint"):
            checkpoint.mark_best(folder, absent)
    victim = folder / "2-4" / "rank-0" / "model.safetensors"
    os.truncate(victim, victim.stat().st_size // 2)
    assert checkpoint.best(folder, run.recipe) is None and "2-4 is damaged" in caplog.text


def test_a_checkpoint_of_another_run_is_refused(runs):
    unbroken, broken = runs
    with pytest.raises(RecipeError, match="run.name: 'unbroken'"):
        checkpoint.newest(broken.dir / "checkpoints", unbroken.recipe)


def test_a_used_folder_needs_resume(runs):
    assert runs[0].start().end() == 2
    assert "--resume" in runs[0].log.read_text()[-500:]


def test_an_export_loads_and_is_the_newest_version(runs, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = runs[1]
    assert export(run.dir, tmp_path / "model") == Version(lineage=2, version=STEPS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    weights = run.weights()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name]), name
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template
    with pytest.raises(RecipeError, match="not empty"):
        export(run.dir, tmp_path / "model")
    with pytest.raises(RecipeError, match="neither"):
        export(tmp_path, tmp_path / "other")


@pytest.mark.slow
def test_two_ranks_with_partitioned_weights(tiny_model, redis_url, tmp_path):
    run = Run(tmp_path, tiny_model, redis_url, "ranks", ranks=2, zero_stage=3)
    run.push(0, STEPS * GROUPS_PER_STEP)
    try:
        assert run.start().end() == 0, run.log.read_text()[-4000:]
    finally:
        run.close()
    steps = [run.groups[at : at + GROUPS_PER_STEP] for at in range(0, len(run.groups), GROUPS_PER_STEP)]
    _, _, expected = plain_training(tiny_model, steps, run.recipe.trainer, learning_rate)
    weights = run.weights()
    assert set(weights) == set(expected)
    for name in expected:
        assert (weights[name].double() - expected[name]).abs().max() < 2e-6, name
    # Without published weights, the ranks' checkpoint gives the same.
    shutil.rmtree(run.recipe.weights_dir)
    assert export(run.dir, tmp_path / "model") == Version(lineage=0, version=STEPS)
    exported = load_file(tmp_path / "model" / "model.safetensors")
    for name in weights:
        assert torch.equal(exported[name], weights[name]), name


def test_a_run_goes_on_from_an_exported_folder(runs, tiny_model, redis_url, tmp_path):
    """Only the export of step 4 survived: the run's folder and its redis are new."""
    first = runs[0]
    past = tmp_path / "past"
    (past / "checkpoints").mkdir(parents=True)
    shutil.copytree(first.dir / "checkpoints" / "0-4", past / "checkpoints" / "0-4")
    shutil.copytree(first.dir / "model", past / "model")
    shutil.copy(first.dir / "steps.jsonl", past)
    (past / "recipe.yaml").write_text(first.recipe_path.read_text())
    assert export(past, tmp_path / "exported") == Version(version=4)

    run = Run(tmp_path, tiny_model, f"{redis_url}?db=1", "unbroken", **MOVING)
    run.push(0, STEPS * GROUPS_PER_STEP)
    try:
        assert run.start("--resume-from", str(tmp_path / "exported")).end() == 0, run.log.read_text()[-4000:]
    finally:
        run.close()
    lines, before = read_steps(run.dir), read_steps(first.dir)
    assert [(line["lineage"], line["step"], line["start"]) for line in lines] == [(1, 5, 4), (1, 6, 4)]
    assert [line["group_ids"] for line in lines] == [line["group_ids"] for line in before[4:]]
    # The same weights; what differs is the optimizer, and what the reference had moved to.
    assert lines[0]["logprob_gap_mean"] == before[4]["logprob_gap_mean"]
    # The same command goes on from its checkpoint when there is one.
    assert run.start("--resume-from", str(tmp_path / "exported")).end() == 0
    assert read_steps(run.dir) == lines


def test_where_a_folder_lets_a_run_begin(tiny_model, tmp_path):
    def begin(folder: Path, name: str = "test") -> tuple[int, int]:
        progress = begin_from(folder, recipe.parse(make_recipe(tiny_model, tmp_path, name)))
        return progress.step, progress.lineage

    folder = tmp_path / "exported"
    shutil.copytree(tiny_model, folder)
    assert begin(folder) == (0, -1)  # a plain folder: only weights
    (folder / "rlif.json").write_text('{"run": "test", "step": 7, "lineage": 2, "trained": ["a"]}')
    assert begin(folder) == (7, 2)
    assert begin(folder, "other") == (0, -1)
    (folder / "rlif.json").write_text("{")
    with pytest.raises(RecipeError, match="--resume-from: .*rlif.json cannot be read"):
        begin(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "num_hidden_layers": 5, "layer_types": ["full_attention"] * 5})
    )
    with pytest.raises(RecipeError, match="--resume-from: .* has num_hidden_layers 5, .* has 2"):
        begin(folder)
    with pytest.raises(RecipeError, match="--resume-from: .* is not a model folder"):
        begin(tmp_path / "nowhere")
