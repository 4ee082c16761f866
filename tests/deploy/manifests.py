"""The chart rendered by Helm's own engine, and what the tests ask of its manifests."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import helm_python
import yaml

ROOT = Path(__file__).parent.parent.parent
CHART = ROOT / "k8s" / "rlif"
FILES = sorted((ROOT / "k8s" / "values").glob("*.yaml"))
NAMES = [path.stem for path in FILES]
RELEASE, NAMESPACE = "rlif", "ml"

WORKLOADS = ("Deployment", "StatefulSet", "Job", "Pod", "LeaderWorkerSet")
Manifest = dict[str, Any]


@cache
def chart() -> helm_python.Chart:
    return helm_python.Chart.load(CHART)


def read(name: str) -> dict[str, Any]:
    """The values file `name` of k8s/values."""
    return yaml.safe_load((ROOT / "k8s" / "values" / f"{name}.yaml").read_text())


def merged(*trees: dict[str, Any]) -> dict[str, Any]:
    """The last one wins, key by key."""
    result: dict[str, Any] = {}
    for tree in trees:
        for key, value in tree.items():
            both = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = merged(result[key], value) if both else value
    return result


EVERYTHING: dict[str, Any] = {
    "imagePullSecrets": [{"name": "registry"}],
    "image": {"registry": "registry.example/ml"},
    "overrides": ["trainer.steps=7"],
    "hub": {"existingSecret": "hub", "cacheClaim": "hub"},
    "storage": {"data": {"existingClaim": "data"}, "models": {"existingClaim": "models"}},
    "rollout": {
        "nodesPerReplica": 2,
        "gpus": 8,
        "replicas": 2,
        "autoscaling": {"enabled": True, "prometheusUrl": "http://prometheus:9090", "maxReplicas": 3},
        "topologySpreadConstraints": [
            {"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway"}
        ],
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "affinity": {"podAntiAffinity": {}},
    },
    "reward": {"autoscaling": {"enabled": True, "by": "pods"}, "image": {"digest": "sha256:" + "0" * 64}},
    "sandbox": {
        "enabled": True,
        "runtimeClassName": "gvisor",
        "userNamespace": True,
        "procMount": "Unmasked",
        "autoscaling": {"enabled": True, "by": "cpu"},
    },
    "monitoring": {"enabled": True, "labels": {"release": "prometheus"}},
    "dashboards": {"enabled": True},
}
"""Every option that adds a manifest or a field, on top of five-nodes-7b."""


def secret(name: str, of: str) -> list[dict[str, Any]]:
    """`extraEnv` with one variable out of a Secret."""
    return [{"name": name, "valueFrom": {"secretKeyRef": {"name": of, "key": "key"}}}]


WATCHED: dict[str, Any] = {
    "orchestrator": {"extraEnv": secret("RLIF_WEBHOOK_TOKEN", "hooks")},
    "reward": {"extraEnv": secret("RLIF_KEY_JUDGE", "judge")},
    "trainer": {"extraEnv": secret("WANDB_API_KEY", "wandb"), "resumeFrom": "/models/exported"},
    "storage": {"models": {"existingClaim": "models"}, "data": {"existingClaim": "data"}},
    "networkPolicy": {
        f"{part}Egress": [{"to": [{"ipBlock": {"cidr": "10.9.0.0/16"}}], "ports": [{"port": port, "protocol": "TCP"}]}]
        for part, port in (("rollout", 4318), ("reward", 8443), ("orchestrator", 8080), ("trainer", 5000))
    },
    "recipe": {
        "weights": {"transport": "delta", "in_flight": "keep"},
        "evaluation": {
            "data": {"path": "/data/test.jsonl", "fields": {"prompt": "problem", "answer": "answer"}},
            "every": 10,
            "rewards": [{"name": "math_verify"}],
        },
        "guard": {"action": "roll_back", "webhook": "https://hooks.example/rlif"},
        "tracking": {"wandb": {"project": "math"}, "mlflow": {"uri": "http://mlflow:5000"}, "samples_every": 10},
    },
}
"""A recipe with everything that looks on, deltas, and what they need, on top of one-node."""

CASES: dict[str, dict[str, Any]] = {name: read(name) for name in NAMES}
CASES["everything"] = merged(CASES["five-nodes-7b"], EVERYTHING)
CASES["watched"] = merged(CASES["one-node"], WATCHED)
CASES["external-redis"] = merged(CASES["one-node"], {"redis": {"enabled": False, "existingSecret": "queue"}})


def render(values: dict[str, Any]) -> list[Manifest]:
    """Raises helm_python.HelmError."""
    texts = chart().render(values, name=RELEASE, namespace=NAMESPACE)
    return [
        document
        for path, text in sorted(texts.items())
        if not path.endswith("NOTES.txt")
        for document in yaml.safe_load_all(text)
        if document
    ]


@cache
def manifests(case: str) -> list[Manifest]:
    return render(CASES[case])


def of_kind(found: list[Manifest], *kinds: str) -> list[Manifest]:
    return [manifest for manifest in found if manifest["kind"] in kinds]


def named(found: list[Manifest], kind: str, name: str) -> Manifest:
    (one,) = [manifest for manifest in found if manifest["kind"] == kind and manifest["metadata"]["name"] == name]
    return one


def templates(workload: Manifest) -> list[Manifest]:
    """The pod templates of a workload: metadata and spec."""
    spec = workload["spec"]
    if workload["kind"] == "Pod":
        return [workload]
    if workload["kind"] == "LeaderWorkerSet":
        group = spec["leaderWorkerTemplate"]
        return [
            merged(group[f"{role}Template"], {"metadata": {"labels": {"leaderworkerset.sigs.k8s.io/worker-index": n}}})
            for role, n in (("leader", "0"), ("worker", "1"))
        ]
    return [spec["template"]]


def pods(found: list[Manifest]) -> list[tuple[str, Manifest]]:
    """Every pod template with the name of its workload."""
    return [
        (f"{workload['kind']}/{workload['metadata']['name']}", template)
        for workload in of_kind(found, *WORKLOADS)
        for template in templates(workload)
    ]


def containers(template: Manifest) -> Iterator[Manifest]:
    yield from template["spec"].get("initContainers", [])
    yield from template["spec"]["containers"]


def part(template: Manifest) -> str:
    return template["metadata"]["labels"]["app.kubernetes.io/component"]


def matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """A label selector, as in policies and monitors."""
    for expression in selector.get("matchExpressions", []):
        is_in = labels.get(expression["key"]) in expression["values"]
        assert expression["operator"] == "In", expression
        if not is_in:
            return False
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
