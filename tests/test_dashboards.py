"""Dashboards and alert rules ask for what exists, in PromQL that parses and JSON of the shape that Grafana asks for."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import metrics_page
import pytest
import yaml

ROOT = metrics_page.ROOT
FOLDER = ROOT / "k8s" / "rlif" / "files" / "dashboards"
ALERTS = ROOT / "k8s" / "rlif" / "files" / "alerts" / "rlif.yaml"
DASHBOARDS = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}
RULES = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]

TARGET_LABELS = {"job", "instance", "namespace", "run", "le"}
DCGM = {  # counters of NVIDIA's DCGM exporter, as it is configured by default
    "DCGM_FI_DEV_GPU_UTIL",
    "DCGM_FI_DEV_FB_USED",
    "DCGM_FI_DEV_FB_FREE",
    "DCGM_FI_DEV_POWER_USAGE",
    "DCGM_FI_DEV_GPU_TEMP",
    "DCGM_FI_DEV_XID_ERRORS",
    "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE",
}
VLLM = {  # looked up in vLLM's source where that is installed
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:generation_tokens_total",
    "vllm:prompt_tokens_total",
    "vllm:prefix_cache_hits_total",
    "vllm:prefix_cache_queries_total",
    "vllm:num_preemptions_total",
    "vllm:time_to_first_token_seconds_bucket",
}
OURS = {series: metric for metric in metrics_page.metrics() for series in metric.series}
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


def targets():
    for name, board in DASHBOARDS.items():
        for panel in board["panels"]:
            for target in panel["targets"]:
                yield f"{name}: {panel['title']} {target['refId']}", target["expr"], target["legendFormat"]


def expressions() -> dict[str, str]:
    of_boards = {name: expr.replace("$__rate_interval", "5m") for name, expr, _ in targets()}
    return of_boards | {rule["alert"]: rule["expr"] for rule in RULES}


def names(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:rlif_\w+|DCGM_\w+|vllm:\w+|up\b)", re.sub(r'"[^"]*"', '""', expression)))


def labels(expression: str) -> set[str]:
    matched = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", expression)
    grouped = [label for part in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression) for label in part.split(",")]
    return {label.strip() for label in [*matched, *grouped] if label.strip()}


@pytest.mark.parametrize("expression", expressions().values(), ids=expressions())
def test_every_metric_and_label_exists(expression):
    found = names(expression)
    assert found, f"no metric in {expression!r}"
    assert not found - OURS.keys() - DCGM - VLLM - {"up"}
    known = {label for metric in found & OURS.keys() for label in OURS[metric].labels}
    assert not labels(expression) - known - TARGET_LABELS


def test_legends_name_labels_that_their_series_have():
    for name, expression, legend in targets():
        found = names(expression)
        known = {label for metric in found & OURS.keys() for label in OURS[metric].labels} | {"job", "instance"}
        known |= {"gpu", "Hostname"} if found & DCGM else set()
        grouped = re.findall(r"\bby \(([^)]*)\)", expression)
        if grouped:
            known = {label.strip() for part in grouped for label in part.split(",")}
        assert not set(re.findall(r"{{(\w+)}}", legend)) - known, f"{name}: {legend}"


def test_the_names_of_vllm_are_in_its_source():
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM is not installed")
    text = (Path(spec.origin).parent / "v1" / "metrics" / "loggers.py").read_text()
    assert not [name for name in VLLM if f'"{re.sub("_(total|bucket)$", "", name)}"' not in text]


@needs_promtool
def test_every_expression_parses(tmp_path):
    rules = [{"record": f"x{place}", "expr": expr} for place, expr in enumerate(expressions().values())]
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))
    done = subprocess.run(["promtool", "check", "rules", path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and f"{len(rules)} rules found" in done.stdout, done.stdout + done.stderr


def test_the_files_are_what_the_script_writes():
    spec = importlib.util.spec_from_file_location("dashboards", ROOT / "k8s" / "dashboards.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script
    spec.loader.exec_module(script)
    assert {path.name: path.read_text() for path in FOLDER.glob("*.json")} == script.files(), (
        "run: python k8s/dashboards.py"
    )


def test_dashboards_can_be_told_apart():
    assert set(DASHBOARDS) == {"run", "services", "gpu"}
    for key in ("uid", "title"):
        assert len({board[key] for board in DASHBOARDS.values()}) == len(DASHBOARDS)
    assert all(re.fullmatch(r"[a-z-]{1,40}", board["uid"]) for board in DASHBOARDS.values())


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboard_has_the_shape_that_grafana_asks_for(name):
    board = DASHBOARDS[name]
    assert board["schemaVersion"] >= 36 and board["panels"] and "id" not in board  # an id is of one Grafana alone
    variables = {variable["name"] for variable in board["templating"]["list"]}
    for key in ("id", "title"):
        assert len({panel[key] for panel in board["panels"]}) == len(board["panels"])
    taken = set()
    for panel in board["panels"]:
        assert panel["type"] == "timeseries" and panel["targets"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"} and "datasource" in variables
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        assert set(re.findall(r"\$(\w+)", json.dumps(panel["targets"]))) <= variables | {"__rate_interval"}
        at = panel["gridPos"]
        assert 0 <= at["x"] and at["x"] + at["w"] <= 24
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, f"{panel['title']} lies on another panel"
        taken |= cells
