"""What the README shows runs: its curl commands against real servers, its links, its commands and names."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from sandboxes import started
from served import served

from reward_server.app import Settings, create
from reward_server.rewards import REWARDS
from reward_server.sandbox import app as sandbox_app
from reward_server.sandbox.bubblewrap import Bubblewrap
from services.access import HttpSettings

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```console\n(.*?)```", TEXT, re.DOTALL)
CURLS = [
    command.strip() for block in BLOCKS for command in re.findall(r"^\$ (curl .*?)(?=^\$ |\Z)", block, re.M | re.S)
]

pytestmark = [pytest.mark.alone, pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")]


def run(command: str, port: int, url: str) -> dict:
    command = command.replace(f"localhost:{port}", url.removeprefix("http://"), 1)
    command = command.replace("curl -s ", "curl -sS --fail-with-body --max-time 60 ", 1)
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, command + "\n" + done.stdout + done.stderr
    return json.loads(done.stdout)


def test_every_curl_command_of_the_reward_server(tiny_model):
    commands = [command for command in CURLS if "localhost:8100" in command]
    assert len(commands) == 4
    with served(create(Settings(model=str(tiny_model)))) as url:
        score, rewards, spec, versions = (run(command, 8100, url) for command in commands)
    assert all(
        set(result["scores"]) == set(json.loads(commands[0].split("-d '")[1][:-1])["metrics"])
        for result in score["results"]
    )
    parts = [item["components"] for item in rewards["groups"][0]["scores"]]
    assert [part["math_verify"]["outcome"] for part in parts] == ["correct", "wrong"]
    assert spec["version"] == 1 and versions["versions"] == [spec]


async def test_the_curl_command_of_the_sandbox():
    (command,) = (command for command in CURLS if "localhost:8400" in command)
    await (await started(Bubblewrap())).stop()  # skips where there is none
    with served(sandbox_app.create(HttpSettings(), Bubblewrap())) as url:
        assert run(command, 8400, url)["results"][0]["stdout"] == "42\n"


def test_every_reward_is_in_the_table_and_every_link_leads_somewhere():
    assert [name for name in REWARDS if f"`{name}`" not in TEXT] == []
    links = re.findall(r"\]\((?!http)([^)#]+)", TEXT)
    assert len(links) > 8 and [link for link in links if not (ROOT / link).exists()] == []
