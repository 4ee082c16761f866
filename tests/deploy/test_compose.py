"""compose.yaml without an engine: its schema, what it lets out and in, and that every command line means something."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from composition import PARTS, ROOT, SECRETS, arguments, composed, interpolated, ours, python, run
from podman_compose import rec_subs
from typer.main import get_command

from services import recipe
from services.cli import demo
from services.cli.main import app

SERVICES = composed()
PROMETHEUS = yaml.safe_load((ROOT / "docker/prometheus.yml").read_text())


def parsed(words: list[str]) -> tuple[str, dict[str, Any]]:
    """(`serve rollout`, its parameters) as the command line itself reads them."""
    command, names, words = get_command(app), [], list(words)
    while hasattr(command, "commands"):
        names.append(words.pop(0))
        command = command.commands[names[-1]]
    return " ".join(names), command.make_context(names[-1], words).params


def chosen(service: dict[str, Any], where: Path) -> recipe.Recipe:
    """The recipe of a service's command line, with its overrides; `where` has what the containers have."""
    _, given = parsed(arguments(service))
    path = given.get("recipe_path") or given["recipe_file"]
    return recipe.load(where / path, given["overrides"])


@pytest.fixture(scope="module")
def inside(tmp_path_factory) -> Path:
    """The recipes at their paths in the containers: the demo's, as `prepare` leaves it, and ./recipes."""
    folder = tmp_path_factory.mktemp("inside")
    made = demo._recipe(["model.path=/srv/rlif/cache/demo/model", "data.path=/srv/rlif/cache/demo/train.jsonl"])
    (folder / "cache/demo").mkdir(parents=True)
    (folder / "cache/demo/recipe.yaml").write_text(recipe.dump(made))
    (folder / "recipes").symlink_to(ROOT / "recipes")
    return folder


