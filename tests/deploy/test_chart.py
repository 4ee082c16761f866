"""The chart renders for every values file to what Kubernetes and the operators take, and refuses bad values by name."""

import json
import shutil
from functools import cache
from pathlib import Path

import helm_python
import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator
from manifests import CASES, CHART, NAMES, ROOT, manifests, merged, named, of_kind, pods, read, render, templates

from services import recipe as recipes
from services.cli.recipes import check_rewards

VERSIONS = ("1.29.0", "1.33.0", "1.37.0")
CRDS = {
    schema["properties"]["kind"]["const"]: Draft202012Validator(schema)
    for schema in (json.loads(path.read_text()) for path in (Path(__file__).parent / "crds").glob("*.json"))
}


@pytest.fixture(scope="module", autouse=True)
def schemas_read_once():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(kubernetes_validate.utils, "schema_contents", cache(kubernetes_validate.utils.schema_contents))
        yield


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("case", CASES)
def test_kubernetes_takes_every_manifest(case, version):
    found = manifests(case)
    for manifest in found:
        if manifest["kind"] not in CRDS:
            kubernetes_validate.validate(manifest, version, strict=True)
    for manifest in of_kind(found, "LeaderWorkerSet"):
        for template in templates(manifest):
            pod = {"apiVersion": "v1", "kind": "Pod", **template}
            kubernetes_validate.validate(pod, version, strict=True)


@pytest.mark.parametrize("case", CASES)
def test_operators_take_their_resources(case):
    for manifest in manifests(case):
        if manifest["kind"] in CRDS:
            CRDS[manifest["kind"]].validate(manifest)


def test_everything_has_every_kind_of_resource():
    assert set(CRDS) - {"PrometheusRule"} <= {manifest["kind"] for manifest in manifests("everything")}


def test_a_misspelt_field_is_refused():
    bad = merged(named(manifests("one-node"), "PodMonitor", "rlif-run"), {"spec": {"podMetricEndpoints": []}})
    assert not CRDS["PodMonitor"].is_valid(bad)
    with pytest.raises(kubernetes_validate.ValidationError):
        deployment = named(manifests("one-node"), "Deployment", "rlif-orchestrator")
        kubernetes_validate.validate(merged(deployment, {"spec": {"replica": 1}}), VERSIONS[0], strict=True)


@pytest.mark.parametrize("case", CASES)
def test_lint_finds_nothing(case):
    report = helm_python.lint(CHART, CASES[case], strict=True, kube_version=f"v{VERSIONS[0]}")
    found = [message for message in report["messages"] if message["severity"] > 1]
    assert (report["errors"], found) == ([], [])


# ---- the recipe ------------------------------------------------------------------------------------------------


def recipe_of(found, template) -> recipes.Recipe:
    """What the program of a pod makes of its recipe and its arguments."""
    tree = yaml.safe_load(named(found, "ConfigMap", "rlif-recipe")["data"]["recipe.yaml"])
    arguments = template["spec"]["containers"][0]["args"]
    return recipes.parse(tree, [word for word in arguments if "=" in word and not word.startswith("-")])


def recipes_of(case: str) -> dict[str, recipes.Recipe]:
    found = manifests(case)
    return {
        workload: recipe_of(found, template)
        for workload, template in pods(found)
        if template["metadata"]["labels"]["app.kubernetes.io/component"]
        in ("rollout", "reward", "orchestrator", "trainer")
    }


@pytest.mark.parametrize("case", CASES)
def test_every_part_reads_one_recipe_that_can_run(case):
    first, *others = recipes_of(case).values()
    check_rewards(first)
    assert all(other == first for other in others) and len(others) == 3
    values = CASES[case]["trainer"]
    assert first.trainer.ranks == values.get("nodes", 1) * values.get("processesPerNode", 1)
    assert str(first.weights_dir) == f"/weights/{first.run.name}" and str(first.run.dir) == f"/runs/{first.run.name}"


