"""One vLLM engine over two nodes: two `rlif serve rollout` processes of this machine, each with one worker."""

import os
import signal
import subprocess
import sys
import time

import httpx
import psutil
import pytest
import torch
from tiny import make_tiny_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from rollout_server.app import Settings, engine_settings
from services.address import free_port
from services.cli.main import app
from services.startup import StartupError

SECONDS = 500.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nodes": 2, "tensor_parallel_size": 2}, "--nodes 2: the transformers engine runs on one node"),
        ({"nodes": 2, "tensor_parallel_size": 3, "engine": "vllm"}, "--nodes 2: does not divide the 3 GPUs"),
        ({"nodes": 2, "tensor_parallel_size": 2, "engine": "vllm", "node_rank": 2}, "--node-rank 2: choose 0 to 1"),
        ({"node_rank": 1}, "--node-rank 1: choose 0 to 0"),
    ],
)
def test_nodes_that_cannot_be_are_refused(settings, message, tmp_path):
    with pytest.raises(StartupError, match=message):
        engine_settings(Settings(str(tmp_path), **settings))


def test_the_command_refuses_them_too(tiny_model):
    done = CliRunner().invoke(app, ["serve", "rollout", "--model", str(tiny_model), "--node-rank", "1"])
    assert isinstance(done.exception, StartupError) and "--node-rank 1" in str(done.exception)


@pytest.mark.nodes
@pytest.mark.timeout(600)
def test_two_nodes_serve_one_model_and_none_outlives_the_other(tmp_path):
    pytest.importorskip("vllm")
    folder = make_tiny_model(tmp_path / "model", hidden=128, tied=False)
    port = free_port()
    options = ["--model", folder, "--engine", "vllm", "--dtype", "float32", "--threads", "1", "--max-model-len", "64"]
    options += ["--port", port, "--tensor-parallel-size", 2, "--nodes", 2, "--leader", "127.0.0.1"]
    argv = [sys.executable, "-m", "services.cli.main", "serve", "rollout", *map(str, options)]
    env = {**os.environ, "VLLM_HOST_IP": "127.0.0.1"}
    nodes = []
    try:
        for rank in (1, 0):
            with (tmp_path / f"{rank}.log").open("wb") as log:
                nodes.append(subprocess.Popen([*argv, f"--node-rank={rank}"], env=env, stdout=log, stderr=log))
        worker, leader = nodes
        _until_ready(f"http://127.0.0.1:{port}/readyz", nodes, tmp_path)
        prompt = [5, 6, 7, 8]
        body = {"requests": [{"group_id": "g", "prompt_token_ids": prompt, "n": 1}]}
        body["requests"][0]["sampling"] = {"temperature": 0, "max_tokens": 8}
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/rollouts", json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        (completion,) = answer.json()["groups"][0]["completions"]
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + completion["token_ids"]])).logits[0, len(prompt) - 1 : -1]
        assert completion["token_ids"] == logits.argmax(-1).tolist()

        for child in psutil.Process(worker.pid).children(recursive=True):
            if "Worker" in " ".join(child.cmdline()) or "spawn_main" in " ".join(child.cmdline()):
                child.send_signal(signal.SIGKILL)
        assert worker.wait(60) == 1
        assert "one of its workers died" in (tmp_path / "1.log").read_text()
    finally:
        for node in nodes:
            node.terminate()
        for node in nodes:
            try:
                node.wait(30)
            except subprocess.TimeoutExpired:
                node.kill()
                node.wait()


def _until_ready(url: str, nodes: list[subprocess.Popen], logs) -> None:
    ends = time.monotonic() + SECONDS
    while True:
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        tails = "\n".join((logs / f"{rank}.log").read_text(errors="replace")[-2000:] for rank in (0, 1))
        assert all(node.poll() is None for node in nodes) and time.monotonic() < ends, tails
        time.sleep(0.5)


@pytest.mark.vllm
def test_a_node_whose_leader_is_silent_ends(monkeypatch):
    pytest.importorskip("vllm")
    from rollout_server.engines import vllm_node

    for name in ("LOOK_SECONDS", "LEADER_SECONDS", "START_SECONDS"):
        monkeypatch.setattr(vllm_node, name, 0.05)

    class Executor:
        is_failed = False

    assert "the leader does not answer at http://127.0.0.1:9" in vllm_node._until_over(Executor(), "http://127.0.0.1:9")
