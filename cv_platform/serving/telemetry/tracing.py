"""OpenTelemetry traces of requests, sent to a collector by OTLP over HTTP; nothing of it is loaded without an endpoint.

A provider of its own, never the global one: BentoML 1.4 has one, too, and would show each request twice. Spans leave in
batches from a thread; while the collector is away they are dropped, and no request waits for one. The variables of
the SDK (OTEL_EXPORTER_OTLP_HEADERS, OTEL_TRACES_SAMPLER, OTEL_SERVICE_NAME, …) work.
OpenTelemetry's ASGI instrumentation is not used: it writes the client's address, and the URL with its query, whose
values may be secrets, into the span when that begins, and no hook can take an attribute back
(`test_a_prediction_is_one_trace_of_its_callers`).
https://opentelemetry.io/docs/specs/otlp/#otlphttp, https://opentelemetry.io/docs/specs/semconv/http/http-spans/,
https://www.w3.org/TR/trace-context/
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any

_TRACES_PATH = "/v1/traces"
_PROPAGATED = (b"traceparent", b"tracestate")
_EXPORT_SECONDS = 5.0
_QUEUED_SPANS = 4096
_STOP_SECONDS = 3.0
_COMPLAIN_SECONDS = 60.0


class Tracing:
    """Sends spans to one collector; safe to use from any thread.

    Args:
        endpoint: base URL of the collector, such as `http://localhost:4318`.
        service_name: by which the traces are found; OTEL_SERVICE_NAME wins.
        worker_id: of this process.
    """

    def __init__(self, endpoint: str, *, service_name: str, worker_id: str) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        url = endpoint.rstrip("/")
        exporter = OTLPSpanExporter(url if url.endswith(_TRACES_PATH) else url + _TRACES_PATH, timeout=_EXPORT_SECONDS)
        resource = Resource.create({"service.name": service_name, "service.instance.id": worker_id})
        # Its own shutdown hook would wait for a collector that is away.
        self._provider = TracerProvider(
            resource=resource.merge(OTELResourceDetector().detect()), shutdown_on_exit=False
        )
        self._processor = BatchSpanProcessor(exporter, max_queue_size=_QUEUED_SPANS)
        self._provider.add_span_processor(self._processor)
        self._tracer = self._provider.get_tracer("cv_platform.serving")
        self._propagator = TraceContextTextMapPropagator()
        self._complaints = logging.getLogger(OTLPSpanExporter.__module__)
        self._seldom = _Seldom()
        self._complaints.addFilter(self._seldom)

    def begin(self, method: str, headers: Iterable[tuple[bytes, bytes]]) -> RequestSpan:
        """Begins the span of a request, within the trace that its `traceparent` names, if it has one."""
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind, set_span_in_context

        carrier = {name.decode(): value.decode("latin-1") for name, value in headers if name in _PROPAGATED}
        # Not the current context: that may hold a span of BentoML's, which no collector ever sees.
        parent = self._propagator.extract(carrier, Context())
        span = self._tracer.start_span(method, context=parent, kind=SpanKind.SERVER)
        return RequestSpan(self._tracer, span, set_span_in_context(span, Context()))

    def stop(self) -> None:
        """Sends what is left, for a few seconds at most."""
        # The SDK waits for up to half a minute, and offers no shorter wait.
        thread = threading.Thread(target=self._provider.shutdown, name="traces-stop", daemon=True)
        thread.start()
        thread.join(_STOP_SECONDS)
        self._complaints.removeFilter(self._seldom)


class _Seldom(logging.Filter):
    """Keeps one record a minute: a collector that is away would fill the log with several for each batch."""

    def __init__(self) -> None:
        super().__init__()
        self._next = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        """Says whether a record is kept."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + _COMPLAIN_SECONDS
        return True


class RequestSpan:
    """The span of one request; its stages become its children."""

    def __init__(self, tracer: Any, span: Any, context: Any) -> None:
        self._tracer = tracer
        self._span = span
        self._context = context
        self.trace_id = format(span.get_span_context().trace_id, "032x")

    def stage(self, name: str, seconds: float, *, failed: bool = False) -> None:
        """Adds a child that ends now and has taken `seconds`."""
        from opentelemetry.trace import StatusCode

        if not self._span.get_span_context().trace_flags.sampled:
            return
        now = time.time_ns()
        span = self._tracer.start_span(name, context=self._context, start_time=now - int(seconds * 1e9))
        if failed:
            span.set_status(StatusCode.ERROR)
        span.end(now)

    def end(self, name: str, attributes: Mapping[str, str | int], *, failed: bool) -> None:
        """Ends the request's span under its final name."""
        from opentelemetry.trace import StatusCode

        self._span.update_name(name)
        self._span.set_attributes(attributes)
        if failed:
            self._span.set_status(StatusCode.ERROR)
        self._span.end()
