"""What a security review asks of the chart: pods without rights, no secret in the open, only the traffic it needs."""

import json
import re
import subprocess
import sys

import pytest
from manifests import (
    CASES,
    CHART,
    NAMESPACE,
    containers,
    manifests,
    matches,
    merged,
    of_kind,
    part,
    pods,
    read,
    render,
    templates,
)
from served import served
from traffic import DNS, INTERNET, METADATA_SERVICE, PROMETHEUS, STRANGER, End, admits, ends

from reward_server import app as reward_app
from services.access import HttpSettings

every_case = pytest.mark.parametrize("case", CASES)
SECRET_NAME = re.compile(r"TOKEN|PASSWORD|SECRET|_KEY$|REDIS_URL|REDISCLI_AUTH")
OF_REFERENCES = re.compile(r"^redis://:\$\(RLIF_REDIS_PASSWORD\)@[a-z0-9-]+:\d+/0$")


# ---- pods ------------------------------------------------------------------------------------------------------


@every_case
def test_pods_keep_the_restricted_profile(case):
    for name, template in pods(manifests(case)):
        spec = template["spec"]
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec), name
        assert spec["automountServiceAccountToken"] is False, name
        assert spec["securityContext"]["runAsNonRoot"] is True and spec["securityContext"]["runAsUser"] > 0, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        for volume in spec.get("volumes", []):
            assert {"configMap", "emptyDir", "persistentVolumeClaim"} & set(volume), (name, volume)
        for container in containers(template):
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False and "privileged" not in security, name
            assert security["capabilities"] == {"drop": ["ALL"]}, name
            assert security["readOnlyRootFilesystem"] is True, name
            assert "runAsUser" not in security and "runAsNonRoot" not in security, name


@every_case
def test_containers_have_limits_and_images_that_stay(case):
    for name, template in pods(manifests(case)):
        for container in containers(template):
            for kind in ("requests", "limits"):
                assert {"cpu", "memory"} <= set(container["resources"][kind]), name
            image = container["image"]
            assert "@sha256:" in image or re.search(r":[^/:]+$", image), image
            assert not image.endswith(":latest")


@every_case
def test_every_mount_has_a_volume_and_writes_go_where_they_may(case):
    for name, template in pods(manifests(case)):
        volumes = {volume["name"]: volume for volume in template["spec"].get("volumes", [])}
        claims = {claim["metadata"]["name"] for claim in _claim_templates(manifests(case), name)}
        for container in containers(template):
            for mount in container.get("volumeMounts", []):
                volume = volumes.get(mount["name"])
                assert volume or mount["name"] in claims, (name, mount)
                if volume and "configMap" in volume:
                    assert mount["readOnly"] is True
                if mount["mountPath"] == "/weights":
                    assert mount.get("readOnly", False) is (part(template) != "trainer"), name
        if part(template) in ("rollout", "reward", "trainer"):
            (container,) = template["spec"]["containers"]
            assert "/dev/shm" in {mount["mountPath"] for mount in container["volumeMounts"]}
            assert volumes["shm"]["emptyDir"]["medium"] == "Memory"


def _claim_templates(found, workload: str) -> list[dict]:
    kind, name = workload.split("/")
    (manifest,) = [one for one in of_kind(found, kind) if one["metadata"]["name"] == name]
    return manifest["spec"].get("volumeClaimTemplates", [])


@every_case
def test_claims_and_config_maps_that_are_mounted_exist(case):
    found = manifests(case)
    values = CASES[case]
    there = {one["metadata"]["name"] for one in of_kind(found, "PersistentVolumeClaim", "ConfigMap")}
    given = {claim for claim in ("data", "models") if values.get("storage", {}).get(claim)}
    given |= {values.get("hub", {}).get("cacheClaim")}
    for name, template in pods(found):
        for volume in template["spec"].get("volumes", []):
            claim = volume.get("persistentVolumeClaim", {}).get("claimName") or volume.get("configMap", {}).get("name")
            assert claim is None or claim in there | given, (name, volume)