def test_it_follows_the_compose_specification():
    done = python("-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", "compose.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("missing", SECRETS)
def test_a_secret_that_is_missing_is_named(missing):
    others = {name: "x" for name in SECRETS if name != missing}
    for given in (others, others | {missing: ""}):
        with pytest.raises(ValueError, match=f"{missing}.*make .env"):
            interpolated(given)


def test_make_writes_the_secrets_once_and_for_the_owner_alone(tmp_path):
    for name in ("Makefile", ".env.example"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    make = ["make", "-s", "-C", str(tmp_path), ".env", f"PYTHON={sys.executable}"]
    assert subprocess.run(make, capture_output=True, timeout=60).returncode == 0
    text = (tmp_path / ".env").read_text()
    values = dict(re.findall(r"^([A-Z_]+)=(.*)$", text, re.M))
    assert set(values) == {*SECRETS, "COMPOSE_PROFILES"} and values["COMPOSE_PROFILES"] == "cpu"
    assert len({values[name] for name in SECRETS}) == len(SECRETS)
    assert all(re.fullmatch(r"[0-9a-f]{48}", values[name]) for name in SECRETS)
    assert (tmp_path / ".env").stat().st_mode & 0o777 == 0o600
    (tmp_path / ".env.example").touch()
    subprocess.run(make, capture_output=True, timeout=60, check=True)
    assert (tmp_path / ".env").read_text() == text
    assert "\n.env\n" in (ROOT / ".gitignore").read_text()


def test_every_setting_is_in_the_example():
    used = set(re.findall(r"(?<!\$)\$\{([A-Z_]+)", (ROOT / "compose.yaml").read_text()))
    listed = set(re.findall(r"^#?([A-Z_]+)=", (ROOT / ".env.example").read_text(), re.M))
    assert used - listed == set() and listed - used == {"COMPOSE_PROFILES"}


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_may_do_no_more_than_it_must(name):
    service = SERVICES[name]
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"] and "cap_add" not in service
    assert "no-new-privileges:true" in service["security_opt"] and not service.get("privileged")
    assert (len(service["security_opt"]) > 1) == (name == "sandbox")
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert not any(volume.startswith("/") for volume in service.get("volumes", [])), "a path of somebody's machine"
    for volume in service.get("volumes", []):
        source, _, options = volume.partition(":")
        assert source.isalpha() or options.endswith(":ro")
    published = {"orchestrator", "rollout", "reward", "rollout-gpu", "reward-gpu", "prometheus", "grafana"}
    assert ("ports" in service) == (name in published)


def test_secrets_travel_in_the_environment_of_who_needs_them_and_nowhere_else():
    have = {
        name: {secret for secret in SECRETS if secret.lower() in str(service.get("environment", ""))}
        for name, service in SERVICES.items()
    }
    run_, admin = {"RLIF_API_TOKEN", "REDIS_PASSWORD"}, {"RLIF_API_TOKEN", "RLIF_ADMIN_TOKEN", "REDIS_PASSWORD"}
    for extra in ("", "-gpu"):
        assert have[f"rollout{extra}"] == run_ and have[f"reward{extra}"] == {*admin, "RLIF_SANDBOX_TOKEN"}
        assert have[f"trainer{extra}"] == run_ and have[f"prepare{extra}"] == set()
    assert have["orchestrator"] == admin and have["redis"] == {"REDIS_PASSWORD"}
    assert have["sandbox"] == {"RLIF_SANDBOX_TOKEN"} and have["grafana"] == {"GRAFANA_ADMIN_PASSWORD"}
    for name, service in SERVICES.items():
        seen = str({key: value for key, value in service.items() if key != "environment"})
        assert not any(secret.lower() in seen for secret in SECRETS), name


@pytest.mark.parametrize("name", ours(SERVICES))
def test_an_image_is_built_for_the_part_it_runs(name):
    service = ours(SERVICES)[name]
    target, words = service["build"]["target"], arguments(service)
    part = target.removesuffix("-gpu")
    assert service["image"] == f"rlif-{part}:local{'-gpu' if target != part else ''}" and part in PARTS
    # Nobody else's image of this name is ever asked for.
    assert service["pull_policy"] == "build"
    expected = {"orchestrator": "orchestrate", "trainer": "train", "sandbox": ""}.get(part, f"serve {part}")
    if name.startswith("prepare"):
        expected = "demo-prepare"
    if expected:
        assert parsed(words)[0] == expected
    else:
        assert words == []  # the image's own command


@pytest.mark.parametrize("gpu", ["", "-gpu"])
@pytest.mark.parametrize("path", ["cache/demo/recipe.yaml", "recipes/gsm8k.yaml"])
def test_the_parts_of_a_run_agree(path, gpu, inside):
    services = composed(RECIPE=path, RUN="second")
    recipes = {part: chosen(services[f"{part}{gpu}"], inside) for part in ("rollout", "reward", "trainer")}
    recipes["orchestrator"] = chosen(services["orchestrator"], inside)
    assert {found.run.name for found in recipes.values()} == {"second"}
    told = recipes["orchestrator"]
    assert parsed(arguments(services[f"rollout{gpu}"]))[1]["host"] == "0.0.0.0"
    for urls, part in ((told.rollout.urls, "rollout"), (told.scorer.urls, "reward")):
        port = parsed(arguments(services[f"{part}{gpu}"]))[1]["port"]
        assert urls == [f"http://{part}:{port}"]
        networks = services[f"{part}{gpu}"].get("networks", {})
        assert not gpu or networks["default"]["aliases"] == [part]
    trained = recipes["trainer"]
    assert (str(trained.run.dir), str(trained.weights_dir)) == ("runs/second", "weights/second")
    given = parsed(arguments(services[f"trainer{gpu}"]))[1]
    assert given["resume"] is True and given["resume_from"] is None
    begun = arguments(composed(RESUME_FROM="cache/base", RECIPE=path)[f"trainer{gpu}"])
    assert parsed(begun)[1]["resume_from"] == Path("cache/base")
    assert told.tracking.metrics_port == trained.tracking.metrics_port
    if gpu:
        devices = {
            part: getattr(found, "scorer" if part == "reward" else part).device
            for part, found in recipes.items()
            if part != "orchestrator"
        }
        assert set(devices.values()) == {"cuda"}


def test_keys_of_other_services_go_to_the_part_that_asks_them():
    given = {"RLIF_WEBHOOK_TOKEN": "hooked", "WANDB_API_KEY": "tracked"}
    for settings, expected in (({}, ""), (given, None)):
        services = composed(**settings)
        for name, secret in given.items():
            value = secret if expected is None else expected
            have = {
                part: service["environment"][name]
                for part, service in services.items()
                if name in service.get("environment", {})
            }
            parts = {"orchestrator"} if name == "RLIF_WEBHOOK_TOKEN" else {"trainer", "trainer-gpu"}
            assert have == dict.fromkeys(parts, value)


@pytest.mark.parametrize("gpu", ["", "-gpu"])
def test_copies_of_the_weights_lie_in_a_volume_not_in_memory(gpu, inside):
    for part in ("rollout", "reward", "trainer"):
        service = SERVICES[f"{part}{gpu}"]
        folder = chosen(service, inside).weights.mirror_dir
        places = [volume.split(":")[1] for volume in service["volumes"] if not volume.endswith(":ro")]
        assert any((Path("/srv/rlif") / folder).is_relative_to(place) for place in places), part


@pytest.mark.parametrize("settings", [{}, {"RESUME_FROM": "cache/base"}])
def test_a_command_is_the_same_whether_it_is_split_or_filled_in_first(settings):
    """Docker's Compose fills in first, podman-compose splits first."""
    for name, service in ours(yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]).items():
        if "command" in service:
            words = [rec_subs(word, settings) for word in shlex.split(service["command"])]
            assert words == arguments(composed(**settings)[name]), name


def test_weights_and_runs_are_written_by_the_trainer_alone():
    for name, service in SERVICES.items():
        volumes = {volume.split(":")[0]: volume.split(":")[1:] for volume in service.get("volumes", [])}
        writes = {source for source, (_, *options) in volumes.items() if options != ["ro"]}
        assert ({"runs", "weights"} <= writes) == name.startswith("trainer")
        assert not writes & {"runs", "weights"} or name.startswith("trainer")
    places = {
        tuple(volume.split(":")[:2]) for service in ours(SERVICES).values() for volume in service.get("volumes", [])
    }
    assert {("weights", "/srv/rlif/weights"), ("runs", "/srv/rlif/runs"), ("cache", "/srv/rlif/cache")} <= places


@pytest.mark.parametrize("gpu", ["", "-gpu"])
def test_they_start_in_order(gpu):
    for part in ("rollout", "reward", "trainer"):
        awaited = SERVICES[f"{part}{gpu}"]["depends_on"]
        assert awaited["redis"]["condition"] == "service_healthy"
        assert awaited[f"prepare{gpu}"]["condition"] == "service_completed_successfully"
    awaited = SERVICES["orchestrator"]["depends_on"]
    assert awaited[f"rollout{gpu}"] == awaited[f"reward{gpu}"] == {"condition": "service_healthy", "required": False}


def test_a_profile_starts_one_of_each_part():
    for profile in ("cpu", "gpu"):
        there = [name for name, service in SERVICES.items() if profile in service.get("profiles", [profile])]
        assert sorted(name.removesuffix("-gpu") for name in there) == sorted(
            ["redis", "prepare", "rollout", "reward", "trainer", "orchestrator", "prometheus", "grafana"]
        )
    for part in ("rollout", "reward", "trainer"):
        (device,) = SERVICES[f"{part}-gpu"]["deploy"]["resources"]["reservations"]["devices"]
        assert device == {"driver": "nvidia", "capabilities": ["gpu"], "device_ids": ["0"]}
    ranks = composed(TRAINER_RANKS="4")["trainer-gpu"]
    assert "entrypoint" not in ranks and "trainer.ranks=4" in ranks["command"]


def test_redis_takes_its_password_by_stdin():
    service = SERVICES["redis"]
    script = service["entrypoint"][-1].replace("$$", "$")
    shown = run("sh", "-euc", script.replace("exec redis-server -", "cat"), REDISCLI_AUTH="hidden")
    lines = shown.stdout.splitlines()
    assert lines[0] == "requirepass hidden" and "appendfsync always" in lines and "hidden" not in script
    assert service["environment"]["REDISCLI_AUTH"] == "redis_password"


def test_the_sandbox_has_no_way_out():
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())
    assert compose["networks"]["sandbox"] == {"internal": True} and SERVICES["sandbox"]["networks"] == ["sandbox"]
    beside = {name for name, service in SERVICES.items() if "sandbox" in service.get("networks", [])}
    assert beside == {"sandbox", "reward", "reward-gpu", "prometheus"}


