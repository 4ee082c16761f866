"""The `rlif` command as a user meets it: output, exit codes, and one clear line for what cannot work."""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml
from served import served

from services import recipe
from services.cli.launch import only_one, plan
from services.http import listen

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "recipes" / "demo.yaml"


def rlif(*arguments: object, seconds: float = 120, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "services.cli.main", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **env}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, env=environment)


def refused(*arguments: object, **env: str) -> str:
    """The last line on stderr of a command that must refuse with exit code 2 and no traceback."""
    done = rlif(*arguments, **env)
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def reward_url(tiny_model):
    from reward_server.app import Settings, create

    with served(create(Settings(model=str(tiny_model), threads=1, verifier_workers=1))) as url:
        yield url


def test_help_and_version():
    assert "recipe" in rlif("--help").stdout
    assert rlif("--version").stdout.startswith("rlif 0.")


def test_recipe_show_is_a_recipe_and_json_is_the_same():
    shown = rlif("recipe", "show", DEMO, "trainer.steps=7")
    assert yaml.safe_load(shown.stdout)["trainer"]["steps"] == 7
    assert json.loads(rlif("recipe", "show", DEMO, "trainer.steps=7", "--json").stdout) == yaml.safe_load(shown.stdout)


def test_recipe_check(tmp_path):
    data = tmp_path / "tasks.jsonl"
    data.write_text('{"id": "1", "prompt": "1+1", "answer": "2"}\n')
    done = rlif("recipe", "check", DEMO, f"data.path={data}", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["completions_per_step"] == 256


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["recipe", "check", "absent.yaml"], "absent.yaml"),
        (["recipe", "check", DEMO, "trainer.lr=1"], "trainer.lr: unknown key"),
        (["recipe", "check", DEMO, "rewards=[{name: nonsense}]"], "nonsense"),
        (["recipe", "check", DEMO, "rewards=[{name: exact_match, params: {wrong: 1}}]"], "wrong"),
        (["recipe", "check", DEMO, "rewards=[{name: code_tests}]"], "scorer.sandbox"),
        (["recipe", "check", DEMO, "rewards=[{name: kl_to_reference}]"], "scorer.reference_model"),
        (["recipe", "check", DEMO, "data.path=absent.jsonl"], "data.path"),
        (["recipe", "check", DEMO, "rewards=nonsense", "combine=null"], "rewards: there is no spec 'nonsense'"),
        (["up", DEMO, "run.dir=never-made", "rewards=[{name: nonsense}]"], "rewards[0].name"),
        (["demo", "--reward", "fame"], "--reward fame: choose self_certainty"),
        (["score", "--prompt", "a", "--completion", "b"], "--model and --url"),
        (["score", "--url", "http://127.0.0.1:9", "--prompt", "a"], "--completion"),
        (["score", "--url", "http://127.0.0.1:9", "--file", "absent.jsonl", "--out", "o"], "absent.jsonl"),
        (["score", "--url", "127.0.0.1:9", "--prompt", "a", "--completion", "b"], "--url '127.0.0.1:9' is not"),
        (["score", "--url", "http://127.0.0.1:9", "--file", DEMO, "--out", "o"], "--file"),
        (["serve", "reward", "--device", "tpu"], "--device tpu: choose auto, cpu or cuda"),
        (["serve", "rollout", "--model", "m", "--dtype", "float16"], "--dtype float16: choose float32 or bfloat16"),
        (["serve", "rollout"], "--model"),
        (["serve", "rollout", "--model", "m", "--engine", "magic"], "--engine magic"),
        (["serve", "reward", "--follow", "redis://127.0.0.1:1"], "--run"),
        (["serve", "reward", "--match"], "--match: there are no weights to wait for without --follow"),
        (["serve", "reward", "--engine", "vllm"], "--engine vllm: give the model"),
        (["serve", "reward", "--host", "0.0.0.0"], "RLIF_API_TOKEN"),
        (["serve", "rollout", "--model", "m", "rollout.threads=1"], "'rollout.threads=1': overrides are of a recipe"),
        (["serve", "reward", "--recipe", DEMO, "scorer.thread=1"], "scorer.thread: unknown key"),
        (["train", DEMO], "queue.url (or RLIF_REDIS_URL)"),
        (["export", "absent-run", "out"], "absent-run"),
        (["serve", "reward", "--spec", "/proc/self/exe"], "--spec /proc/self/exe is not YAML"),
    ],
)
def test_refusals_are_one_line(arguments, words, monkeypatch, capsys):
    from services.cli.main import main

    monkeypatch.setattr(sys, "argv", ["rlif", *map(str, arguments)])
    monkeypatch.delenv("RLIF_API_TOKEN", raising=False)
    monkeypatch.delenv("RLIF_REDIS_URL", raising=False)
    monkeypatch.setattr("services.logs.configure", lambda *_, **__: None)  # it would take over this process's logging
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert words in lines[0] and lines[0].startswith("rlif: ")


