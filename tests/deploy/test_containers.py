"""The images, built, and compose.yaml, run until it has trained: with podman, when asked for (make test-containers).

Grafana is left out (Debian has none to stand in for its image), and whatever needs a GPU.
"""

import json
import os
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from composition import PARTS, ROOT, composed
from engine import STARTED, Stack, build_all, eventually, need_podman, podman, said, started

from services import recipe

pytestmark = [pytest.mark.containers, pytest.mark.timeout(7200)]

STEPS = 40
EVALUATION = {
    "data": {
        "path": "cache/demo/train.jsonl",
        "fields": {"id": "id", "prompt": "prompt", "answer": "answer"},
        "limit": 8,
    },
    "every": 20,
    "rewards": [{"name": "exact_match", "params": {"regex": "(?:answer|maybe) (\\d+)$"}}],
}
SERVERS = ("rollout", "reward")
RUNNING = [service for service in STARTED if service != "prepare"]


@pytest.fixture(scope="module", autouse=True)
def images() -> None:
    need_podman()
    build_all()


@pytest.fixture(scope="module")
def stack(tmp_path_factory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("stack")
    # Any user of the containers must be able to read it.
    folder.chmod(0o755)
    made = ["model.path=cache/demo/model", "data.path=cache/demo/train.jsonl"]
    short = [f"trainer.steps={STEPS}", "trainer.checkpoints.every=5", "rollout.group_size=4"]
    watched = [f"evaluation={json.dumps(EVALUATION)}", "tracking.wandb={project: demo, mode: offline}"]
    newer = ["weights.transport=delta", *watched]
    (folder / "short.yaml").write_text(recipe.dump(recipe.load(ROOT / "recipes/demo.yaml", made + short + newer)))
    with started(folder, RECIPES=str(folder), RECIPE="recipes/short.yaml") as running:
        yield running


# ---- images ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", PARTS)
def test_an_image_runs_with_a_read_only_root_and_without_a_network(part):
    bare = ("run", "--rm", "--read-only", "--tmpfs", "/tmp", "--network", "none", "--cap-drop", "all")
    assert said(*bare, f"rlif-{part}:local", "--version").startswith("rlif ")
    command = " ".join(json.loads(said("image", "inspect", f"rlif-{part}:local"))[0]["Config"]["Cmd"])
    named = command.partition(" --")[0]
    assert f"Usage: rlif {named}" in said(*bare, f"rlif-{part}:local", *named.split(), "--help")
    look = "id -u; id -g; touch /srv/rlif/x 2>&1; echo $HOME"
    shown = said(*bare, "--entrypoint", "sh", f"rlif-{part}:local", "-c", look)
    assert shown.startswith("10001\n10001\n") and "Read-only file system" in shown and shown.endswith("/tmp\n")


@pytest.mark.parametrize("part", PARTS)
def test_an_image_holds_no_more_than_it_needs(part):
    image = json.loads(said("image", "inspect", f"rlif-{part}:local"))[0]
    names = {variable.partition("=")[0] for variable in image["Config"]["Env"]}
    assert names <= {"PATH", "HOME", "PYTHONUNBUFFERED", "HEALTH_URL", "container"}
    assert image["Config"]["Labels"]["org.opencontainers.image.title"] == f"rlif-{part}"
    assert image["Config"]["User"] == "10001:10001" and image["Healthcheck"]["Test"] == ["CMD", "healthcheck"]
    left = r"find / -xdev \( -name .env -o -name .git -o -name pip.conf \) -not -path '*/site-packages/*'"
    run_ = ("run", "--rm", "--user", "0", "--network", "none", "--entrypoint", "")
    assert said(*run_, f"rlif-{part}:local", "sh", "-c", left) == ""
    installed = said(*run_, f"rlif-{part}:local", "pip", "list", "--format=freeze").lower()
    assert ("torch==" in installed) == (part in ("rollout", "reward", "trainer"))
    assert ("deepspeed==" in installed) == (part == "trainer") and ("math-verify==" in installed) == (part == "reward")
    assert ("datasets==" in installed) == (part == "orchestrator") and "vllm" not in installed
    assert said(*run_, f"rlif-{part}:local", "pip", "check") == "No broken requirements found.\n"


def test_layers_are_shared():
    layers = {part: json.loads(said("image", "inspect", f"rlif-{part}:local"))[0]["RootFS"]["Layers"] for part in PARTS}
    model = set(layers["rollout"]) & set(layers["reward"]) & set(layers["trainer"])
    assert len(model) > len(set(layers["rollout"]) & set(layers["sandbox"])) > 4


def test_a_stop_signal_gets_through_at_once():
    """Also in the seconds before the program listens to signals: process 1 alone would not even notice."""
    bare = ("--read-only", "--tmpfs", "/tmp", "--network", "none")
    said("run", "-d", "--name", "rlif-test-stop", *bare, "rlif-reward:local", "serve", "reward")
    try:
        said("stop", "-t", "60", "rlif-test-stop")
        assert json.loads(said("inspect", "rlif-test-stop"))[0]["State"]["ExitCode"] in (0, 143)
    finally:
        podman("rm", "-f", "rlif-test-stop")


def test_a_sandbox_runs_programs_or_says_what_it_needs():
    loose = [f"--security-opt={option}" for option in composed()["sandbox"]["security_opt"]]
    bare = ("--read-only", "--tmpfs", "/tmp", "--network", "none", "--cap-drop", "all")
    said("run", "-d", "--name", "rlif-test-sandbox", *bare, *loose, "rlif-sandbox:local", "serve", "sandbox")
    program = {"program": {"language": "python", "source": "print(2*int(input()))"}, "cases": [{"stdin": "21"}]}
    ask = (
        "import json, sys, urllib.request as r\n"
        "kind = {'Content-Type': 'application/json'}\n"
        "q = r.Request('http://127.0.0.1:8400/v1/execute', sys.argv[1].encode(), kind)\n"
        "print(json.load(r.urlopen(q, timeout=30))['results'][0]['stdout'])"
    )

    def answer() -> str:
        if not json.loads(said("inspect", "rlif-test-sandbox"))[0]["State"]["Running"]:
            reason = podman("logs", "rlif-test-sandbox").stderr[-500:]
            pytest.skip(f"a container of this machine can hold no sandbox: {reason}")
        return podman("exec", "rlif-test-sandbox", "python3", "-c", ask, json.dumps(program)).stdout

    try:
        assert eventually("an answer", answer, 60).strip() == "42"
    finally:
        podman("rm", "-f", "rlif-test-sandbox")


# ---- the run ---------------------------------------------------------------------------------------------------


def test_it_trains_and_every_service_is_healthy(stack):
    eventually("three steps", lambda: len(stack.steps()) >= 3 or _failed(stack), 600)
    assert stack.state("prepare")["ExitCode"] == 0
    for service in RUNNING:
        if service == "prometheus":  # its image has no health check
            continue
        done = podman("healthcheck", "run", stack.name(service))
        assert done.returncode == 0, f"{service}: {done.stdout}{done.stderr}{stack.log(service)[-3000:]}"


def _failed(stack: Stack) -> bool:
    for service in RUNNING:
        state = stack.state(service)
        assert state["Running"] or state["ExitCode"] == 0, f"{service}: {stack.log(service)[-4000:]}"
    return False


@pytest.mark.parametrize("service", ["rollout", "reward", "trainer", "orchestrator", "redis", "prometheus"])
def test_a_service_may_write_to_its_volumes_alone_and_has_no_capability(stack, service):
    status = stack.inside(service, "cat", "/proc/1/status").stdout
    words = {line.split(":")[0]: line.split(":")[1].split() for line in status.splitlines()}
    assert words["CapEff"] == words["CapPrm"] == words["CapBnd"] == ["0000000000000000"]
    assert words["NoNewPrivs"] == ["1"] and words["Uid"][0] != "0"
    assert "Read-only file system" in stack.inside(service, "sh", "-c", "touch /etc/x").stderr
    if service in SERVERS:
        assert "Read-only file system" in stack.inside(service, "sh", "-c", "touch weights/x").stderr


def test_passwords_and_tokens_are_asked_for_and_shown_nowhere(stack):
    refused = stack.inside("redis", "env", "-u", "REDISCLI_AUTH", "redis-cli", "ping")
    assert "NOAUTH" in refused.stdout
    assert stack.get("orchestrator", "http://reward:8100/v1/model")[0] == 401
    assert stack.get("orchestrator", "http://reward:8100/v1/model", stack.settings["RLIF_API_TOKEN"])[0] == 200
    for service in RUNNING:
        seen = stack.log(service) + said("top", stack.name(service), "args")
        assert not any(
            stack.settings[name] in seen for name in ("RLIF_API_TOKEN", "RLIF_ADMIN_TOKEN", "REDIS_PASSWORD")
        )


def test_prometheus_reads_every_service(stack):
    def up() -> dict[str, str] | None:
        status, body = stack.get("rollout", "http://prometheus:9090/api/v1/targets?state=active")
        targets = json.loads(body)["data"]["activeTargets"] if status == 200 else []
        health = {target["labels"]["job"]: target["health"] for target in targets}
        return health if set(health.values()) == {"up"} else None

    assert set(eventually("every target up", up, 90)) == {
        "rlif-rollout",
        "rlif-reward",
        "rlif-trainer",
        "rlif-orchestrator",
    }
    checked = stack.inside("prometheus", "promtool", "check", "config", "/etc/prometheus/prometheus.yml")
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_a_killed_trainer_goes_on_with_the_same_command_line(stack):
    eventually("a checkpoint", lambda: len(stack.steps()) >= 6, 300)
    # Not `podman kill`: what an engine was told to end, it does not start again.
    os.kill(stack.state("trainer")["Pid"], signal.SIGKILL)
    eventually("a restart", lambda: "lineage 1 starts from" in stack.log("trainer") or _restart(stack), 300)
    assert "lineage 1 starts from runs/demo/checkpoints/0-" in stack.log("trainer")
    for service in ("trainer", "orchestrator"):
        eventually(f"{service} done", lambda name=service: not stack.state(name)["Running"], 900)
        assert stack.state(service)["ExitCode"] == 0, stack.log(service)[-4000:]
    steps = stack.steps()
    assert steps[-1]["step"] == STEPS and steps[-1]["lineage"] == 1
    survived = [line for line in steps if line["lineage"] == 1 or line["step"] <= steps[-1]["start"]]
    assert [line["step"] for line in survived] == list(range(1, STEPS + 1))
    groups = [group for line in survived for group in line["group_ids"]]
    assert len(groups) == len(set(groups)), "a group was trained twice"


def _restart(stack: Stack) -> None:
    """For an engine that does not follow the restart policy here: podman needs systemd for some of what it does."""
    if not stack.state("trainer")["Running"]:
        said("start", stack.name("trainer"))


def test_what_looks_on_leaves_its_results_in_the_run_s_volume(stack):
    lines = [json.loads(line) for line in stack.kept("evaluations.jsonl").splitlines()]
    assert {line["version"]["version"] for line in lines} == {0, 20, STEPS} and "accuracy" in lines[0]["metrics"]
    look = ("run", "--rm", "--network", "none", "-v", f"{stack.project}_runs:/runs:ro", "-v")
    look += (f"{stack.project}_weights:/weights:ro", "--entrypoint", "sh", "rlif-trainer:local", "-c")
    found = said(*look, "cat /runs/demo/checkpoints/best; ls -d /runs/demo/wandb/offline-run-*; ls /weights/demo/*")
    assert "offline-run-" in found and "changes.zst" in found
    # The copies of the weights lie in a volume, not in memory.
    mirrors = stack.inside("reward", "sh", "-c", "ls cache/mirror; ls /tmp").stdout
    assert "rlif-demo-reward" in mirrors and mirrors.count("rlif-demo") == 2, mirrors


def test_servers_are_published_on_this_machine_alone(stack):
    bindings = json.loads(said("inspect", stack.name("reward")))[0]["HostConfig"]["PortBindings"]
    assert bindings == {"8100/tcp": [{"HostIp": "127.0.0.1", "HostPort": "8100"}]}
    try:
        with urllib.request.urlopen("http://127.0.0.1:8100/readyz", timeout=10) as answer:
            assert json.load(answer)["status"] == "ready"
    except urllib.error.URLError as error:
        pytest.skip(f"this machine's engine publishes no ports: {error.reason}")


def test_servers_stop_when_told(stack):
    for service in SERVERS:
        said("stop", "-t", "40", stack.name(service))
        assert stack.state(service)["ExitCode"] in (0, 143), stack.log(service)[-2000:]


def test_a_second_start_has_nothing_left_to_do(stack):
    """Volumes outlive containers: the same command again finds the run trained."""
    said("start", stack.name("trainer"))
    eventually("the trainer to end", lambda: not stack.state("trainer")["Running"], 300)
    assert stack.state("trainer")["ExitCode"] == 0 and stack.steps()[-1]["step"] == STEPS


def test_the_weights_come_out_as_a_model_folder(stack):
    bare = ("run", "--rm", "--read-only", "--tmpfs", "/tmp", "--network", "none")
    trainer = (*bare, "-v", f"{stack.project}_runs:/srv/rlif/runs")
    said(*trainer, "rlif-trainer:local", "export", "runs/demo", "runs/demo/exported")
    files = said(*trainer, "--entrypoint", "ls", "rlif-trainer:local", "runs/demo/exported").split()
    assert {"config.json", "tokenizer.json"} <= set(files) and any(name.endswith(".safetensors") for name in files)
