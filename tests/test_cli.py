"""The `rlif` command as a user meets it: output, exit codes, and one clear line for what cannot work."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from served import served

from services.address import listen

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
        (["report", "absent-run", "out.html"], "absent-run holds no run"),
        (["console", "--run", "math"], "--redis (or RLIF_REDIS_URL)"),
        (["console", "--run", "math", "--redis", "http://127.0.0.1:1"], "--redis: not a URL that starts with redis://"),
        (["console", "--run", "math", "--redis", "redis://127.0.0.1:1", "--host", "0.0.0.0"], "RLIF_API_TOKEN"),
        (["console", "--run", "math", "--redis", "redis://127.0.0.1:1", "--reward", "x"], "'x' is not a server's URL"),
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


def test_damaged_model_files_are_one_line(tiny_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "model.safetensors").write_bytes(b"\xff" * 5000)
    line = refused("serve", "rollout", "--model", folder, "--port", 0)
    assert f"--model {folder}" in line and "Error while deserializing header" in line
    shutil.copytree(tiny_model, tmp_path / "mute", ignore=lambda *_: ["tokenizer.json", "tokenizer_config.json"])
    assert "no tokenizer" in refused("serve", "reward", "--model", tmp_path / "mute", "--port", 0)


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
