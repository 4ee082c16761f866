"""docs/metrics.md from the registries: every metric that any module of rlif defines, by the process that has it.

    python tests/metrics_page.py docs/metrics.md

writes the page anew.
"""

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # from a checkout, whatever is installed
    sys.path.insert(0, str(ROOT))
PACKAGES = ("services", "reward_server", "rollout_server", "trainer")
SERVERS = "every process"
FOLDERS = {  # the longest that fits; who imports it has the metric
    "services/gate": SERVERS,
    "services/queue": "orchestrator, trainer",
    "services/orchestrator/": "orchestrator",
    "services/weights/publish": "trainer (rank 0)",
    "services/weights/sender": "trainer (rank 0)",
    "services/weights/follow": "reward server, rollout server",
    "services/weights/seconds": "reward server, rollout server, trainer (rank 0)",
    "reward_server/sandbox/": "sandbox server, reward server",
    "reward_server/": "reward server",
    "rollout_server/": "rollout server",
    "trainer/": "trainer (rank 0)",
}
HEAD = """\
# Metrics

<!-- Written by `python tests/metrics_page.py docs/metrics.md` from the registries: edit the metrics instead. -->

Every process serves these as Prometheus text on `/metrics`: the servers on their own port, the trainer on
`tracking.metrics_port`, the orchestrator on the next one. Beside them stand the `python_` and `process_` metrics of
prometheus_client and, on rollout servers with vLLM, vLLM's own (`vllm:`). Dashboards, alerts, and how to scrape:
[observability.md](observability.md).

Names follow Prometheus' conventions: base units, `_total` on counters, `_ratio` for shares of 1. A histogram `x` has
the series `x_bucket`, `x_sum` and `x_count`, a summary `x_sum` and `x_count`. Labels are bounded: by the code (route,
outcome, phase), by the reward spec (`reward`, `component`), or by the replicas that run (`replica`).
"""


@dataclass(frozen=True)
class Metric:
    """`name` as PromQL knows it, less the suffixes of histograms and summaries."""

    name: str
    kind: str
    labels: tuple[str, ...]
    documentation: str
    where: str

    @property
    def series(self) -> list[str]:
        suffixes = {"histogram": ("_bucket", "_sum", "_count"), "summary": ("_sum", "_count")}
        return [self.name + suffix for suffix in suffixes.get(self.kind, ("",))]


def sources() -> list[Path]:
    """The modules that define metrics, relative to the checkout."""
    paths = (path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return sorted(path.relative_to(ROOT) for path in paths if "from prometheus_client import" in path.read_text())


def metrics() -> list[Metric]:
    """By name. Imports every module that defines some."""
    found: dict[int, tuple[Any, Path]] = {}
    for path in sources():
        module = importlib.import_module(".".join(path.with_suffix("").parts))
        text = (ROOT / path).read_text()
        for collector in _collectors(vars(module)):
            if collector.describe()[0].name in text:  # else it is imported there
                found[id(collector)] = (collector, path)
    return sorted((_metric(*pair) for pair in found.values()), key=lambda metric: metric.name)


def _collectors(names: dict[str, Any]) -> Iterator[Any]:
    from prometheus_client.metrics import MetricWrapperBase

    for value in names.values():
        for item in value.values() if isinstance(value, dict) else [value]:
            if isinstance(item, MetricWrapperBase):
                yield item


def _metric(collector: Any, path: Path) -> Metric:
    (family,) = collector.describe()
    name = family.name + ("_total" if family.type == "counter" else "")
    folder = max((start for start in FOLDERS if str(path).startswith(start)), key=len, default=None)
    if folder is None:
        raise ValueError(f"{path} defines metrics: say in {Path(__file__).name} which process has them")
    labels = tuple(getattr(collector, "_labelnames", ()))
    return Metric(name, family.type, labels, family.documentation, FOLDERS[folder])


def page() -> str:
    rows: dict[str, list[Metric]] = {}
    for metric in metrics():
        rows.setdefault(metric.where, []).append(metric)
    parts = [HEAD]
    for where, those in sorted(rows.items(), key=lambda item: (item[0] != SERVERS, item[0])):
        parts.append(
            f"\n## {where[0].upper()}{where[1:]}\n\n| metric | kind | labels | what |\n| --- | --- | --- | --- |\n"
        )
        for metric in those:
            labels = ", ".join(f"`{label}`" for label in metric.labels)
            what = metric.documentation.replace("|", "\\|")
            parts.append(f"| `{metric.name}` | {metric.kind} | {labels} | {what} |\n")
    return "".join(parts)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page())
