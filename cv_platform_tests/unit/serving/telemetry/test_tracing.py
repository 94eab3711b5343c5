"""Traces, as a collector receives them: a real HTTP server that reads OTLP's protobuf."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from cv_platform.local.http import free_port
from cv_platform.serving.app import create_app
from cv_platform.serving.routes.parts import WorkerParts
from cv_platform_tests.support.app_fixtures import MakeWorker
from cv_platform_tests.support.http_client import Client, flat_image, png
from cv_platform_tests.support.span_collector import Collector, attributes

IMAGE = png(flat_image(10, 20, 30))
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT_ID = "b7ad6b7169203331"


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


def test_a_prediction_is_one_trace_of_its_callers(make_worker: MakeWorker, collector: Collector):
    worker = make_worker(OTEL_EXPORTER_OTLP_ENDPOINT=collector.url)
    headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01", "X-Request-Id": "abc"}
    body = Client(create_app(worker)).predict(IMAGE, headers=headers).json()
    make_worker.stop(worker)
    assert set(collector.paths) == {"/v1/traces"}
    spans = collector.spans()
    assert {span.trace_id.hex() for span in spans} == {TRACE_ID}
    (request,) = [span for span in spans if span.name == "POST /predict"]
    assert request.parent_span_id.hex() == PARENT_ID
    assert attributes(request) == {
        "http.request.method": "POST",
        "http.route": "/predict",
        "http.response.status_code": 200,
        "cv.request_id": "abc",
        "cv.model.version": body["model_version"],
        "cv.prediction.id": body["prediction_id"],
    }
    stages = [span for span in spans if span is not request]
    expected = ["receive", "wait", "decode", "model", "explain", "encode", "append"]
    assert [span.name for span in sorted(stages, key=lambda span: span.end_time_unix_nano)] == expected
    assert {span.parent_span_id for span in stages} == {request.span_id}
    assert all(span.start_time_unix_nano <= span.end_time_unix_nano <= request.end_time_unix_nano for span in stages)
    resource = attributes(collector.requests[0].resource_spans[0].resource)
    assert resource["service.name"] == "image_classifier"
    assert resource["service.instance.id"]


def test_requests_without_a_caller_have_traces_of_their_own(make_worker: MakeWorker, collector: Collector):
    worker = make_worker(OTEL_EXPORTER_OTLP_ENDPOINT=f"{collector.url}/")
    client = Client(create_app(worker))
    client.get("/nowhere")
    client.get("/health_check", headers={"traceparent": "nonsense"})
    make_worker.stop(worker)
    spans = collector.spans()
    assert sorted(span.name for span in spans) == ["GET /health_check", "GET unmatched"]
    assert len({span.trace_id for span in spans}) == 2
    assert {span.parent_span_id for span in spans} == {b""}


def test_a_caller_that_samples_nothing_is_heard(make_worker: MakeWorker, collector: Collector):
    worker = make_worker(OTEL_EXPORTER_OTLP_ENDPOINT=collector.url)
    client = Client(create_app(worker))
    assert client.predict(IMAGE, headers={"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-00"}).status_code == 200
    make_worker.stop(worker)
    assert collector.spans() == []


def test_what_failed_on_this_side_is_marked(make_worker: MakeWorker, collector: Collector):
    worker = make_worker(OTEL_EXPORTER_OTLP_ENDPOINT=collector.url)
    client = Client(create_app(worker))
    assert client.predict(b"no image").status_code == 415
    worker.log.opened.close()
    assert client.predict(IMAGE).status_code == 503
    make_worker.stop(worker)
    spans = collector.spans()
    failed = {(span.name, attributes(span).get("http.response.status_code")) for span in spans if span.status.code == 2}
    assert failed == {("decode", None), ("append", None), ("POST /predict", 503)}


def test_requests_are_answered_while_the_collector_is_away(make_worker: MakeWorker, caplog: pytest.LogCaptureFixture):
    worker = make_worker(OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{free_port()}")
    client = Client(create_app(worker))
    responses = client.together([("POST", "/predict", {"files": {"file": ("a.png", IMAGE)}})] * 20)
    assert {response.status_code for response in responses} == {200}
    make_worker.stop(worker)
    complaints = [record for record in caplog.records if record.name.startswith("opentelemetry.exporter")]
    assert len(complaints) == 1


def test_requests_are_answered_while_the_collector_refuses(make_worker: MakeWorker):
    collector = Collector(status=400)
    worker = make_worker(OTEL_EXPORTER_OTLP_ENDPOINT=collector.url)
    assert Client(create_app(worker)).predict(IMAGE).status_code == 200
    make_worker.stop(worker)
    collector.close()
    assert collector.spans()


def test_without_an_endpoint_there_is_no_tracing(worker: WorkerParts):
    assert worker.tracing is None


def test_without_an_endpoint_no_sdk_is_loaded(tmp_path: Any):
    script = (
        "import sys; from cv_platform.serving.app import create_app; "
        "from cv_platform.serving.worker import open_worker; from cv_platform.settings import Settings; "
        f"home = {str(tmp_path)!r}\n"
        "settings = Settings.from_environment({'CV_HOME': home, 'CV_STORAGE': home + '/storage'})\n"
        "with open_worker(settings) as worker: create_app(worker)\n"
        "print([name for name in sys.modules if name.startswith(('opentelemetry.sdk', 'opentelemetry.exporter'))])"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert run.stdout.strip() == "[]"