@pytest.mark.parametrize("case", CASES)
def test_addresses_are_those_of_pods(case):
    """A pod of a StatefulSet is NAME-N.SERVICE, a leader of a LeaderWorkerSet NAME-N.NAME."""
    found = manifests(case)
    addresses = set()
    for workload in of_kind(found, "StatefulSet", "LeaderWorkerSet"):
        name = workload["metadata"]["name"]
        service = workload["spec"].get("serviceName", name)
        if workload["kind"] == "StatefulSet" and name != "rlif-redis":
            assert named(found, "Service", service)["spec"]["clusterIP"] == "None"
        port = templates(workload)[0]["spec"]["containers"][0]["ports"][0]["containerPort"]
        addresses |= {f"http://{name}-{number}.{service}:{port}" for number in range(8)}
    chosen = next(iter(recipes_of(case).values()))
    assert set(chosen.rollout.urls + chosen.scorer.urls) <= addresses
    servers = {part: merged(chart_values()[part], CASES[case].get(part, {})) for part in ("rollout", "reward")}
    for part, urls in (("rollout", chosen.rollout.urls), ("reward", chosen.scorer.urls)):
        scaling = servers[part]["autoscaling"]
        assert len(urls) == (scaling["maxReplicas"] if scaling["enabled"] else servers[part]["replicas"])


def chart_values():
    return yaml.safe_load((CHART / "values.yaml").read_text())


def test_gpus_are_asked_for_and_shared_out():
    found = manifests("five-nodes-7b")
    gpus = {
        name: template["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", 0)
        for name, template in pods(found)
    }
    assert gpus["StatefulSet/rlif-rollout"] == 2 and gpus["StatefulSet/rlif-reward"] == 1
    assert [count for name, count in gpus.items() if "trainer" in name] == [8]
    assert recipes_of("five-nodes-7b")["StatefulSet/rlif-rollout"].rollout.tensor_parallel_size == 2
    assert recipes_of("nine-nodes-14b")["StatefulSet/rlif-reward"].scorer.tensor_parallel_size == 2
    assert recipes_of("everything")["LeaderWorkerSet/rlif-rollout-pods"].rollout.tensor_parallel_size == 16


@pytest.mark.parametrize(("name", "nodes"), [("one-node", 1), ("five-nodes-7b", 5), ("nine-nodes-14b", 9)])
def test_layouts_fill_their_nodes(name, nodes):
    values = merged(chart_values(), read(name))
    asked = sum(values[part]["replicas"] * values[part]["gpus"] for part in ("rollout", "reward"))
    assert asked + values["trainer"]["nodes"] * values["trainer"]["gpus"] == 8 * nodes
    assert values["trainer"]["gpus"] == values["trainer"]["processesPerNode"]


def test_the_demo_is_the_projects_demo():
    given = recipes_of("kind")["StatefulSet/rlif-rollout"].model_dump()
    demo = recipes.load(ROOT / "recipes" / "demo.yaml").model_dump()
    differences = {
        f"{section}.{key}"
        for section, values in demo.items()
        if isinstance(values, dict)
        for key, value in values.items()
        if given[section][key] != value
    }
    filled = {"run.dir", "weights.dir", "rollout.urls", "scorer.urls", "tracking.metrics_port"}
    assert differences == filled | {"model.path", "data.path"}
    assert given["rewards"] == demo["rewards"]


def test_a_recipe_file_is_taken_whole():
    text = (ROOT / "recipes" / "gsm8k.yaml").read_text()
    found = render({"recipeFile": text})
    assert named(found, "ConfigMap", "rlif-recipe")["data"]["recipe.yaml"].strip() == text.strip()
    chosen = recipe_of(found, named(found, "StatefulSet", "rlif-reward")["spec"]["template"])
    assert chosen.run.name == "gsm8k" and chosen.scorer.urls == ["http://rlif-reward-0.rlif-reward-pods:8100"]


