"""Evidently's folder workspace, and its real server on loopback."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from cv_platform.drift.family import DETECTOR_NAMES
from cv_platform.errors import ServiceError
from cv_platform.local.http import wait_for_http
from cv_platform.monitoring.evidently_report import EvidentlyRun, Figure, _quiet, delete_run, publish_run


@pytest.fixture(autouse=True)
def _no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DO_NOT_TRACK", "1")


def make_run(
    day: int, p: float, *, verdict: str = "no drift", with_table: bool = False, classes: tuple[str, ...] = ("7",)
) -> EvidentlyRun:
    properties = np.random.default_rng(day).normal(size=(60, 7)).astype(np.float32)
    properties[:, 6] = 0.0  # Grey images: a constant column must not break the table.
    return EvidentlyRun(
        experiment="digits",
        window_end_utc=datetime(2026, 2, day, 6, tzinfo=UTC),
        figures=[
            Figure("WindowFigure", "rows", 60.0),
            *(Figure("CalibratedDrift", name, p) for name in DETECTOR_NAMES),
            *(Figure("PredictedShare", name, 1 / len(classes)) for name in classes),
        ],
        metadata={"model_name": "m", "model_version": "v", "verdict": verdict},
        reference_properties=properties if with_table else None,
        current_properties=properties + 1 if with_table else None,
    )


@contextmanager
def evidently_server(workspace: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [Path(sys.executable).parent / "evidently", "ui", "--host", "127.0.0.1"]
    with (workspace.parent / "server.log").open("w") as log:
        server = subprocess.Popen(
            [*command, "--workspace", workspace, "--port", str(port)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "DO_NOT_TRACK": "1"},
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for_http(f"{url}/api/version", seconds=150, alive=lambda: server.poll() is None)
        yield url
    finally:
        server.terminate()
        server.wait(timeout=30)


def p_values(url: str, project: str, query: str = "") -> list[float]:
    metric = {"metric": "evidently:metric_v2:CalibratedDrift", "metric_labels": {"detector": "bbsd_ks"}}
    body = {"series_filter": [{**metric, "tags": [], "metadata": {}}]}
    answer = httpx.post(f"{url}/api/v2/snapshots/{project}/data_series_batch{query}", json=body).raise_for_status()
    (series,) = answer.json()["series"]
    return series["values"]


def shares(url: str, project: str) -> dict[str, list[float | None]]:
    """Returns what the panel of classes shows: the series that the page asks for, by class."""
    dashboard = httpx.get(f"{url}/api/v2/dashboards/{project}").raise_for_status().json()
    (panel,) = (panel for panel in dashboard["panels"] if panel["title"] == "Share of predictions per class")
    assert panel["id"] in dashboard["tabs"][0]["panels"]
    body = {"series_filter": [{key: value[key] for key in FILTER} for value in panel["values"]]}
    answer = httpx.post(f"{url}/api/v2/snapshots/{project}/data_series_batch", json=body).raise_for_status()
    return {series["params"]["class_name"]: series["values"] for series in answer.json()["series"]}


FILTER = ("metric", "metric_labels", "tags", "metadata")


@contextmanager
def opened_dashboard(workspace: Path) -> Iterator[Any]:
    """Yields the dashboard of the only project, and saves what has been changed."""
    with _quiet():
        from evidently.ui.workspace import Workspace

        opened = Workspace.create(str(workspace))
        (project,) = opened.list_projects()
        dashboard = opened.get_dashboard(project.id)
        yield dashboard
        opened.save_dashboard(project.id, dashboard)


def share_panel(dashboard: Any) -> Any:
    (panel,) = (each for each in dashboard.panels if each.title == "Share of predictions per class")
    return panel


@pytest.mark.parametrize("frozen", [["7"], []], ids=["first report's classes", "first report without classes"])
def test_a_panel_that_was_frozen_shows_later_classes(tmp_path: Path, frozen: list[str]) -> None:
    publish_run(tmp_path, make_run(1, 0.5))
    with opened_dashboard(tmp_path) as dashboard:
        panel = share_panel(dashboard)
        panel.values = [
            panel.values[0].copy(update={"metric_labels": {"class_name": name}}, deep=True) for name in frozen
        ]
        if not frozen:
            dashboard.panels.remove(panel)
            dashboard.tabs[0].panels.remove(panel.id)
    publish_run(tmp_path, make_run(8, 0.5, classes=("7", "8")))
    publish_run(tmp_path, make_run(9, 0.5))
    with opened_dashboard(tmp_path) as dashboard:
        assert len(dashboard.panels) == len(dashboard.tabs[0].panels) == 9
        assert [value.metric_labels for value in share_panel(dashboard).values] == [{}]


def test_runs_make_one_line_per_detector_in_a_project_of_the_experiments_name(tmp_path: Path) -> None:
    workspace = tmp_path / "evidently"
    first = publish_run(workspace, make_run(1, 0.5, with_table=True))
    second = publish_run(workspace, make_run(8, 0.01, verdict="drift"))
    replaced = publish_run(workspace, make_run(8, 0.02, verdict="drift"))
    delete_run(workspace, "digits", second)
    assert len({first, second, replaced}) == 3
    with evidently_server(workspace) as url:
        (project,) = httpx.get(f"{url}/api/v2/projects").raise_for_status().json()
        assert project["name"] == "digits"
        identity = project["id"]
        assert p_values(url, identity) == [0.5, 0.02]
        # What the page's date filter sends: times without a zone.
        since = "?timestamp_start=2026-02-05T00:00&timestamp_end=2026-03-01T00:00"
        assert p_values(url, identity, since) == [0.02]
        snapshots = httpx.get(f"{url}/api/projects/{identity}/snapshots").raise_for_status().json()
        assert {s["id"] for s in snapshots} == {first, replaced}
        assert snapshots[0]["metadata"]["model_version"] == "v"
        dashboard = httpx.get(f"{url}/api/v2/dashboards/{identity}").raise_for_status().json()
        assert [tab["title"] for tab in dashboard["tabs"]] == ["Drift"]
        assert len(dashboard["panels"]) == 9
        page = httpx.get(f"{url}/api/projects/{identity}/{first}/data").raise_for_status().text
        assert "Adjusted p-value: bbsd_ks" in page

        # The same through the server.
        assert shares(url, identity) == {"7": [1.0, 1.0]}
        third = publish_run(url, make_run(15, 0.3))
        publish_run(url, make_run(15, 0.4))
        delete_run(url, "digits", third)
        assert len(httpx.get(f"{url}/api/v2/projects").json()) == 1
        assert p_values(url, identity) == [0.5, 0.02, 0.4]

        # Another model: a class goes, two come.
        publish_run(url, make_run(22, 0.5, classes=("8", "9")))
        assert shares(url, identity) == {
            "7": [1.0, 1.0, 1.0],
            "8": [None, None, None, 0.5],
            "9": [None, None, None, 0.5],
        }


GONE = "00000000-0000-0000-0000-000000000000"


def test_a_run_that_is_gone_does_not_matter(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = publish_run(tmp_path, make_run(1, 0.5))
    with caplog.at_level(logging.WARNING, "cv_platform"):
        delete_run(tmp_path, "digits", GONE)
        delete_run(tmp_path, "no such project", kept)
    assert caplog.messages == []
    assert [path.stem for path in tmp_path.glob("*/snapshots/*.json")] == [kept]


def test_a_run_that_stays_is_logged_and_no_error(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "cv_platform"):
        delete_run("http://127.0.0.1:9", "digits", GONE)
    (message,) = caplog.messages
    assert GONE in message
    assert "Delete it on the project's page" in message


def test_a_server_that_does_not_answer_is_a_service_error() -> None:
    with pytest.raises(ServiceError, match=r"127\.0\.0\.1:9"):
        publish_run("http://127.0.0.1:9", make_run(1, 0.5))