def test_a_wrong_model_path_names_it(tmp_path):
    for kind in ("reward", "rollout"):
        line = refused("serve", kind, "--model", tmp_path / "nothing-here", "--port", 0)
        assert "nothing-here" in line


def test_a_busy_port_is_named():
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port}" in refused("serve", "reward", "--port", port)


def test_a_bad_spec_file_names_the_field(tmp_path):
    spec = tmp_path / "spec.yaml"
    spec.write_text("rewards: [{name: exact_match, weight: heavy}]")
    line = refused("serve", "reward", "--spec", spec)
    assert "rewards.0.weight" in line and str(spec) in line


def test_cuda_without_a_gpu_is_one_line(tiny_model):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "no GPU here" in refused("serve", "reward", "--model", tiny_model, "--device", "cuda", "--port", 0)


def test_score_one(reward_url):
    done = rlif("score", "--url", reward_url, "--prompt", "ab", "--completion", "cd", "--completion", "", "--json")
    assert done.returncode == 0, done.stderr
    first, empty = json.loads(done.stdout)["results"]
    assert first["n_tokens"] == 2 and first["scores"]["self_certainty"] > 0
    assert empty["n_tokens"] == 0 and empty["scores"] == {}
    table = rlif("score", "--url", reward_url, "--prompt", "ab", "--completion", "cd", "--metric", "token_entropy")
    assert "token_entropy" in table.stdout


def test_score_a_file(reward_url, tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [{"id": n, "prompt": "ab", "completion": "c" * (n % 5 + 1)} for n in range(70)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = rlif("score", "--url", reward_url, "--file", source, "--out", out)
    assert done.returncode == 0, done.stderr
    scored = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["id"] for row in scored] == list(range(70))
    assert all(row["n_tokens"] == row["id"] % 5 + 1 and row["scores"]["self_certainty"] > 0 for row in scored)
    long = {"prompt": "ab", "completion": "c" * 5000}
    source.write_text("".join(json.dumps(row) + "\n" for row in [rows[0], long, rows[1]]))
    done = rlif("score", "--url", reward_url, "--file", source, "--out", out)
    assert done.returncode == 1 and "1 rows could not be scored" in done.stdout + done.stderr
    first, middle, last = (json.loads(line) for line in out.read_text().splitlines())
    assert first["scores"] and last["scores"] and "tokens" in middle["error"] and "scores" not in middle
    source.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    assert "line 2" in refused("score", "--url", reward_url, "--file", source, "--out", out)
    source.write_text('{"prompt": "a", "completion": "b"}\n')
    assert "--out" in refused(
        "score", "--url", reward_url, "--file", source, "--out", tmp_path / "absent" / "out.jsonl"
    )
    wrong = rlif("score", "--url", reward_url, "--file", source, "--out", tmp_path / "new.jsonl", "--metric", "fame")
    assert wrong.returncode == 2 and not list(tmp_path.glob("new.jsonl*"))


def test_score_without_a_server_fails_with_its_address():
    done = rlif("score", "--url", "http://127.0.0.1:9", "--prompt", "a", "--completion", "b")
    assert done.returncode == 1 and "127.0.0.1:9" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", ["reward", "rollout"])
def test_damaged_model_files_are_one_line(tiny_model, tmp_path, kind):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "model.safetensors").write_bytes(b"\xff" * 5000)
    line = refused("serve", kind, "--model", folder, "--port", 0)
    assert f"--model {folder}" in line and "Error while deserializing header" in line
    shutil.copytree(tiny_model, tmp_path / "mute", ignore=lambda *_: ["tokenizer.json", "tokenizer_config.json"])
    assert "no tokenizer" in refused("serve", kind, "--model", tmp_path / "mute", "--port", 0)


def test_giving_up_on_redis_is_one_line(monkeypatch, capsys):
    from services.cli import main as command
    from services.redis import DeadlineExceeded

    def gives_up():
        raise DeadlineExceeded("redis did not answer within 300 s")

    monkeypatch.setattr(command, "app", gives_up)
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == "rlif: redis did not answer within 300 s\n"


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
def test_a_rank_dies_with_its_torchrun(tmp_path):
    recipe_pipe = tmp_path / "recipe.yaml"
    os.mkfifo(recipe_pipe)  # the rank reads its recipe for as long as somebody has this open for writing
    writers = []

    def is_read() -> bool:
        with suppress(OSError):
            writers.append(os.open(recipe_pipe, os.O_WRONLY | os.O_NONBLOCK))
        return bool(writers)

    command = [sys.executable, "-m", "services.cli.main", "train", str(recipe_pipe)]
    code = f"import subprocess, time; print(subprocess.Popen({command!r}).pid, flush=True); time.sleep(60)"
    env = {**os.environ, "TORCHELASTIC_RUN_ID": "1"}
    torchrun = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=env)
    rank = psutil.Process(int(torchrun.stdout.readline()))
    try:
        wait_for(is_read, 60)
        assert rank.is_running()
        torchrun.kill()
        torchrun.wait(10)
        wait_for(lambda: not rank.is_running() or rank.status() == psutil.STATUS_ZOMBIE, 10)
    finally:
        torchrun.kill()
        with suppress(psutil.NoSuchProcess):
            rank.kill()
        for writer in writers:
            os.close(writer)