# ---- the trainer -----------------------------------------------------------------------------------------------


def job(found) -> dict:
    (found_job,) = [one for one in of_kind(found, "Job") if "-trainer-" in one["metadata"]["name"]]
    return found_job


def test_trainer_ranks_find_each_other_by_the_names_of_indexed_pods():
    found = manifests("five-nodes-7b")
    spec = job(found)["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 4, 4)
    pod = spec["template"]["spec"]
    assert named(found, "Service", pod["subdomain"])["spec"]["publishNotReadyAddresses"] is True
    (container,) = pod["containers"]
    arguments = container["args"]
    service, port = pod["subdomain"], 29400
    assert "command" not in container
    assert arguments[:6] == [
        "train", "/etc/rlif/recipe.yaml", "--resume", "--nodes=4", "--node-rank=$(JOB_COMPLETION_INDEX)",
        f"--leader=$(JOB_NAME)-0.{service}:{port}",
    ]  # fmt: skip
    # Kubernetes sets JOB_COMPLETION_INDEX itself.
    assert "JOB_NAME" in {variable["name"] for variable in container["env"]}
    # The launcher answers where rank 0 does not.
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "metrics"}
    assert [rule["onExitCodes"]["values"] for rule in spec["podFailurePolicy"]["rules"][1:]] == [[143], [2]]


def test_an_override_is_no_reference_to_a_variable():
    found = render(merged(read("one-node"), {"overrides": ["run.seed=$(RLIF_REDIS_URL)", "run.seed=$$x"]}))
    (container,) = job(found)["spec"]["template"]["spec"]["containers"]
    assert container["args"][-2:] == ["run.seed=$$(RLIF_REDIS_URL)", "run.seed=$$$$x"]


def test_a_recipe_with_everything_newer_has_what_it_needs():
    found = manifests("watched")
    (container,) = job(found)["spec"]["template"]["spec"]["containers"]
    assert "--resume-from=/models/exported" in container["args"]
    for workload, chosen in recipes_of("watched").items():
        # A copy of the weights is larger than /tmp.
        assert str(chosen.weights.mirror_dir) == "/cache/mirror", workload
    kept = render(merged(CASES["watched"], {"overrides": ["weights.mirror_dir=/models/mirror"]}))
    chosen = recipe_of(kept, named(kept, "StatefulSet", "rlif-reward")["spec"]["template"])
    assert str(chosen.weights.mirror_dir) == "/models/mirror"
    whole = recipes_of("one-node")["StatefulSet/rlif-reward"]
    assert whole.weights.mirror_dir is None


def test_one_rank_meets_nobody():
    (container,) = job(manifests("kind"))["spec"]["template"]["spec"]["containers"]
    assert "command" not in container
    assert container["args"][:3] == ["train", "/etc/rlif/recipe.yaml", "--resume"]
    assert not any(argument.startswith("--leader") for argument in container["args"])


def test_another_recipe_is_another_job_and_the_same_one_is_the_same():
    values = read("one-node")
    name = job(render(values))["metadata"]["name"]
    assert name == job(render(values))["metadata"]["name"]
    assert name != job(render(merged(values, {"recipe": {"trainer": {"steps": 59}}})))["metadata"]["name"]
    assert len(name) <= 50


# ---- files, secrets, scaling -----------------------------------------------------------------------------------


