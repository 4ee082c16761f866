"""A real run, watched: by a real Prometheus with our rules, by an OTLP receiver, and by its logs."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from audit import read_steps
from faults.faulty_run import Run, write_recipe
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from served import two_free_ports
from test_dashboards import ALERTS, ROOT, RULES, targets

from services.contract import Version
from services.logs import JsonLines
from services.orchestrator.progress import lag
from services.traces import start

pytestmark = [pytest.mark.alone, pytest.mark.timeout(600)]

PARTS = {"orchestrator", "rollout", "reward", "trainer"}
SECONDS = 120.0


# ---- what receives spans ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    name: str
    service: str
    instance: str
    trace_id: str
    span_id: str
    parent_id: str
    links: set[str]
    attributes: dict[str, Any]


def value_of(value: Any) -> Any:
    kind = value.WhichOneof("value")
    return [value_of(item) for item in value.array_value.values] if kind == "array_value" else getattr(value, kind)


def attributes_of(message: Any) -> dict[str, Any]:
    return {pair.key: value_of(pair.value) for pair in message.attributes}


def spans_of(body: bytes) -> Iterator[Span]:
    for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
        of = attributes_of(resource.resource)
        for span in (span for scope in resource.scope_spans for span in scope.spans):
            yield Span(
                name=span.name,
                service=of["service.name"],
                instance=of["service.instance.id"],
                trace_id=span.trace_id.hex(),
                span_id=span.span_id.hex(),
                parent_id=span.parent_span_id.hex(),
                links={link.span_id.hex() for link in span.links},
                attributes=attributes_of(span),
            )


@contextmanager
def receiving_spans() -> Iterator[tuple[str, list[Span]]]:
    spans: list[Span] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces" and self.headers["Content-Type"] == "application/x-protobuf"
            spans.extend(spans_of(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", spans
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


# ---- the run ---------------------------------------------------------------------------------------------------


@dataclass
class Watched:
    """`answers`: what Prometheus said while the run went on, by query; none where there is no Prometheus."""

    dir: Path
    spans: list[Span]
    recipe: dict[str, Any]
    ready: dict[str, Any] = field(default_factory=dict)
    answers: dict[str, list[dict[str, Any]]] | None = None
    rules: list[dict[str, Any]] = field(default_factory=list)

    def lines(self, part: str) -> list[str]:
        return [line for path in self.dir.glob(f"logs/{part}*.log") for line in path.read_text().splitlines()]


QUERIES = [
    "up",
    "ALERTS",
    'rlif_trainer_component{component="self_certainty"}',
    'rlif_trainer_accuracy_ratio{component="exact_match"}',
    'rlif_queue_groups{state="queued"}',
    "rlif_weight_lag_versions",
    "rlif_weight_sync_seconds_count > 0",
    'rlif_reward_scores_total{reward="exact_match"} > 0',
    'rlif_http_requests_total{route="/v1/rollouts"} > 0',
    "rlif_rollout_call_completions_count > 0",
    "rlif_scorer_round_calls_count > 0",
    # This run is neither evaluated nor guarded.
    *(
        expression.replace("$__rate_interval", "20s")
        for name, expression, _ in targets()
        if name.startswith("run: ") and not re.search("rlif_(evaluation|guard)_", expression)
    ),
]


@pytest.fixture(scope="module")
def watched(tiny_model, tmp_path_factory) -> Watched:
    """Some steps of a run, stopped by a signal when everybody has seen enough of it."""
    folder = tmp_path_factory.mktemp("watched")
    path = write_recipe(folder, tiny_model, "run")
    with two_free_ports() as port, receiving_spans() as (endpoint, spans), pytest.MonkeyPatch.context() as environment:
        tree = yaml.safe_load(path.read_text())
        tree["tracking"]["metrics_port"] = port
        tree["trainer"]["steps"] = 500
        path.write_text(yaml.safe_dump(tree))
        for name, value in {
            "RLIF_LOG_FORMAT": "json",
            "RLIF_TRACES": "1",
            "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
            "OTEL_BSP_SCHEDULE_DELAY": "300",
        }.items():
            environment.setenv(name, value)
        run = Run(path, folder / "run")
        try:
            run.wait_step(3)
            filled = yaml.safe_load((run.dir / "recipe.yaml").read_text())
            found = Watched(run.dir, spans, filled)
            found.ready = {at: httpx.get(f"http://127.0.0.1:{at}/readyz").json() for at in (port, port + 1)}
            if shutil.which("prometheus"):
                with prometheus(folder, filled) as url:
                    found.answers = ask_until_seen(url, run)
                    answer = httpx.get(f"{url}/api/v1/rules").json()
                    found.rules = [rule for group in answer["data"]["groups"] for rule in group["rules"]]
            run.process.terminate()
            assert run.finish(90) == 143, run.screen()
        finally:
            run.close()
    return found


@contextmanager
def prometheus(folder: Path, recipe: dict[str, Any]) -> Iterator[str]:
    """With the configuration of docs/observability.md, but for the addresses and a faster pace."""
    page = (ROOT / "docs" / "observability.md").read_text()
    (block,) = (block for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if "scrape_configs" in block)
    config = yaml.safe_load(block)
    assert [str(ROOT / path) for path in config["rule_files"]] == [str(ALERTS)]
    config["rule_files"] = [str(ALERTS)]
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    metrics_port = recipe["tracking"]["metrics_port"]
    places = {
        "rollout": recipe["rollout"]["urls"],
        "reward": recipe["scorer"]["urls"],
        "trainer": [f"http://127.0.0.1:{metrics_port}"],
        "orchestrator": [f"http://127.0.0.1:{metrics_port + 1}"],
    }
    for job in config["scrape_configs"]:
        job["static_configs"] = [
            {"targets": [url.removeprefix("http://") for url in places[job["job_name"].removeprefix("rlif-")]]}
        ]
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    with two_free_ports() as port, (folder / "prometheus.log").open("wb") as out:
        address = f"127.0.0.1:{port}"
        argv = ["prometheus", f"--config.file={path}", f"--web.listen-address={address}", "--log.level=warn"]
        argv.append(f"--storage.tsdb.path={folder / 'prometheus'}")
        process = subprocess.Popen(argv, stdout=out, stderr=out)
        try:
            yield f"http://{address}"
        finally:
            process.terminate()
            process.wait(30)


def ask_until_seen(url: str, run: Run) -> dict[str, list[dict[str, Any]]]:
    """The answers to QUERIES, once each but ALERTS has one, and all targets have answered."""
    ends = time.monotonic() + SECONDS
    while True:
        assert run.process.poll() is None, run.screen()
        answers = {}
        try:
            for query in QUERIES:
                answer = httpx.get(f"{url}/api/v1/query", params={"query": query}, timeout=10).json()
                assert answer["status"] == "success", answer
                answers[query] = answer["data"]["result"]
        except httpx.TransportError:
            pass
        missing = [query for query in QUERIES if query != "ALERTS" and not answers.get(query)]
        if not missing and [item["value"][1] for item in answers["up"]] == ["1"] * len(PARTS):
            return answers
        assert time.monotonic() < ends, f"Prometheus has nothing for {missing}: {answers.get('up')}\n{run.screen()}"
        time.sleep(0.5)


# ---- Prometheus ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_prometheus_sees_all_of_a_run_and_nothing_to_alert_of(watched):
    if watched.answers is None:
        pytest.skip("prometheus is not installed")
    assert {item["metric"]["job"] for item in watched.answers["up"]} == {f"rlif-{part}" for part in PARTS}
    assert watched.answers["ALERTS"] == []
    assert {rule["name"] for rule in watched.rules} == {rule["alert"] for rule in RULES}
    assert {rule["health"] for rule in watched.rules} == {"ok"}
    phases = {(at["metric"]["service"], at["metric"]["phase"]) for at in watched.answers[QUERIES[6]]}
    servers = {(service, phase) for service in ("rollout", "reward") for phase in ("verify", "load")}
    rollout = {("rollout", "pause"), ("rollout", "swap")}
    assert phases == servers | rollout | {("trainer", "write"), ("trainer", "announce")}
    assert {at["metric"]["service"] for at in watched.answers["rlif_weight_lag_versions"]} == {"rollout", "reward"}


@pytest.mark.parametrize(
    "newest, served, versions",
    [
        (None, None, 0),
        ((0, 5), (0, 5), 0),
        ((0, 5), (0, 3), 2),
        ((0, 5), (0, 6), 0),  # its heartbeat was faster than the news
        ((0, 2), None, 3),  # the base model
        ((1, 3), (0, 5), 1),  # the trainer went back to a checkpoint
    ],
)
def test_a_replica_lags_by_what_it_does_not_serve_yet(newest, served, versions):
    of = [None if pair is None else Version(lineage=pair[0], version=pair[1]) for pair in (newest, served)]
    assert lag(*of) == versions


@pytest.mark.slow
def test_trainer_and_orchestrator_were_ready(watched):
    assert [set(answer["dependencies"]) for answer in watched.ready.values()] == [
        {"redis", "model", "groups"},
        {"redis", "weights"},
    ]
    assert {answer["status"] for answer in watched.ready.values()} == {"ready"}


# ---- logs ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_line_is_json_with_a_time_in_utc(watched):
    for part in PARTS:
        lines = watched.lines(part)
        assert lines
        for text in lines:
            line = json.loads(text)
            assert line["service"] == part and line["message"] and line["level"] == line["level"].lower()
            assert line["time"].endswith("Z")
            age = datetime.now(UTC) - datetime.fromisoformat(line["time"])
            assert 0 <= age.total_seconds() < 600


@pytest.mark.slow
def test_one_group_can_be_followed_through_all_services(watched):
    group = read_steps(watched.dir)[1]["group_ids"][0]
    seen = {part: [json.loads(text) for text in watched.lines(part) if group in text] for part in PARTS}
    seen = {part: [line for line in lines if line.get("group_id") == group] for part, lines in seen.items()}
    assert {part: [line["message"] for line in lines] for part, lines in seen.items()} == {
        "rollout": [f"group {group} is generated"],
        "reward": [f"group {group} is scored"],
        "orchestrator": [f"group {group} is pushed"],
        "trainer": [f"group {group} is trained"],
    }
    lines = {part: lines[0] for part, lines in seen.items()}
    assert {line["weight_version"] for line in lines.values()} == {"0.1"}
    assert lines["trainer"]["step"] == 2 and lines["reward"]["scorer_weight_version"] == "0.1"
    assert len({lines[part]["request_id"] for part in ("orchestrator", "rollout", "reward")}) == 1
    assert len({lines[part]["trace_id"] for part in ("orchestrator", "rollout", "reward")}) == 1
    assert len({lines[part]["spec_id"] for part in ("orchestrator", "reward", "trainer")}) == 1


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=env)


def test_what_others_write_is_json_too():
    code = """