@every_case
def test_probes_ask_the_right_endpoints_and_drains_have_time(case):
    for name, template in pods(manifests(case)):
        if part(template) in ("demo", "check", "redis"):
            continue
        (container,) = template["spec"]["containers"]
        is_worker = template["metadata"]["labels"].get("leaderworkerset.sigs.k8s.io/worker-index") == "1"
        if is_worker:  # nothing listens there but the engine's ranks
            assert "livenessProbe" not in container, name
            continue
        ports = {port["name"] for port in container["ports"]}
        paths = {kind: container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")}
        assert {kind: probe["path"] for kind, probe in paths.items()} == {
            "startup": "/healthz",
            "liveness": "/healthz",
            "readiness": "/readyz",
        }, name
        assert {probe["port"] for probe in paths.values()} <= ports, name
        startup = container["startupProbe"]
        assert startup["periodSeconds"] * startup["failureThreshold"] >= 120
        # A server finishes requests for 30 s after SIGTERM; the orchestrator for 10.
        least = 31 if part(template) in ("rollout", "reward", "sandbox") else 15
        assert template["spec"]["terminationGracePeriodSeconds"] >= least, name


@every_case
def test_ports_are_named(case):
    found = manifests(case)
    for name, template in pods(found):
        for container in containers(template):
            assert all(port["name"] for port in container.get("ports", [])), name
    for service in of_kind(found, "Service"):
        assert all(port["name"] and isinstance(port["targetPort"], str) for port in service["spec"]["ports"])


# ---- selectors -------------------------------------------------------------------------------------------------


@every_case
def test_services_select_pods_that_listen_there(case):
    found = manifests(case)
    for service in of_kind(found, "Service"):
        name, spec = service["metadata"]["name"], service["spec"]
        chosen = [
            template
            for _, template in pods(found)
            if matches({"matchLabels": spec["selector"]}, template["metadata"]["labels"])
        ]
        assert chosen, name
        for template in chosen:
            ports = {
                port["name"]: port["containerPort"] for one in containers(template) for port in one.get("ports", [])
            }
            for port in spec["ports"]:
                assert ports[port["targetPort"]] == port["port"], name


@every_case
def test_selectors_of_workloads_budgets_and_monitors_find_their_pods(case):
    found = manifests(case)
    labels = {name: template["metadata"]["labels"] for name, template in pods(found)}
    for workload in of_kind(found, "Deployment", "StatefulSet"):
        name = f"{workload['kind']}/{workload['metadata']['name']}"
        chosen = [other for other, own in labels.items() if matches(workload["spec"]["selector"], own)]
        assert chosen == [name]
    for manifest in of_kind(found, "PodDisruptionBudget", "PodMonitor"):
        assert any(matches(manifest["spec"]["selector"], own) for own in labels.values()), manifest["metadata"]
    for monitor in of_kind(found, "ServiceMonitor"):
        services = [
            one for one in of_kind(found, "Service") if matches(monitor["spec"]["selector"], one["metadata"]["labels"])
        ]
        expected = {"rollout", "reward"} | ({"sandbox"} if CASES[case].get("sandbox", {}).get("enabled") else set())
        assert {one["metadata"]["labels"]["app.kubernetes.io/component"] for one in services} == expected
        assert all(one["spec"].get("clusterIP") != "None" for one in services)  # or pods would be scraped twice


# ---- secrets ---------------------------------------------------------------------------------------------------


@every_case
def test_no_secret_is_written_anywhere_but_in_secrets(case):
    found = manifests(case)
    for name, template in pods(found):
        for container in containers(template):
            for variable in container.get("env", []):
                if SECRET_NAME.search(variable["name"]):
                    is_reference = "secretKeyRef" in variable.get("valueFrom", {})
                    assert is_reference or OF_REFERENCES.match(variable["value"]), (name, variable)
            words = " ".join(container.get("command", []) + container.get("args", []))
            assert not re.search(r"rediss?://|RLIF_\w*TOKEN|queue\.url", words), (name, words)
    kept = {value for secret in of_kind(found, "Secret") for value in secret["data"].values()}
    others = json.dumps([manifest for manifest in found if manifest["kind"] != "Secret"])
    assert not any(value in others for value in kept)


@every_case
def test_each_part_holds_only_the_tokens_it_needs(case):
    tokens: dict[str, set[str]] = {}
    for _, template in pods(manifests(case)):
        for container in containers(template):
            for variable in container.get("env", []):
                reference = variable.get("valueFrom", {}).get("secretKeyRef")
                if reference:
                    tokens.setdefault(part(template), set()).add(f"{variable['name']}={reference['key']}")
    redis = "RLIF_REDIS_PASSWORD=password" if "redis" in tokens else "RLIF_REDIS_URL=url"
    api, admin = "RLIF_API_TOKEN=api-token", "RLIF_ADMIN_TOKEN=admin-token"
    hub = {"HF_TOKEN=token"} if CASES[case].get("hub", {}).get("existingSecret") else set()
    expected = {
        "rollout": {redis, api} | hub,
        "trainer": {redis, api} | hub,
        "orchestrator": {redis, api, admin} | hub,
        "reward": {redis, api, admin} | hub,
        "check": {api},
    }
    if case == "watched":
        expected["orchestrator"] |= {"RLIF_WEBHOOK_TOKEN=key"}
        expected["reward"] |= {"RLIF_KEY_JUDGE=key"}
        expected["trainer"] |= {"WANDB_API_KEY=key"}
    if "redis" in tokens:
        expected["redis"] = {"REDISCLI_AUTH=password"}
    if CASES[case].get("sandbox", {}).get("enabled"):
        expected["sandbox"] = {"RLIF_API_TOKEN=sandbox-token"}
        expected["reward"] |= {"RLIF_SANDBOX_TOKEN=sandbox-token"}
    assert tokens == expected


# ---- traffic ---------------------------------------------------------------------------------------------------

PORTS = {"rollout": 8200, "reward": 8100, "sandbox": 8400, "redis": 6379, "orchestrator": 9401, "trainer": 9400}
FLOW = {
    ("orchestrator", "rollout"),
    ("orchestrator", "reward"),
    ("orchestrator", "redis"),
    ("rollout", "redis"),
    ("reward", "redis"),
    ("trainer", "redis"),
    ("reward", "sandbox"),
    ("check", "rollout"),
    ("check", "reward"),
    ("check", "sandbox"),
    ("check", "orchestrator"),
}


@every_case
def test_parts_reach_whom_they_need_and_nobody_else(case):
    found = manifests(case)
    there = ends(found)
    allowed = {
        (source, target)
        for source in there
        for target in there
        if target in PORTS and admits(found, there[source], there[target], PORTS[target])
    }
    # Pods of one part talk among themselves where a model or its training spans several.
    among = {("trainer", "trainer")} if CASES[case]["trainer"].get("nodes", 1) > 1 else set()
    among |= {("rollout", "rollout")} if of_kind(found, "LeaderWorkerSet") else set()
    assert allowed == {(source, target) for source, target in FLOW if {source, target} <= set(there)} | among
    for source, target in among:
        assert admits(found, there[source], there[target], 47123)
    for source, target in FLOW:
        if {source, target} <= set(there):
            assert not admits(found, there[source], there[target], 22)


@every_case
def test_strangers_reach_nothing_and_prometheus_only_metrics(case):
    found = manifests(case)
    there = ends(found)
    watched = CASES[case].get("monitoring", {}).get("enabled", False)
    for target, port in PORTS.items():
        if target in there:
            assert not admits(found, STRANGER, there[target], port), target
            assert admits(found, PROMETHEUS, there[target], port) is (watched and target != "redis"), target


@every_case
def test_egress_is_names_and_the_hub(case):
    found = manifests(case)
    there = ends(found)
    hub = CASES[case].get("hub", {}).get("enabled", True)
    for source, end in there.items():
        needs_names = source not in ("redis", "sandbox", "demo")
        assert admits(found, end, DNS, 53, "UDP") is admits(found, end, DNS, 53) is needs_names, source
        is_free = hub and source in ("rollout", "reward", "orchestrator", "trainer")
        assert admits(found, end, INTERNET, 443) is is_free, source
        assert not admits(found, end, INTERNET, 80) and not admits(found, end, METADATA_SERVICE, 80), source
        assert not admits(found, end, METADATA_SERVICE, 443) and not admits(found, end, STRANGER, 443), source


def test_an_external_redis_is_reached_on_its_port():
    found = manifests("external-redis")
    for source in ("rollout", "reward", "orchestrator", "trainer"):
        assert admits(found, ends(found)[source], INTERNET, 6379)
    assert not admits(found, ends(found)["check"], INTERNET, 6379)


def test_parts_reach_what_their_own_rules_name():
    found = manifests("watched")
    inside, ports = End(address="10.9.1.2", is_pod=False), (4318, 8443, 8080, 5000)
    for source, own in zip(("rollout", "reward", "orchestrator", "trainer"), ports, strict=True):
        assert {port for port in ports if admits(found, ends(found)[source], inside, port)} == {own}


def test_named_clients_are_let_in_and_the_evaluator_sees_what_is_open():
    """The evaluator must be able to say yes: without policies everything is open."""
    peer = [{"podSelector": {"matchLabels": STRANGER.labels}}]
    found = render(merged(read("one-node"), {"networkPolicy": {"rewardClients": peer}}))
    there = ends(found)
    assert admits(found, STRANGER, there["reward"], 8100) and not admits(found, STRANGER, there["rollout"], 8200)
    opened = render(merged(read("one-node"), {"networkPolicy": {"enabled": False}}))
    assert of_kind(opened, "NetworkPolicy") == []
    assert admits(opened, STRANGER, ends(opened)["redis"], 6379) and admits(opened, there["redis"], INTERNET, 80)


def test_policies_are_of_the_releases_namespace():
    for policy in of_kind(manifests("everything"), "NetworkPolicy"):
        assert policy["metadata"].get("namespace", NAMESPACE) == NAMESPACE


# ---- helm test -------------------------------------------------------------------------------------------------


def check(*arguments: str, token: str = "") -> subprocess.CompletedProcess:
    argv = [sys.executable, str(CHART / "files" / "check.py"), *arguments]
    return subprocess.run(argv, env={"RLIF_API_TOKEN": token}, capture_output=True, text=True, timeout=60)


def test_the_check_passes_against_a_server_that_scores_and_says_what_fails(tiny_model):
    settings = HttpSettings(api_token="open sesame")
    scorer = reward_app.Settings(model=str(tiny_model), http=settings, default_spec="self_certainty")
    with served(reward_app.create(scorer)) as url:
        good = check(f"--score={url}", url, token="open sesame")
        assert good.returncode == 0 and "self_certainty" in good.stdout, good.stderr
        refused = check(f"--score={url}", url)
        assert refused.returncode == 1 and "401" in refused.stderr
        gone = check("--wait=1", f"--score={url}", url, "http://127.0.0.1:9", token="open sesame")
        assert gone.returncode == 1 and "FAILED http://127.0.0.1:9/readyz" in gone.stderr
    with served(reward_app.create(reward_app.Settings(http=settings, default_spec="length"))) as url:
        no_model = check("--wait=1", f"--score={url}", url, token="open sesame")
        assert no_model.returncode == 1 and "/v1/score: 404" in no_model.stderr


def test_helm_test_asks_every_service():
    (pod,) = of_kind(manifests("everything"), "Pod")
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    urls = [word for word in templates(pod)[0]["spec"]["containers"][0]["args"] if word.startswith("http")]
    services = {
        one["metadata"]["name"]: one["spec"]["ports"][0]["port"] for one in of_kind(manifests("everything"), "Service")
    }
    assert urls == [
        f"http://rlif-{name}:{services[f'rlif-{name}']}" for name in ("rollout", "reward", "sandbox", "orchestrator")
    ]