def test_prometheus_asks_every_service_where_it_listens(inside):
    ports = {"trainer": chosen(SERVICES["trainer"], inside).tracking.metrics_port}
    ports["orchestrator"] = chosen(SERVICES["orchestrator"], inside).tracking.metrics_port + 1
    for part in ("rollout", "reward"):
        ports[part] = parsed(arguments(SERVICES[part]))[1]["port"]
    ports["sandbox"] = parsed(["serve", "sandbox"])[1]["port"]
    asked = {}
    for job in PROMETHEUS["scrape_configs"]:
        for group in job.get("static_configs", []):
            asked |= {host: int(port) for host, port in (target.split(":") for target in group["targets"])}
        for group in job.get("dns_sd_configs", []):
            asked |= dict.fromkeys(group["names"], group["port"])
    assert asked == ports
    mounts = dict(volume.split(":")[:2] for volume in SERVICES["prometheus"]["volumes"])
    assert PROMETHEUS["rule_files"] == [f"{mounts['./k8s/rlif/files/alerts']}/*.yaml"]


def test_grafana_finds_prometheus_and_the_dashboards():
    provisioning = ROOT / "docker/grafana/provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())["datasources"]
    (provider,) = yaml.safe_load((provisioning / "dashboards/rlif.yaml").read_text())["providers"]
    mounts = dict(volume.split(":")[:2] for volume in SERVICES["grafana"]["volumes"])
    assert mounts["./docker/grafana/provisioning"] == "/etc/grafana/provisioning"
    assert provider["options"]["path"] == mounts["./k8s/rlif/files/dashboards"]
    port = SERVICES["prometheus"]["ports"][0].rpartition(":")[2]
    assert source["url"] == f"http://prometheus:{port}" and source["isDefault"] is True


def test_the_images_that_ours_start_from_are_the_dockerfiles():
    text = (ROOT / "docker" / "Dockerfile").read_text()
    defaults = dict(re.findall(r"^ARG (\w+_IMAGE)=(\S+)$", text, re.MULTILINE))
    for service in SERVICES.values():
        if "build" in service:
            assert service["build"]["args"] == defaults
