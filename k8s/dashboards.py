"""The Grafana dashboards, panel by panel.

    python k8s/dashboards.py

writes k8s/rlif/files/dashboards/*.json anew; edit here, not there. Each panel is a title, a unit of Grafana's, and
queries with their legends. The variable `filter` narrows every query, to one run's namespace or instance for example.
"""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "rlif" / "files" / "dashboards"
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH, HEIGHT = 8, 7
"""Of one panel; a dashboard is 24 wide."""

Panel = tuple[str, str, dict[str, str]]
"""Title, unit, {query: legend}."""


def mean(metric: str, *by: str) -> str:
    """Of a histogram or a summary, over a while."""
    labels = f" by ({', '.join(by)})" if by else ""
    return f"sum{labels} (rate({metric}_sum[$__rate_interval])) / sum{labels} (rate({metric}_count[$__rate_interval]))"


def quantile(q: float, metric: str, *by: str, where: str = "") -> str:
    chosen = f"{{{where}}}" if where else ""
    return (
        f"histogram_quantile({q}, sum by ({', '.join(('le', *by))}) (rate({metric}_bucket{chosen}[$__rate_interval])))"
    )


def rate(metric: str, *by: str) -> str:
    return f"sum{' by (' + ', '.join(by) + ')' if by else ''} (rate({metric}[$__rate_interval]))"


WORK = 'route!~"/healthz|/readyz|/metrics|/docs|/openapi.json"'

RUN: list[Panel] = [
    ("Steps", "none", {"rlif_trainer_step": "done", "rlif_trainer_planned_steps": "planned"}),
    ("Reward", "none", {"rlif_trainer_reward": "mean"}),
    ("Components", "none", {"rlif_trainer_component": "{{component}}"}),
    ("Accuracy", "percentunit", {"rlif_trainer_accuracy_ratio": "{{component}}"}),
    (
        "Self-certainty",
        "none",
        {
            'sum(rate(rlif_reward_value_sum{reward="self_certainty"}[$__rate_interval])) / '
            'sum(rate(rlif_reward_value_count{reward="self_certainty"}[$__rate_interval]))': "nats a token",
        },
    ),
    ("Entropy", "none", {"rlif_trainer_entropy_nats": "nats a token"}),
    ("Completion length", "none", {"rlif_trainer_completion_length_tokens": "tokens"}),
    (
        "Completions",
        "percentunit",
        {"rlif_trainer_stopped_ratio": "ended by themselves", "rlif_trainer_valid_ratio": "have a usable reward"},
    ),
    ("KL to the reference", "none", {"rlif_trainer_kl_nats": "nats a token"}),
    (
        "Staleness of what is trained",
        "none",
        {"rlif_trainer_staleness_versions": "mean", "rlif_trainer_staleness_max_versions": "largest"},
    ),
    (
        "Clipped",
        "percentunit",
        {"rlif_trainer_clipped_ratio": "ratio", "rlif_trainer_importance_truncated_ratio": "importance weight"},
    ),
    ("Gradient norm", "none", {"rlif_trainer_gradient_norm": "before clipping"}),
    ("Seconds of a second, by phase", "none", {rate("rlif_trainer_phase_seconds_sum", "phase"): "{{phase}}"}),
    (
        "Diversity",
        "percentunit",
        {"rlif_trainer_distinct_bigrams_ratio": "distinct bigrams", "rlif_trainer_distinct_answers_ratio": "answers"},
    ),
    ("Evaluation", "none", {"rlif_evaluation_metric": "{{metric}}"}),
    ("Collapse guard: signals over their baseline", "none", {"rlif_guard_baseline_ratio": "{{signal}}"}),
    ("Collapse guard: alarms", "none", {"rlif_guard_alarm": "{{signal}}"}),
    (
        "Tokens a second",
        "none",
        {rate("rlif_trainer_tokens_total"): "trained", rate("rlif_rollout_tokens_total"): "made"},
    ),
    ("Groups a minute", "none", {f"60 * {rate('rlif_orchestrator_groups_total', 'outcome')}": "{{outcome}}"}),
]

