"""What Prometheus is told, read from the text that it would scrape."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import prometheus_client
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cv_platform.serving.app import create_app
from cv_platform.serving.routes.parts import WorkerParts
from cv_platform.serving.telemetry.exposition import KEPT_VERSIONS, render
from cv_platform.serving.telemetry.log_status import LogStatus
from cv_platform.serving.telemetry.metrics import ServingMetrics
from cv_platform.serving.worker import note_load
from cv_platform_tests.support.app_fixtures import MakeWorker
from cv_platform_tests.support.http_client import Client, FixedModels, brightness_model, flat_image, png
from cv_platform_tests.support.metrics_text import Samples, parsed, shown, value

# Means + 1 are (200, 100, 100), so the probabilities are (0.5, 0.25, 0.25).
REDDISH = png(flat_image(199, 99, 99))


def scraped(client: Client) -> Samples:
    response = client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")
    return parsed(response.text)


def test_bentomls_names_have_the_same_figures_and_no_clients_paths(client: Client):
    for path in ("/predict", "/nothing/here", "/nothing/there"):
        client.get(path)
    for _ in range(2):
        assert client.predict(REDDISH).status_code == 200
    samples = scraped(client)
    bento = {"service_name": "image_classifier", "service_version": "not available"}
    counted = {
        (dict(labels)["endpoint"], dict(labels)["http_response_code"]): n
        for (name, labels), n in samples.items()
        if name == "bentoml_service_request_total" and bento.items() <= dict(labels).items()
    }
    assert counted == {("/predict", "405"): 1, ("/predict", "200"): 2, ("unmatched", "404"): 2}
    timed = {"endpoint": "/predict", "http_response_code": "2xx", **bento}
    assert value(samples, "bentoml_service_request_duration_seconds_count", **timed) == 2
    assert value(samples, "bentoml_service_request_duration_seconds_bucket", le="+Inf", **timed) == 2
    ours = value(samples, "cv_http_request_duration_seconds_sum", route="/predict", status_class="2xx")
    assert value(samples, "bentoml_service_request_duration_seconds_sum", **timed) == pytest.approx(ours)


@pytest.fixture
def metrics() -> ServingMetrics:
    return ServingMetrics(prometheus_client.CollectorRegistry())


def test_a_prediction_is_counted_by_route_version_class_and_confidence(client: Client, worker: WorkerParts):
    model = worker.models.current()
    assert model is not None
    version = model.metadata.version
    assert client.predict(REDDISH).status_code == 200
    samples = scraped(client)
    request = {"route": "/predict", "method": "POST", "status": "200", "version": version}
    assert value(samples, "cv_http_requests_total", **request) == 1
    assert value(samples, "cv_http_request_duration_seconds_count", route="/predict", status_class="2xx") == 1
    assert value(samples, "cv_predict_images_total", status="200") == 1
    of_model = {"model": "tiny", "version": version}
    assert value(samples, "cv_predictions_total", predicted_class="cat", **of_model) == 1
    assert value(samples, "cv_prediction_confidence_ratio_sum", **of_model) == 0.5
    assert value(samples, "cv_prediction_confidence_ratio_bucket", le="0.4", **of_model) == 0
    assert value(samples, "cv_prediction_confidence_ratio_bucket", le="0.5", **of_model) == 1


def test_each_stage_of_a_prediction_is_timed_once_and_only_what_was_done(client: Client):
    client.predict(REDDISH)
    client.predict(REDDISH, params={"explain": "none"})
    samples = scraped(client)
    counts = {
        stage: value(samples, "cv_predict_stage_duration_seconds_count", stage=stage)
        for stage in ("receive", "wait", "decode", "model", "explain", "encode", "append")
    }
    expected = {"receive": 2, "wait": 2, "decode": 2, "model": 2, "explain": 1, "encode": 2, "append": 2}
    assert counts == expected
    parts = sum(value(samples, "cv_predict_stage_duration_seconds_sum", stage=stage) or 0.0 for stage in expected)
    whole = value(samples, "cv_http_request_duration_seconds_sum", route="/predict", status_class="2xx")
    assert whole is not None
    assert 0 < parts <= whole


def test_every_image_of_a_batch_is_counted_with_its_own_status(client: Client):
    files = [("files", ("a.png", REDDISH)), ("files", ("b.txt", b"no image")), ("files", ("c.png", REDDISH))]
    client.post("/predict/batch", files=files)
    samples = scraped(client)
    assert value(samples, "cv_predict_images_total", status="200") == 2
    assert value(samples, "cv_predict_images_total", status="415") == 1


def test_fifty_random_ids_add_no_series(client: Client):
    def look(method: str, suffix: str) -> None:
        client.request(method, f"/predictions/{uuid4()}{suffix}")

    for method, suffix in (("GET", ""), ("GET", "/passport"), ("DELETE", ""), ("PATCH", "")):
        look(method, suffix)
    client.get(f"/{uuid4()}")
    scraped(client)
    before = scraped(client)
    for _ in range(50):
        for method, suffix in (("GET", ""), ("GET", "/passport"), ("DELETE", ""), ("PATCH", "")):
            look(method, suffix)
        client.get(f"/{uuid4()}")
    after = scraped(client)
    assert set(after) == set(before)
    route = {"route": "/predictions/{prediction_id}", "method": "PATCH", "status": "405", "version": ""}
    assert value(after, "cv_http_requests_total", **route) == 51
    unmatched = {"route": "unmatched", "method": "GET", "status": "404", "version": ""}
    assert value(after, "cv_http_requests_total", **unmatched) == 51


def test_what_a_client_invents_is_no_label(client: Client):
    for number in range(3):
        client.request(f"INVENTED{number}", f"/invented/{number}")
        client.get(f"/page/invented{number}.js")
        client.predict(REDDISH, headers={"Content-Type": f"invented/{number}", "X-Request-Id": f"invented-{number}"})
        client.predict(REDDISH, params={"explain": f"invented-{number}"})
        client.get(f"/x%0ainvented{number}")
    samples = scraped(client)
    assert not [labels for _, labels in samples if any("nvented" in text.lower() for _, text in labels)]
    routes = {dict(labels)["route"] for name, labels in samples if name == "cv_http_requests_total"}
    assert routes == {"unmatched", "/page", "/predict"}


def test_a_refusal_before_any_route_is_counted_by_the_route_that_it_wanted(client: Client):
    client.predict(b"0" * 300_000)
    client.post(f"/feedback/{uuid4()}", json={"true_class": "cat"}, headers={"Sec-Fetch-Site": "cross-site"})
    samples = scraped(client)
    assert value(samples, "cv_http_requests_total", route="/predict", method="POST", status="413", version="") == 1
    feedback = {"route": "/feedback/{prediction_id}", "method": "POST", "status": "403", "version": ""}
    assert value(samples, "cv_http_requests_total", **feedback) == 1


def test_overload_is_a_429_of_its_route_and_the_limits_are_shown(make_worker: MakeWorker):
    worker = make_worker()
    client = Client(create_app(worker))
    while worker.admission.uploads.enter():
        pass
    client.predict(REDDISH)
    note_load(worker)
    samples = scraped(client)
    counted = {dict(labels)["status"]: n for (name, labels), n in samples.items() if name == "cv_http_requests_total"}
    assert counted == {"429": 1}
    taken, limit = (value(samples, name, limit="uploads") for name in ("cv_in_flight", "cv_in_flight_limit"))
    assert taken == limit == worker.limits.max_uploads


def test_health_and_scrapes_are_counted_by_route(client: Client):
    client.get("/health_check")
    scraped(client)
    samples = scraped(client)
    for route in ("/health_check", "/metrics"):
        assert value(samples, "cv_http_requests_total", route=route, method="GET", status="200", version="") == 1


def status(**changes: float | str | None) -> LogStatus:
    fields = {
        "depth": 0, "oldest_age_seconds": None, "database": "ok", "last_error": None, "drained_rows": 0, "rejected": 0,
        "spool_bytes": 0, **changes,
    }  # fmt: skip
    return LogStatus(**fields)


def test_the_spools_figures_are_shown(metrics: ServingMetrics):
    waiting = {"depth": 7, "oldest_age_seconds": 2.5, "rejected": 1, "spool_bytes": 4096, "database": "unreachable"}
    metrics.log_is(status(**waiting))
    samples = shown(metrics)
    assert value(samples, "cv_spool_entries") == 7
    assert value(samples, "cv_spool_oldest_entry_age_seconds") == 2.5
    assert value(samples, "cv_spool_rejected_entries") == 1
    assert value(samples, "cv_spool_bytes") == 4096
    assert value(samples, "cv_database_up") == 0
    metrics.log_is(status())
    assert value(shown(metrics), "cv_database_up") == 1


def test_drained_entries_add_up_over_drainers_that_count_from_zero(metrics: ServingMetrics):
    for drained in (5, 8, 2, 6):  # The third is a new drainer's.
        metrics.log_is(status(drained_rows=drained))
    assert value(shown(metrics), "cv_log_drained_entries_total") == 8 + 6


def test_evicted_entries_are_counted_from_zero_on(metrics: ServingMetrics):
    for rows in (0, 3):
        for outcome in ("dropped", "archived"):
            assert value(shown(metrics), "cv_log_evicted_entries_total", outcome=outcome) == rows
        metrics.log_is(status(dropped_rows=3, archived_rows=3))


def test_the_spools_size_is_that_of_its_files(client: Client, worker: WorkerParts):
    client.predict(REDDISH)
    files = (worker.settings.home / "spool").glob("*.sqlite*")
    log = worker.log.opened.status()
    assert log.spool_bytes == sum(path.stat().st_size for path in files) > len(REDDISH)


def test_a_full_spool_is_counted(client: Client, worker: WorkerParts, monkeypatch: pytest.MonkeyPatch):
    worker.log.opened.close()
    assert client.predict(REDDISH).status_code == 503
    samples = scraped(client)
    # The answer's entry and then the refusal's.
    assert value(samples, "cv_log_append_failures_total") == 2
    assert value(samples, "cv_log_dropped_entries_total") == 1


def test_classes_beyond_two_hundred_are_counted_together(metrics: ServingMetrics):
    for number in range(250):
        metrics.predicted("tiny", "v", [f"class {number}"], 1.0)
    metrics.predicted("tiny", "v", ["class 3"], 1.0, is_unknown=True)
    samples = shown(metrics)
    of_model = {"model": "tiny", "version": "v"}
    assert value(samples, "cv_predictions_total", predicted_class="other", **of_model) == 50
    assert value(samples, "cv_predictions_total", predicted_class="class 3", **of_model) == 2
    assert value(samples, "cv_predictions_unknown_total", **of_model) == 1
    assert len([name for name, _ in samples if name == "cv_predictions_total"]) == 201


def test_only_the_model_that_serves_is_shown_and_old_versions_go(
    metrics: ServingMetrics, monkeypatch: pytest.MonkeyPatch
):
    for number in range(KEPT_VERSIONS + 3):
        # Swaps take seconds; here they would fall into the same tick of the clock.
        monkeypatch.setattr("time.time", lambda number=number: 1000.0 + number)
        metrics.serves("tiny", f"v{number}", "onnx")
        metrics.predicted("tiny", f"v{number}", ["cat"], 0.9)
        metrics.answered(route="/predict", method="POST", status=200, version=f"v{number}", seconds=0.1)
    metrics.answered(route="/", method="GET", status=200, version=None, seconds=0.1)
    samples = shown(metrics)
    kept = {f"v{number}" for number in range(3, KEPT_VERSIONS + 3)}
    for name in ("cv_predictions_total", "cv_prediction_confidence_ratio_count", "cv_model_served_timestamp_seconds"):
        assert {dict(labels)["version"] for found, labels in samples if found == name} == kept
    versions = {dict(labels)["version"] for name, labels in samples if name == "cv_http_requests_total"}
    assert versions == kept | {""}
    serving = [dict(labels) for name, labels in samples if name == "cv_model_info"]
    assert serving == [{"model": "tiny", "version": f"v{KEPT_VERSIONS + 2}", "runtime": "onnx"}]


def test_a_version_that_is_rolled_back_to_is_kept(metrics: ServingMetrics, monkeypatch: pytest.MonkeyPatch):
    for second, version in enumerate(["v0", "v1", "v2", "v3", "v4", "v5", "v0"]):
        monkeypatch.setattr("time.time", lambda second=second: 1000.0 + second)
        metrics.serves("tiny", version, "onnx")
    served = {dict(labels)["version"] for name, labels in shown(metrics) if name == "cv_model_served_timestamp_seconds"}
    assert served == {"v0", "v2", "v3", "v4", "v5"}


def test_a_model_without_a_known_swap_is_shown(make_worker: MakeWorker):
    client = Client(create_app(make_worker(models=FixedModels(brightness_model(version="20260131T060000Z-1f3c9a2e")))))
    client.predict(REDDISH)
    versions = {dict(labels).get("version") for name, labels in scraped(client) if name == "cv_predictions_total"}
    assert versions == {"20260131T060000Z-1f3c9a2e"}


WORKER = """
    import sys
    from cv_platform.serving.telemetry.log_status import LogStatus
    from cv_platform.serving.telemetry.exposition import render
    from cv_platform.serving.telemetry.metrics import ServingMetrics
    metrics = ServingMetrics()
    metrics.answered(route="/predict", method="POST", status=200, version="v1", seconds=0.1)
    metrics.log_is(LogStatus(2, 9.0, "ok", None, drained_rows=10, rejected=0))
    metrics.places_are("predictions", 1, 32)
    metrics.serves("tiny", "v1", "onnx")
    metrics.serves("tiny", "v2", "onnx")
    print("ready", flush=True)
    for _ in sys.stdin:
        print(render(metrics)[0].decode(), flush=True)
        print("END", flush=True)