def wait_for(condition, seconds: float) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "waited too long"
        time.sleep(0.05)


def test_a_log_level_that_is_none_is_one_line():
    assert "RLIF_LOG_LEVEL LOUD: choose one of CRITICAL" in refused("serve", "reward", RLIF_LOG_LEVEL="loud")


def test_a_run_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    assert "file/run cannot be made: Not a directory" in refused("up", DEMO, f"run.dir={tmp_path}/file/run")


def test_one_run_is_run_once_at_a_time(tmp_path):
    (tmp_path / "recipe.yaml").write_text("")
    with only_one(tmp_path):
        assert "another `rlif up` is running" in refused("up", DEMO, "--resume", f"run.dir={tmp_path}")
    with only_one(tmp_path):
        pass


def test_the_resolved_recipe_is_for_its_owner_alone(tmp_path):
    _, filled = plan(recipe.load(DEMO, [f"run.dir={tmp_path}", "queue.url=redis://:secret@127.0.0.1:1/0"]), False)
    assert (filled.run.dir / "recipe.yaml").stat().st_mode & 0o777 == 0o600
    assert "secret" in (filled.run.dir / "recipe.yaml").read_text()


def test_a_redis_password_may_stay_in_the_environment(monkeypatch):
    monkeypatch.setenv("RLIF_REDIS_URL", "rediss://:hunter2@redis.example:6380/0")
    without = recipe.load(DEMO)
    assert recipe.redis_url(without) == "rediss://:hunter2@redis.example:6380/0"
    assert "hunter2" not in recipe.dump(without)
    assert recipe.redis_url(recipe.load(DEMO, ["queue.url=redis://127.0.0.1:1"])) == "redis://127.0.0.1:1"
    monkeypatch.setenv("RLIF_REDIS_URL", "http://:hunter2@redis.example")
    with pytest.raises(recipe.RecipeError, match="RLIF_REDIS_URL: not a URL that starts with redis://") as refusal:
        recipe.redis_url(without)
    assert "hunter2" not in str(refusal.value)
    monkeypatch.delenv("RLIF_REDIS_URL")
    assert recipe.redis_url(without) is None


def test_a_start_that_came_to_nothing_may_be_tried_again(tiny_model, tmp_path):
    run_dir = tmp_path / "run"
    data = tmp_path / "tasks.jsonl"
    data.write_text('{"id": "1", "question": "1+1", "answer": "2"}\n')
    wrong = [f"run.dir={run_dir}", f"data.path={data}", f"model.path={tiny_model}"]
    for _ in range(2):
        done = rlif("up", DEMO, *wrong)
        assert done.returncode == 2, (done.stdout, done.stderr)
        assert "no field 'prompt'" in done.stdout + done.stderr
    (run_dir / "steps.jsonl").write_text("{}\n")
    assert "--resume" in refused("up", DEMO, *wrong)


def test_an_unknown_metric_is_a_refusal(reward_url):
    done = rlif("score", "--url", reward_url, "--prompt", "a", "--completion", "b", "--metric", "fame")
    assert done.returncode == 2 and "fame" in done.stdout + done.stderr


def test_gpus_are_dealt_out(tmp_path, monkeypatch):
    from services import recipe
    from services.cli.launch import plan

    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    overrides = ["rollout.gpus=[0,1,2,3]", "rollout.replicas=2", "rollout.tensor_parallel_size=2"]
    overrides += ["scorer.gpus=[4]", "trainer.gpus=[5,6]", "trainer.ranks=2", "pacing.max_staleness=1"]
    services, _ = plan(recipe.load(DEMO, [f"run.dir={tmp_path}", *overrides]), False)
    shown = {service.name: service.env.get("CUDA_VISIBLE_DEVICES") for service in services}
    wanted = {"rollout-0": "0,1", "rollout-1": "2,3", "reward-0": "4", "trainer": "5,6"}
    assert shown == {**wanted, "redis": None, "orchestrator": None}
    assert all("OMP_WAIT_POLICY" not in service.env for service in services)