SERVICES: list[Panel] = [
    (
        "Requests a second",
        "reqps",
        {rate(f"rlif_http_requests_total{{{WORK}}}", "service", "route"): "{{service}} {{route}}"},
    ),
    (
        "Latency",
        "s",
        {
            quantile(0.5, "rlif_http_request_seconds", "service", where=WORK): "{{service}} p50",
            quantile(0.95, "rlif_http_request_seconds", "service", where=WORK): "{{service}} p95",
        },
    ),
    (
        "Errors a second",
        "reqps",
        {rate('rlif_http_requests_total{status=~"[45].."}', "service", "status"): "{{service}} {{status}}"},
    ),
    ("Seconds of a reward", "s", {quantile(0.95, "rlif_reward_seconds", "reward"): "{{reward}} p95"}),
    (
        "Batch size",
        "none",
        {
            mean("rlif_rollout_call_completions"): "completions of an engine call",
            mean("rlif_scorer_round_calls"): "calls of a scorer round",
        },
    ),
    (
        "Waiting",
        "none",
        {
            "sum by (service) (rlif_http_requests_in_flight)": "{{service}}: requests in flight",
            "sum(rlif_scorer_waiting_calls)": "calls of the scorer",
            "sum by (lane) (rlif_verifier_waiting_checks)": "checks, {{lane}} lane",
            "sum(rlif_sandbox_waiting_programs)": "programs",
        },
    ),
    ("Queue depth", "none", {"rlif_queue_groups": "{{state}}"}),
    ("Age of the oldest group", "s", {"rlif_queue_oldest_age_seconds": "not acknowledged"}),
    ("Outcomes a second", "none", {rate("rlif_reward_scores_total", "reward", "outcome"): "{{reward}} {{outcome}}"}),
    (
        "Failures a minute, by cause",
        "none",
        {
            f"60 * {rate('rlif_orchestrator_retries_total', 'service', 'cause')}": "retries: {{service}} {{cause}}",
            f"60 * {rate('rlif_scorer_failures_total', 'reason')}": "scorer: {{reason}}",
            f"60 * {rate('rlif_verifier_kills_total', 'reason')}": "verifier: {{reason}}",
            f"60 * {rate('rlif_weight_versions_refused_total', 'service')}": "weights refused: {{service}}",
        },
    ),
    ("Weight versions behind", "none", {"rlif_weight_lag_versions": "{{replica}}"}),
    (
        "Weight version",
        "none",
        {"rlif_weight_published_version": "published", "rlif_weight_version": "{{service}} {{instance}}"},
    ),
    ("Weight sync, by phase", "s", {mean("rlif_weight_sync_seconds", "service", "phase"): "{{service}} {{phase}}"}),
    ("Call of a server", "s", {quantile(0.95, "rlif_orchestrator_call_seconds", "service"): "{{service}} p95"}),
    ("Up", "none", {'up{job=~"rlif-.*"}': "{{job}} {{instance}}"}),
]

GPU: list[Panel] = [
    ("GPU busy", "percent", {"DCGM_FI_DEV_GPU_UTIL": "{{Hostname}} {{gpu}}"}),
    ("Tensor cores active", "percentunit", {"DCGM_FI_PROF_PIPE_TENSOR_ACTIVE": "{{Hostname}} {{gpu}}"}),
    (
        "Memory used",
        "percentunit",
        {"DCGM_FI_DEV_FB_USED / (DCGM_FI_DEV_FB_USED + DCGM_FI_DEV_FB_FREE)": "{{Hostname}} {{gpu}}"},
    ),
    ("Power", "watt", {"DCGM_FI_DEV_POWER_USAGE": "{{Hostname}} {{gpu}}"}),
    ("Temperature", "celsius", {"DCGM_FI_DEV_GPU_TEMP": "{{Hostname}} {{gpu}}"}),
    ("Last XID error", "none", {"DCGM_FI_DEV_XID_ERRORS": "{{Hostname}} {{gpu}}"}),
    (
        "vLLM: requests",
        "none",
        {"vllm:num_requests_running": "{{instance}} running", "vllm:num_requests_waiting": "{{instance}} waiting"},
    ),
    ("vLLM: KV cache used", "percentunit", {"vllm:kv_cache_usage_perc": "{{instance}}"}),
    (
        "vLLM: tokens a second",
        "none",
        {rate("vllm:generation_tokens_total"): "generated", rate("vllm:prompt_tokens_total"): "prompt"},
    ),
    ("vLLM: time to the first token", "s", {quantile(0.95, "vllm:time_to_first_token_seconds"): "p95"}),
    (
        "vLLM: prefix cache hits",
        "percentunit",
        {f"{rate('vllm:prefix_cache_hits_total')} / {rate('vllm:prefix_cache_queries_total')}": "hits"},
    ),
    ("vLLM: preemptions a second", "none", {rate("vllm:num_preemptions_total"): "preemptions"}),
]

DASHBOARDS = {
    "run": ("rlif: the run", "What the model learns, step by step.", RUN),
    "services": ("rlif: services", "Servers, queue and weights.", SERVICES),
    "gpu": ("rlif: GPUs", "NVIDIA's DCGM exporter, and the vLLM of the rollout servers.", GPU),
}


def panel(number: int, title: str, unit: str, queries: dict[str, str]) -> dict[str, Any]:
    column, row = number % (24 // WIDTH), number // (24 // WIDTH)
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": title,
        "datasource": DATASOURCE,
        "gridPos": {"x": column * WIDTH, "y": row * HEIGHT, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": unit, "custom": {"spanNulls": True}}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + place), "datasource": DATASOURCE, "expr": query, "legendFormat": legend}
            for place, (query, legend) in enumerate(queries.items())
        ],
    }


def dashboard(name: str, title: str, description: str, panels: list[Panel]) -> dict[str, Any]:
    return {
        "uid": f"rlif-{name}",
        "title": title,
        "description": description,
        "tags": ["rlif"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"},
                {"name": "filter", "type": "adhoc", "datasource": DATASOURCE, "label": "Only"},
            ]
        },
        "links": [{"type": "dashboards", "tags": ["rlif"], "title": "rlif", "asDropdown": True}],
        "panels": [panel(number, *one) for number, one in enumerate(panels)],
    }


def files() -> dict[str, str]:
    """File name -> JSON."""
    return {f"{name}.json": json.dumps(dashboard(name, *rest), indent=1) + "\n" for name, rest in DASHBOARDS.items()}


if __name__ == "__main__":
    for name, text in files().items():
        (FOLDER / name).write_text(text)