def test_alerts_and_dashboards_come_from_the_charts_files(tmp_path):
    copy = tmp_path / "rlif"
    shutil.copytree(CHART, copy)
    for folder in ("alerts", "dashboards"):
        shutil.rmtree(copy / "files" / folder, ignore_errors=True)
        (copy / "files" / folder).mkdir()
    empty = _rendered(copy)
    assert of_kind(empty, "PrometheusRule") == []
    assert [one for one in of_kind(empty, "ConfigMap") if "dashboard" in one["metadata"]["name"]] == []

    rule = {"alert": "Slow", "expr": "up == 0", "annotations": {"summary": "{{ $labels.instance }} is slow"}}
    (copy / "files/alerts/a.yaml").write_text(yaml.safe_dump({"groups": [{"name": "a", "rules": [rule]}]}))
    (copy / "files/alerts/b.yaml").write_text(yaml.safe_dump({"groups": [{"name": "b", "rules": [rule]}]}))
    board = {"title": "Run", "templating": "{{instance}} {{ .Values }}"}
    (copy / "files/dashboards/run.json").write_text(json.dumps(board))
    full = _rendered(copy)
    (rules,) = of_kind(full, "PrometheusRule")
    CRDS["PrometheusRule"].validate(rules)
    assert [(group["name"], group["rules"]) for group in rules["spec"]["groups"]] == [("a", [rule]), ("b", [rule])]
    kept = named(full, "ConfigMap", "rlif-dashboard-run")
    assert kept["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(kept["data"]["run.json"]) == board


def _rendered(folder: Path) -> list[dict]:
    texts = helm_python.Chart.load(folder).render(read("one-node"), name="rlif", namespace="ml")
    return [one for name, text in texts.items() if "NOTES" not in name for one in yaml.safe_load_all(text) if one]


def test_secrets_are_made_only_where_none_is_named():
    assert {one["metadata"]["name"] for one in of_kind(manifests("kind"), "Secret")} == {"rlif-tokens", "rlif-redis"}
    named_ones = {"auth": {"existingSecret": "mine"}, "redis": {"existingSecret": "queue"}}
    found = render(merged(read("one-node"), named_ones))
    assert of_kind(found, "Secret") == []
    used = {
        variable["valueFrom"]["secretKeyRef"]["name"]
        for _, template in pods(found)
        for variable in template["spec"]["containers"][0].get("env", [])
        if "secretKeyRef" in variable.get("valueFrom", {})
    }
    assert used == {"mine", "queue"}


def test_scaling_targets_exist_and_leave_replicas_alone():
    found = manifests("everything")
    scaled = of_kind(found, "ScaledObject", "HorizontalPodAutoscaler")
    assert len(scaled) == 3
    for one in scaled:
        reference = one["spec"]["scaleTargetRef"]
        target = named(found, reference["kind"], reference["name"])
        assert target["apiVersion"] == reference["apiVersion"] and "replicas" not in target["spec"]


def test_another_image_is_another_demo_job():
    jobs = []
    for tag in ("0.1.0", "0.1.1"):
        found = render(merged(read("kind"), {"image": {"tag": tag, "registry": "registry.example/ml/"}}))
        jobs += [one for one in of_kind(found, "Job") if "-demo-" in one["metadata"]["name"]]
    assert len({one["metadata"]["name"] for one in jobs}) == 2
    image = jobs[0]["spec"]["template"]["spec"]["containers"][0]["image"]
    assert image == "registry.example/ml/rlif-trainer:0.1.0"


# ---- bad values ------------------------------------------------------------------------------------------------

BAD = {
    "rollout.replica": ({"rollout": {"replica": 2}}, "replica"),
    "rollout.replicas": ({"rollout": {"replicas": 0}}, "rollout/replicas"),
    "image.tag": ({"image": {"tag": "latest"}}, "image/tag"),
    "trainer.image.tag": ({"trainer": {"image": {"tag": "latest"}}}, "trainer/image/tag"),
    "reward.image.digest": ({"reward": {"image": {"digest": "sha256:12"}}}, "reward/image/digest"),
    "rollout.resources": ({"rollout": {"resources": {"limits": {"memory": None}}}}, "rollout/resources/limits"),
    "redis.size": ({"redis": {"size": "ten"}}, "redis/size"),
    "storage.run.accessModes": ({"storage": {"run": {"accessModes": ["ReadOnlyMany"]}}}, "storage/run/accessModes"),
    "recipe.rollout.urls": ({"recipe": {"rollout": {"urls": ["http://x"]}}}, "recipe/rollout/urls"),
    "recipe.queue.url": ({"recipe": {"queue": {"url": "redis://:secret@x"}}}, "recipe/queue/url"),
    "overrides": ({"overrides": ["queue.url=redis://:secret@x"]}, "overrides/0"),
    "overrides, a mapping": ({"overrides": ["queue={url: redis://:secret@x}"]}, "overrides/0"),
    "dns": ({"networkPolicy": {"dns": []}}, "networkPolicy/dns"),
    "prometheus": ({"networkPolicy": {"prometheus": []}}, "networkPolicy/prometheus"),
    "hubPeers": ({"networkPolicy": {"hubPeers": []}}, "networkPolicy/hubPeers"),
    "redisPorts": ({"networkPolicy": {"redisPorts": []}}, "networkPolicy/redisPorts"),
    "unknown": ({"trainers": {}}, "trainers"),
    "autoscaling.by": ({"rollout": {"autoscaling": {"by": "lag"}}}, "rollout/autoscaling/by"),
    "two recipes": ({"recipeFile": "run: {name: a}"}, "recipe, recipeFile"),
    "external redis": ({"redis": {"enabled": False}}, "redis.existingSecret"),
    "ranks and GPUs": ({"trainer": {"processesPerNode": 8}}, "trainer.processesPerNode"),
    "nodes and volumes": (
        {"trainer": {"nodes": 2}, "storage": {"run": {"accessModes": ["ReadWriteOnce"]}}},
        "storage.run",
    ),
    "replicas": (
        {"reward": {"autoscaling": {"enabled": True, "minReplicas": 5, "maxReplicas": 2}}},
        "reward.autoscaling",
    ),
    "vllm without GPUs": ({"rollout": {"gpus": 0}}, "rollout.gpus"),
    "groups of the engine that a recipe has by itself": (
        {"recipe": {"rollout": {"engine": None}}, "rollout": {"nodesPerReplica": 2}},
        "nodesPerReplica",
    ),
    "groups of one device": (
        {"overrides": ["rollout.engine=transformers"], "rollout": {"nodesPerReplica": 2}},
        "nodesPerReplica",
    ),
    "a name without the hub": ({"hub": {"enabled": False}}, "hub.enabled"),
    "a secret in the open": (
        {"trainer": {"extraEnv": [{"name": "WANDB_API_KEY", "value": "secret@"}]}},
        "trainer/extraEnv/0",
    ),
    "trainer.resumeFrom": ({"trainer": {"resumeFrom": "exported"}}, "trainer/resumeFrom"),
    "deltas over several nodes": (
        {"rollout": {"nodesPerReplica": 2}, "overrides": ["weights.transport=delta"]},
        "weights.mirror_dir",
    ),
    "keda": ({"rollout": {"autoscaling": {"enabled": True}}}, "rollout.autoscaling.prometheusUrl"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_values_are_refused_by_name(bad):
    values, name = BAD[bad]
    with pytest.raises(helm_python.HelmError) as refused:
        render(merged(read("one-node"), values))
    assert name in str(refused.value).replace(".", "/") or name in str(refused.value), refused.value
    assert "secret@" not in str(refused.value)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({}, "recipe.run.name"),
        ({"recipeFile": "model: {}"}, "recipe.run.name"),
        ({"recipeFile": "run: ["}, "recipeFile"),
        (
            {"recipeFile": "run: {name: a}\nqueue: {url: redis://:secret@x}"},
            "recipeFile: queue.url may hold a password",
        ),
    ],
)
def test_a_missing_or_broken_recipe_is_refused_by_name(values, name):
    with pytest.raises(helm_python.HelmError, match=name):
        render(values)


def test_every_value_has_a_schema_and_every_values_file_passes():
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert set(schema["properties"]) - {"global"} == set(chart_values())
    for name in NAMES:
        render(read(name))
