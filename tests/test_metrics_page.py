"""docs/metrics.md says what the registries hold, and the names keep to Prometheus' conventions."""

import metrics_page
import pytest
from prometheus_client import REGISTRY

PAGE = metrics_page.ROOT / "docs" / "metrics.md"
METRICS = metrics_page.metrics()
OTHER_UNITS = ("milli", "micro_s", "minutes", "hours", "percent", "_ms", "_kb", "_mb", "kilo", "mega", "giga")
LABELS = set(
    "service replica engine route status run state outcome cause phase finish_reason reason lane "
    "signal action metric transport".split()
)
OF_THE_SPEC = {"reward", "component"}


def test_the_page_is_what_the_registries_give():
    assert PAGE.read_text() == metrics_page.page(), "run: python tests/metrics_page.py docs/metrics.md"


def test_no_metric_is_left_out():
    registered = {name for name in REGISTRY._names_to_collectors if name.startswith("rlif_")}
    series = {name for metric in METRICS for name in metric.series}
    assert series and {name for name in registered if not name.endswith("_created")} - series <= {
        metric.name.removesuffix("_total") for metric in METRICS
    }


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_names_keep_to_the_conventions(metric):
    assert metric.name.startswith("rlif_") and metric.name.islower()
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert not [unit for unit in OTHER_UNITS if unit in metric.name]
    assert set(metric.labels) <= LABELS | OF_THE_SPEC, "a new label: is it bounded?"
    assert metric.documentation[0].isupper() and not metric.documentation.endswith(".")
