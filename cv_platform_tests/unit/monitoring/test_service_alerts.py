from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import prometheus_client
import pytest

from cv_platform.errors import ServiceError
from cv_platform.local.http import free_port
from cv_platform.monitoring.service_alerts import (
    OLDEST_ENTRY_SECONDS,
    AlertState,
    Trouble,
    firing,
    service_troubles,
    tell,
)
from cv_platform.serving.telemetry.exposition import render
from cv_platform.serving.telemetry.log_status import LogStatus
from cv_platform.serving.telemetry.metrics import ServingMetrics

START = datetime(2026, 2, 1, tzinfo=UTC)


class Server:
    """Answers every GET with `text`, under whatever path."""

    def __init__(self) -> None:
        self.text = ""

        class Handler(BaseHTTPRequestHandler):
            def do_GET(handler) -> None:
                handler.send_response(200)
                handler.end_headers()
                handler.wfile.write(self.text.encode())

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


class Service:
    """A service's metrics, looked at minute by minute."""

    def __init__(self, server: Server) -> None:
        self.server, self.state, self.now = server, AlertState(), START
        self.restart()

    def restart(self) -> None:
        self.metrics = ServingMetrics(prometheus_client.CollectorRegistry())

    def log(self, **changes: object) -> None:
        usual = {"depth": 0, "oldest_age_seconds": None, "database": "ok", "last_error": None}
        self.metrics.log_is(LogStatus(**{**usual, "drained_rows": 0, "rejected": 0, **changes}))

    def predict(self, images: int, *, unknown: int) -> None:
        for i in range(images):
            self.metrics.predicted("digits", "v1", ["3"], 0.9, is_unknown=i < unknown)

    def look(self, minutes: float = 1) -> list[str]:
        self.now += timedelta(minutes=minutes)
        self.server.text = render(self.metrics)[0].decode()
        troubles, self.state = service_troubles(self.server.address, self.state, self.now)
        return [trouble.name for trouble in troubles]


def test_old_and_refused_log_entries_are_trouble_as_long_as_they_are_there(server: Server) -> None:
    service = Service(server)
    service.log(depth=3, oldest_age_seconds=OLDEST_ENTRY_SECONDS - 1)
    assert service.look() == []
    service.log(depth=3, oldest_age_seconds=OLDEST_ENTRY_SECONDS + 1, rejected=2)
    assert service.look() == ["SpoolOld", "LogEntriesRejected"]
    service.log(rejected=2)
    assert service.look() == ["LogEntriesRejected"]


def test_a_failed_swap_is_trouble_for_a_quarter_of_an_hour(server: Server) -> None:
    service = Service(server)
    service.metrics.swap_ended("refused", 0.1)
    assert service.look() == []  # What was before the first look may be years old.
    service.metrics.swap_ended("swapped", 0.1)
    assert service.look() == []
    service.metrics.swap_ended("refused", 0.1)
    assert [service.look(minutes=5) for _ in range(5)] == [["ModelSwapFailed"]] * 3 + [[]] * 2
    service.restart()
    service.metrics.swap_ended("fallback", 0.1)
    assert service.look() == ["ModelSwapFailed"]  # Counted from zero on.


def test_unknown_images_are_judged_by_the_hour_and_from_a_hundred_on(server: Server) -> None:
    service = Service(server)
    service.predict(1000, unknown=900)
    assert service.look() == []
    service.predict(99, unknown=99)
    assert service.look() == []
    service.predict(1, unknown=0)
    assert service.look() == ["UnknownImages"]
    service.predict(395, unknown=0)
    assert service.look() == []  # A fifth.
    service.predict(200, unknown=200)
    assert service.look() == ["UnknownImages"]
    assert [service.look(minutes=20) for _ in range(4)] == [["UnknownImages"]] * 3 + [[]]
    assert len(service.state.model_dump_json()) < 2000


def test_lost_entries_are_told(server: Server) -> None:
    service = Service(server)
    service.look()
    service.metrics.append_failures.inc()
    assert service.look() == ["LogEntriesLost"]


def test_the_state_of_a_day_of_looks_stays_small(server: Server) -> None:
    service = Service(server)
    for _ in range(200):
        service.look()
    assert len(service.state.history) <= 14
    assert AlertState.read(service.state.model_dump_json()) == service.state
    assert AlertState.read("no state") == AlertState.read(None) == AlertState()


def test_what_fires_in_prometheus_is_passed_on_but_for_what_reports_tell(server: Server) -> None:
    def alert(name: str, state: str = "firing", **labels: str) -> dict[str, object]:
        return {
            "labels": {"alertname": name, "severity": "warning", **labels},
            "annotations": {"summary": "It hurts", "description": "A lot.", "runbook": "docs"},
            "state": state,
            "activeAt": "2026-02-01T00:00:00Z",
            "value": "1e+00",
        }

    alerts = [
        alert("SpoolOld"),
        alert("ModelSwapFailed", instance="service:3000", outcome="refused"),
        alert("DiskLow", state="pending"),
        alert("DriftFound", experiment="digits"),
    ]
    server.text = json.dumps({"status": "success", "data": {"alerts": alerts}})
    assert firing(server.address) == [
        Trouble("SpoolOld", "It hurts. A lot."),
        Trouble("ModelSwapFailed", "It hurts. A lot.", "service:3000, refused"),
    ]


@pytest.mark.parametrize("text", ["", "<html>", "{}", '{"data": {"alerts": [{}]}}', '{"data": [1]}'])
def test_what_is_no_prometheus_is_named(server: Server, text: str) -> None:
    server.text = text
    with pytest.raises(ServiceError, match="Expected the alerts of Prometheus"):
        firing(server.address)


def test_a_service_that_does_not_answer_or_is_another_is_named(server: Server) -> None:
    server.text = "cv_spool_entries{ 1 2 3"
    with pytest.raises(ServiceError, match="Expected the metrics of the service"):
        service_troubles(server.address, AlertState(), START)
    with pytest.raises(ServiceError, match="Expected an answer"):
        service_troubles(f"http://127.0.0.1:{free_port()}", AlertState(), START)
    with pytest.raises(ServiceError, match="Expected an answer"):
        firing("http://[no address")


def test_people_hear_of_what_begins_and_of_what_is_over_once() -> None:
    sent: list[tuple[str, str]] = []
    old, stale = Trouble("SpoolOld", "It waits."), Trouble("MonitoringStale", "It is old.", "digits")

    def look(state: AlertState, *troubles: Trouble, reaches: bool = True) -> AlertState:
        sent.clear()
        return tell(state, troubles, lambda title, text: sent.append((title, text)) or reaches)

    state = look(AlertState(), old, stale)
    assert sent == [
        (
            "SpoolOld, MonitoringStale (digits)",
            "SpoolOld: It waits.\nMonitoringStale (digits): It is old.\n"
            "What to do: docs/how-to/alerts.md, MonitoringStale, SpoolOld.",
        )
    ]
    state = look(state, stale, Trouble("SpoolOld", "It waits longer."))
    assert sent == []
    failed = look(state, stale, reaches=False)
    assert [title for title, _ in sent] == ["over: SpoolOld"]
    assert failed == state  # Nobody has heard of it: it is told at the next look.
    state = look(failed, stale)
    assert [title for title, _ in sent] == ["over: SpoolOld"]
    assert look(state, stale) == state
    assert sent == []
