"""docker/Dockerfile and what it copies in, without a container engine."""

import re
import runpy
import shutil
import sysconfig
import tomllib
import zipfile
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path

import dockerfile
import pytest
from composition import PARTS, ROOT, python, run
from packaging.requirements import Requirement
from served import served
from typer.main import get_command

from services import recipe
from services.access import HttpSettings
from services.cli import demo
from services.cli.main import app
from services.demo.base_model import make_demo_model
from services.http import create_app
from services.startup import StartupError

TARGETS = (*PARTS, "rollout-gpu", "reward-gpu", "trainer-gpu")
ARGUMENTS: dict[str, str] = {}
"""Build arguments before the first stage, with their defaults."""


@dataclass
class Stage:
    base: str
    commands: list[dockerfile.Command] = field(default_factory=list)

    def of(self, name: str) -> list[dockerfile.Command]:
        return [command for command in self.commands if command.cmd == name]


def _stages() -> dict[str, Stage]:
    found: dict[str, Stage] = {}
    for command in dockerfile.parse_file(str(ROOT / "docker/Dockerfile")):
        if command.cmd == "FROM":
            base, _, name = command.value
            found[name] = Stage(base)
        elif found:
            found[name].commands.append(command)
        else:
            key, _, value = command.value[0].partition("=")
            ARGUMENTS[key] = value
    return found


STAGES = _stages()


def line(target: str) -> list[dockerfile.Command]:
    """Every command that makes the image `target`, the first stage's first."""
    stage = STAGES[target]
    return (line(stage.base) if stage.base in STAGES else []) + stage.commands


def last(target: str, name: str) -> tuple[str, ...]:
    return [command for command in line(target) if command.cmd == name][-1].value


def pairs(values: tuple[str, ...]) -> dict[str, str]:
    """ENV's or LABEL's: the parser gives name, value and, some versions of it, the sign between them."""
    kept = [value for value in values if value != "="]
    return dict(zip(kept[::2], kept[1::2], strict=True))


def test_there_is_an_image_for_every_service_and_every_base_is_an_argument():
    assert set(TARGETS) <= set(STAGES)
    bases = {stage.base for stage in STAGES.values() if stage.base not in STAGES}
    assert bases == {"${BASE_IMAGE}", "${VLLM_IMAGE}", "${PYTORCH_IMAGE}"} == {f"${{{name}}}" for name in ARGUMENTS}
    assert all(re.search(r":[\w.-]*\d", image) or "bookworm" in image for image in ARGUMENTS.values()), (
        "a tag that moves"
    )


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_runs_rlif_as_nobody_in_particular(target):
    assert last(target, "ENTRYPOINT") == ("tini", "--", "rlif")
    assert last(target, "USER") == ("10001:10001",)
    assert last(target, "HEALTHCHECK")[-1] == "healthcheck"
    made = [command for command in line(target) if command.cmd in ("ENTRYPOINT", "CMD")]
    assert all(command.json for command in made), "the shell form puts a shell between tini and rlif"
    users = [command for command in line(target) if command.cmd == "RUN" and "useradd" in command.value[0]]
    assert len(users) == 1 and "--uid 10001" in users[0].value[0] and "--home-dir /tmp" in users[0].value[0]
    health = pairs(last(target, "ENV"))["HEALTH_URL"]
    assert f":{last(target, 'EXPOSE')[0]}/" in health
    # The labels of the image itself, on top of those of its line.
    labels = pairs(STAGES[target].of("LABEL")[-1].value)
    assert list(labels) == [f"org.opencontainers.image.{name}" for name in ("title", "description", "revision")]


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_s_default_command_is_one_of_ours(target):
    words = list(last(target, "CMD"))
    command, context = get_command(app), None
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    if words != ["--help"]:
        context = command.make_context("rlif", words)
        assert context.params["host"] == "0.0.0.0"


def test_nothing_secret_or_moving_goes_into_an_image():
    for name, stage in STAGES.items():
        for command in stage.commands:
            text = command.original
            if command.cmd in ("ARG", "ENV"):
                assert not re.search(r"TOKEN|PASSWORD|SECRET|INDEX_URL", text), (name, text)
            assert command.cmd != "ADD" and not re.search(r"\b(curl|wget|git clone)\b", text), (name, text)
            if "pip wheel" in text:
                assert "PIP_CONSTRAINT=/opt/build/constraints.txt" in text and "--mount=type=secret" in text
            elif "install.sh requirements" in text:
                assert "--mount=type=secret,id=pip" in text
            else:
                assert not re.search(r"\bpip3? ", text), (name, text)
    assert '-c /tmp/held.txt "$@"' in (ROOT / "docker/install.sh").read_text()


def test_services_install_no_more_than_they_need():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

    def installed(target: str) -> set[str]:
        found = [
            re.search(r"install\.sh requirements ?([\w,]*)", command.value[0])
            for command in line(target)
            if command.cmd == "RUN"
        ]
        return {extra for match in found if match for extra in match[1].split(",") if extra}

    wanted = {
        "rollout": {"otel", "model"},
        "reward": {"otel", "model", "verify"},
        "trainer": {"otel", "model", "train", "tracking"},
        "orchestrator": {"otel", "data", "tokenizer"},
        "sandbox": {"otel"},
        "rollout-gpu": {"otel", "model"},
        "reward-gpu": {"otel", "model", "verify"},
        "trainer-gpu": {"otel", "train", "tracking"},
    }
    assert {target: installed(target) for target in TARGETS} == wanted
    assert set().union(*wanted.values()) <= set(extras)
    assert not any("torch" in requirement for extra in ("otel", "data", "tokenizer") for requirement in extras[extra])