import logging, sys, warnings
from services import logs
logs.configure(service="reward")
other = logging.getLogger("other")
other.addHandler(logging.StreamHandler())   # as DeepSpeed and transformers do
other.propagate = False
other.warning("two\\nlines")
logging.getLogger("a").warning("half a character: \\ud83d")
logging.getLogger("a").warning("%s and %s", "one")
print("plain", "words")
print('{"already": "json"}')
sys.stdout.write("not ended")
warnings.warn("old")
sys.stdout.write(" yet\\n")
raise KeyError("gone")
"""
    done = run_python(code, RLIF_LOG_FORMAT="json")
    lines = [json.loads(text) for text in (done.stdout + done.stderr).splitlines()]
    messages = [line.get("message", "") for line in lines]
    assert done.returncode == 1
    # Also what looks like our own: a program could print a line in any logger's name.
    assert {(line["logger"], line["message"]) for line in lines} >= {("stdout", '{"already": "json"}')}
    assert {"two", "lines", "plain words", "not ended yet", "half a character: \\ud83d"} <= set(messages)
    assert any(message.startswith("%s and %s (1 arguments") for message in messages)
    assert any("UserWarning: old" in message for message in messages)
    crash = lines[-1]
    assert crash["level"] == "critical" and "KeyError" in crash["exception"] and crash["service"] == "reward"


def test_a_message_in_a_text_log_begins_no_line():
    said = "12:00:00 ERROR   services.supervisor forged\\r\\x1b[2J"
    code = f"import logging; from services import logs; logs.configure(); logging.warning('a\\n{said}')"
    first, second = run_python(code, RLIF_LOG_FORMAT="text").stderr.splitlines()
    assert first.endswith("root a")
    assert second == "    12:00:00 ERROR   services.supervisor forged\\x0d\\x1b[2J"


def test_text_logs_leave_the_lines_of_groups_out():
    code = "from services import logs, trail; logs.configure(); trail.note('is here', 'g1')"
    assert run_python(code, RLIF_LOG_FORMAT="text").stderr == ""
    assert "group g1 is here" in run_python(code, RLIF_LOG_FORMAT="text", RLIF_LOG_LEVEL="DEBUG").stderr
    refused = run_python("from services import logs; logs.configure()", RLIF_LOG_FORMAT="xml").stderr
    assert "RLIF_LOG_FORMAT xml: choose text or json" in refused


def test_vllm_logs_json_where_it_is_asked_to():
    import logging.config

    from services import vllm_process

    config = json.loads(vllm_process.JSON_LOGGING.read_text())
    assert config["disable_existing_loggers"] is False and set(config["loggers"]) == {"vllm"}
    logging.config.dictConfig(config)
    try:
        (handler,) = logging.getLogger("vllm").handlers
        assert isinstance(handler.formatter, JsonLines)
    finally:
        logging.getLogger("vllm").handlers.clear()


# ---- traces ----------------------------------------------------------------------------------------------------

WAY = {  # span -> (service, name of its parent)
    "chunk": ("orchestrator", None),
    "rollout call": ("orchestrator", "chunk"),
    "POST /v1/rollouts": ("rollout", "rollout call"),
    "generate": ("rollout", "POST /v1/rollouts"),
    "reward call": ("orchestrator", "chunk"),
    "POST /v1/rewards": ("reward", "reward call"),
    "score tokens": ("reward", "POST /v1/rewards"),
    "scorer round": ("reward", "score tokens"),
    "queue push": ("orchestrator", "chunk"),
}


@pytest.mark.slow
def test_one_trace_crosses_three_processes_and_the_trainer_links_to_it(watched):
    group = read_steps(watched.dir)[1]["group_ids"][0]
    (push,) = (
        span for span in watched.spans if span.attributes.get("rlif.group_id") == group and span.name == "queue push"
    )
    trace = [span for span in watched.spans if span.trace_id == push.trace_id]
    assert {span.name for span in trace} == set(WAY)
    assert len({span.instance for span in trace}) == 3
    by_id = {span.span_id: span for span in trace}
    for span in trace:
        service, parent = WAY[span.name]
        assert span.service == f"rlif-{service}"
        assert (by_id[span.parent_id].name if span.parent_id else None) == parent
    (chunk,) = (span for span in trace if span.name == "chunk")
    assert group in chunk.attributes["rlif.group_ids"] and chunk.attributes["rlif.weight_version"] == "0.1"
    assert chunk.attributes["rlif.spec"] == "kill"
    (step,) = (span for span in watched.spans if span.name == "train step" and span.attributes["rlif.step"] == 2)
    assert step.service == "rlif-trainer" and push.span_id in step.links
    assert set(step.attributes["rlif.group_ids"]) == set(read_steps(watched.dir)[1]["group_ids"])
    assert len(step.links) == len(step.attributes["rlif.group_ids"])


@pytest.mark.slow
def test_probes_and_scrapes_are_not_traced(watched):
    assert {span.name for span in watched.spans if span.name.startswith("GET")} <= {
        "GET /v1/model",
        "GET /v1/specs/{name}",
    }


def test_untraced_processes_do_not_import_opentelemetry():
    code = """
import sys
sys.modules["opentelemetry"] = None
from services import traces
from services.cli.watch import watch
import services.orchestrator.run, reward_server.app, rollout_server.app
watch("reward")
with traces.span("a", group_id="b") as span:
    assert span is None and traces.here() == ""
traces.describe("c", {})
assert not [name for name in sys.modules if name.startswith("opentelemetry.")]
"""
    done = run_python(code, RLIF_TRACES="0")
    assert done.returncode == 0, done.stderr


def test_traces_that_cannot_be_are_refused(monkeypatch):
    code = "import sys; sys.argv = ['rlif', 'serve', 'reward']; from services.cli.main import main; main()"
    refused = run_python(code, RLIF_TRACES="yes")
    assert (refused.returncode, refused.stderr) == (2, "rlif: RLIF_TRACES yes: choose 1 (trace) or 0\n")
    monkeypatch.setenv("RLIF_TRACES", "1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(ValueError, match="OTEL_EXPORTER_OTLP_PROTOCOL grpc: spans leave as http/protobuf alone"):
        start("reward")
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_PROTOCOL")
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", None)
    with pytest.raises(ValueError, match=r"install the extra rlif\[otel\]"):
        start("reward")
