"""What a really served service says of itself: one scrape for all workers, a log of JSON lines, traces."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import httpx
import pytest

from cv_platform.local.http import free_port
from cv_platform_tests.support.served import serving
from cv_platform_tests.support.span_collector import Collector, attributes
from cv_platform_tests.support.waiting import wait_until

ADMIN_TOKEN = "correct-horse-battery"
API_KEY = "staple-of-correct-horses"
PASSWORD = "hunter2hunter2"
WORKERS = 2
pytestmark = [pytest.mark.xdist_group("observability"), pytest.mark.timeout(300)]


@dataclass(frozen=True)
class Served:
    """A running service."""

    url: str
    log: Path
    collector: Collector

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, headers={"X-API-Key": API_KEY}, timeout=20)

    def series(self) -> set[str]:
        lines = self.get("/metrics").text.splitlines()
        return {line.rpartition(" ")[0] for line in lines if not line.startswith("#")}

    def workers(self) -> set[int]:
        started = (re.fullmatch(r'cv_worker_started_timestamp_seconds\{pid="(\d+)"\}', one) for one in self.series())
        return {int(match[1]) for match in started if match}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Two workers without a model, with secrets of every kind, whose database is away."""
    home, collector = tmp_path_factory.mktemp("home"), Collector()
    variables = {
        "CV_SERVICE_WORKERS": str(WORKERS),
        "CV_ADMIN_TOKEN": ADMIN_TOKEN,
        "CV_API_KEYS": API_KEY,
        "CV_LOG_FORMAT": "json",
        "DATABASE_URL": f"postgresql://cv:{PASSWORD}@127.0.0.1:{free_port()}/cv",
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
    }
    try:
        with serving(home, variables) as port:
            running = Served(f"http://127.0.0.1:{port}", home / "service.log", collector)
            wait_until(lambda: len(running.workers()) == WORKERS)
            yield running
    finally:
        collector.close()


def test_fifty_random_predictions_add_no_series(served: Served):
    def look(times: int) -> None:
        with httpx.Client(headers={"X-API-Key": API_KEY}, timeout=20) as client:
            for _ in range(times):
                assert client.get(f"{served.url}/predictions/{uuid4()}").status_code == 503
                assert client.get(f"{served.url}/{uuid4()}").status_code == 404
                assert client.get(f"{served.url}/x%0a{uuid4()}").status_code == 400

    look(5)
    served.get("/metrics")
    before = served.series()
    look(50)
    assert served.series() == before
    assert not [one for one in before if not one.startswith(("cv_", "bentoml_service_"))]


def test_every_line_is_json_and_each_request_has_one_without_secrets(served: Served):
    request_id = f"seen-{uuid4()}"
    headers = {"X-Request-Id": request_id, "X-API-Key": API_KEY, "X-Admin": ADMIN_TOKEN}
    prediction_id = uuid4()
    httpx.get(f"{served.url}/predictions/{prediction_id}?key={API_KEY}", headers=headers, timeout=20)

    def lines() -> list[dict[str, object]]:
        # A line that is being written has no end yet.
        return [json.loads(line) for line in served.log.read_text().splitlines(keepends=True) if line.endswith("\n")]

    wait_until(lambda: any(line.get("request_id") == request_id and "route" in line for line in lines()))
    of_request = [line for line in lines() if line.get("request_id") == request_id]
    (access,) = [line for line in of_request if line["logger"] == "cv_platform.serving.http.access"]
    assert (access["route"], access["status"]) == ("/predictions/{prediction_id}", 503)
    assert [line["level"] for line in of_request if line is not access] == ["WARNING"]  # Why: the database is away.
    assert {line["logger"] for line in lines()} >= {"bentoml.serve", "cv_platform.serving.model.holder"}
    assert not [line for line in lines() if str(line["logger"]).startswith("bentoml.access")]
    text = served.log.read_text()
    assert [secret for secret in (API_KEY, ADMIN_TOKEN, PASSWORD) if secret in text] == []


def test_a_request_is_one_trace_without_spans_of_bentomls(served: Served):
    trace_id = uuid4().hex
    headers = {"traceparent": f"00-{trace_id}-b7ad6b7169203331-01", "X-API-Key": API_KEY}
    httpx.get(f"{served.url}/health_check", headers=headers, timeout=20)
    wait_until(lambda: any(span.trace_id.hex() == trace_id for span in served.collector.spans()))
    (span,) = [span for span in served.collector.spans() if span.trace_id.hex() == trace_id]
    assert span.name == "GET /health_check"
    assert span.parent_span_id.hex() == "b7ad6b7169203331"
    assert attributes(span)["http.response.status_code"] == 503


def test_the_gauges_of_a_killed_worker_do_not_linger(served: Served):
    victim = min(served.workers())
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: victim not in served.workers())
    wait_until(lambda: len(served.workers()) == WORKERS)  # BentoML starts another one.
    assert victim not in served.workers()
