"""OpenTelemetry spans where RLIF_TRACES=1; otherwise nothing, and OpenTelemetry is not even imported.

Where spans go, how many are kept, and what is said with them is up to OpenTelemetry's own variables
(OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_TRACES_SAMPLER, OTEL_RESOURCE_ATTRIBUTES, ...). They leave as OTLP over HTTP, in
batches, from a thread, and are dropped when nobody takes them. A span's place in its trace is a string, W3C's
`traceparent`: so it travels in the headers of requests and in the queue's entries.
"""

import os
import socket
import threading
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

HEADER = "traceparent"
PROTOCOL = "OTEL_EXPORTER_OTLP_PROTOCOL"
SPOKEN = "http/protobuf"

STOP_SECONDS = 5.0
"""How long a process that ends lets its spans leave; OpenTelemetry would give a lost collector 30 s."""

_provider: Any = None
_tracer: Any = None


def start(service: str) -> None:
    """Begin to trace this process if RLIF_TRACES=1 asks for it. Raises ValueError: a variable has a value that is not
    valid, or OpenTelemetry is not installed."""
    asked = os.environ.get("RLIF_TRACES", "")
    if asked in ("", "0"):
        return
    if asked != "1":
        raise ValueError(f"RLIF_TRACES {asked}: choose 1 (trace) or 0")
    if os.environ.get(PROTOCOL, SPOKEN) != SPOKEN:
        raise ValueError(f"{PROTOCOL} {os.environ[PROTOCOL]}: spans leave as {SPOKEN} alone; unset it")
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        raise ValueError(f"RLIF_TRACES 1: this needs `{error.name}`: install the extra rlif[otel]") from error

    instance = f"{socket.gethostname()}-{os.getpid()}"
    resource = Resource.create({"service.name": f"rlif-{service}", "service.instance.id": instance})
    global _provider, _tracer
    _provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    _provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(_provider)
    _tracer = _provider.get_tracer("rlif")


def stop() -> None:
    """Send what spans there still are, within STOP_SECONDS."""
    if _provider is not None:
        sending = threading.Thread(target=_provider.shutdown, name="last spans", daemon=True)
        sending.start()
        sending.join(STOP_SECONDS)


def here() -> str:
    """The current span as a `traceparent`; empty where there is none."""
    if _tracer is None:
        return ""
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier.get(HEADER, "")


def span(
    name: str,
    kind: Literal["internal", "client", "server", "producer", "consumer"] = "internal",
    parent: str | None = None,
    links: Iterable[str] = (),
    **attributes: Any,
) -> AbstractContextManager[Any]:
    """Work that is timed, as part of the current span, or of `parent`. `parent` and `links` are `traceparent`s; what is
    none of those begins a trace of its own, or is left out. `attributes` get the prefix `rlif.`."""
    if _tracer is None:
        return nullcontext()
    from opentelemetry.trace import Link, SpanKind

    found = [_place(link) for link in links]
    return _tracer.start_as_current_span(
        name,
        context=None if parent is None else _context(parent),
        kind=SpanKind[kind.upper()],
        attributes={f"rlif.{key}": value for key, value in attributes.items() if value is not None},
        links=[Link(place) for place in found if place.is_valid],
        # Messages of errors quote what callers and models said.
        record_exception=False,
        set_status_on_exception=False,
    )


def describe(name: str, attributes: Mapping[str, Any]) -> None:
    """Name the current span anew, now that more is known of it; `attributes` are by OpenTelemetry's conventions."""
    if _tracer is None:
        return
    from opentelemetry.trace import get_current_span

    current = get_current_span()
    current.update_name(name)
    current.set_attributes(dict(attributes))


def _context(traceparent: str) -> Any:
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({HEADER: traceparent}, context=Context())


def _place(traceparent: str) -> Any:
    from opentelemetry.trace import get_current_span

    return get_current_span(_context(traceparent)).get_span_context()