def test_the_build_context_is_what_is_copied_and_nothing_else():
    ignored = [text for text in (ROOT / ".dockerignore").read_text().splitlines() if text and text[0] != "#"]
    assert ignored[0] == "*"
    let_in = {text[1:] for text in ignored if text.startswith("!")}
    copied = {
        source
        for stage in STAGES.values()
        for command in stage.of("COPY")
        if not any(flag.startswith("--from") for flag in command.flags)
        for source in command.value[:-1]
    }
    assert copied == let_in
    assert all((ROOT / path).exists() for path in let_in)


held = runpy.run_path(str(ROOT / "docker/held.py"))["held"]


def test_what_a_vendor_installed_stays_and_the_rest_is_pinned():
    constraints = "# why\ntorch==2.13.0\nTyping_Extensions==4.1\nfastapi==0.136.3  # servers\n"
    here = {"torch": "2.13.0+cu130", "typing-extensions": "4.2", "distro-info": "1.1build1", "setuptools": "66.1.1"}
    assert held(constraints, here) == ["fastapi==0.136.3", "torch==2.13.0+cu130", "typing-extensions==4.2"]
    # Beside a whole environment pip must take every line.
    done = python(ROOT / "docker/held.py", ROOT / "constraints.txt")
    assert done.returncode == 0 and "pydantic==" in done.stdout
    names = [Requirement(text).name for text in done.stdout.splitlines()]
    assert len(names) == len(set(names)) > 100


def test_the_shell_script_is_one():
    assert run("sh", "-n", ROOT / "docker/install.sh").returncode == 0


def test_the_healthcheck_says_why():
    check = ROOT / "docker/healthcheck.py"
    with served(create_app("test", "0", HttpSettings(), lambda: {"redis": "no answer for 12 s"})) as url:
        # A proxy in the environment is not asked.
        assert python("-IS", check, HEALTH_URL=f"{url}/healthz", http_proxy="http://127.0.0.1:9").returncode == 0
        waiting = python("-IS", check, f"{url}/readyz")
    assert waiting.returncode == 1 and "503" in waiting.stderr and "no answer for 12 s" in waiting.stderr
    gone = python("-IS", check, f"{url}/readyz")
    assert gone.returncode == 1 and "refused" in gone.stderr and "Traceback" not in gone.stderr


def test_an_installed_package_carries_the_demo_s_recipe(tmp_path):
    """`rlif demo-prepare` works in an image, where there is no checkout."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for folder in ("recipes", "services", "reward_server", "rollout_server", "trainer"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    wheel = ("-m", "pip", "wheel", "-q", "--no-index", "--no-deps", "--no-build-isolation", "-w", tmp_path, tmp_path)
    done = python(*wheel)
    assert done.returncode == 0, done.stderr
    files = zipfile.ZipFile(next(tmp_path.glob("rlif-*.whl"))).namelist()
    data = f"rlif-{version('rlif')}.data/data/"
    assert f"{data}share/rlif/recipes/demo.yaml" in files and "reward_server/scorer/fused.cpp" in files
    assert "services/prompts.yaml" in files
    assert Path(sysconfig.get_path("data")) / "share/rlif/recipes" in demo.RECIPES


def test_demo_prepare_makes_a_recipe_that_names_what_it_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("services.demo.base_model.make_demo_model", partial(make_demo_model, steps=1))
    monkeypatch.setattr("services.logs.configure", lambda *_: None)
    folder = tmp_path / "demo"
    demo.demo_prepare(folder, seed=3)
    assert sorted(path.name for path in folder.iterdir()) == ["model", "recipe.yaml", "train.jsonl"]
    made = recipe.load(folder / "recipe.yaml")
    assert (made.model.path, made.data.path, made.run.seed) == (f"{folder}/model", f"{folder}/train.jsonl", 3)
    weights = (folder / "model/model.safetensors").stat().st_mtime_ns
    (folder / "recipe.yaml").write_text("of an earlier version")
    demo.demo_prepare(folder, seed=3)
    assert recipe.load(folder / "recipe.yaml") == made
    assert (folder / "model/model.safetensors").stat().st_mtime_ns == weights, "the model is made once"
    assert "made earlier" in " ".join(capsys.readouterr().out.split())


def test_demo_prepare_leaves_the_model_to_who_was_first(tmp_path, monkeypatch):
    """Several machines start on one shared folder at once."""

    def beside_another(directory: Path, *_, **__) -> Path:
        make_demo_model(tmp_path / "model", 0, steps=1)
        return make_demo_model(directory, 0, steps=1)

    monkeypatch.setattr("services.demo.base_model.make_demo_model", beside_another)
    monkeypatch.setattr("services.logs.configure", lambda *_: None)
    demo.demo_prepare(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "recipe.yaml", "train.jsonl"]


def test_demo_prepare_names_a_folder_it_cannot_write(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StartupError, match=f"{tmp_path}/file"):
        demo.demo_prepare(tmp_path / "file")