"""
StartWorker = Callable[[], subprocess.Popen[str]]


@pytest.fixture
def start_worker(tmp_path: Path) -> StartWorker:
    shared = tmp_path / "shared"
    shared.mkdir()

    def start() -> subprocess.Popen[str]:
        worker = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WORKER)],
            env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(shared)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
        return worker

    return start


def asked(worker: subprocess.Popen[str]) -> Samples:
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write("\n")
    worker.stdin.flush()
    return parsed("".join(iter(worker.stdout.readline, "END\n")))


@pytest.mark.timeout(120)
def test_workers_add_up_and_a_killed_one_leaves_its_counts_but_no_gauge(start_worker: StartWorker):
    first, second = start_worker(), start_worker()
    try:
        request = {"route": "/predict", "method": "POST", "status": "200", "version": "v1"}
        both = asked(first)
        assert value(both, "cv_http_requests_total", **request) == 2
        assert value(both, "cv_spool_entries") == 4
        assert value(both, "cv_in_flight_limit", limit="predictions") == 64
        of_model = {"model": "tiny", "version": "v2", "runtime": "onnx"}
        pids = [str(worker.pid) for worker in (first, second)]
        assert {labels for name, labels in both if name == "cv_model_info"} == {
            frozenset({**of_model, "pid": pid}.items()) for pid in pids
        }
        second.send_signal(signal.SIGKILL)
        second.wait(timeout=10)
        one = asked(first)
        assert value(one, "cv_http_requests_total", **request) == 2
        assert value(one, "cv_log_drained_entries_total") == 20
        assert value(one, "cv_spool_entries") == 2
        assert value(one, "cv_in_flight_limit", limit="predictions") == 32
        assert value(one, "cv_model_info", pid=pids[0], **of_model) == 1
        assert not [labels for _, labels in one if dict(labels).get("pid") == pids[1]]
    finally:
        for worker in (first, second):
            worker.communicate(timeout=20)


def test_every_name_follows_prometheus_conventions(metrics: ServingMetrics):
    families = list(text_string_to_metric_families(render(metrics)[0].decode()))
    assert len(families) > 20
    for family in families:
        assert re.fullmatch(r"(cv|bentoml_service)_[a-z_]+", family.name)
        assert family.documentation.endswith(".")
        if family.type == "histogram":
            assert family.name.endswith(("_seconds", "_ratio"))
