"""What `cv-platform run` says at its end, and which log it writes; the runs themselves are in `graph/`."""

from __future__ import annotations

from pathlib import Path

import pytest

from cv_platform.cli import main
from cv_platform.record_store import RecordStore
from cv_platform.settings import Settings
from cv_platform.storage import CentralStorage, ProductionPointer
from cv_platform_tests.support.drift_reports import make_report
from cv_platform_tests.support.record_samples import deployment, evaluation

URL = "file:///storage/reports/digits/1/report.html"


def write_records(environment: dict[str, str], *, report_url: str | None = None) -> None:
    """Writes what a run leaves; without a URL, no drift report."""
    home = Path(environment["CV_HOME"])
    store = RecordStore(home, "digits")
    store.write("evaluation", evaluation(home / "evaluation"), run_id="a-run")
    store.write("deployment", deployment(), run_id="a-run")
    if report_url is not None:
        report = make_report(verdict="drift", rows=359, report_url=report_url)
        store.write("drift_report", report, run_id="a-run")


@pytest.mark.parametrize(
    ("report_url", "line"),
    [(URL, f"  drift report: drift (359 requests); {URL}"), ("", None), (None, None)],
)
def test_the_summary_names_the_drift_report_where_one_was_made(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    report_url: str | None,
    line: str | None,
) -> None:
    def materialize(_: str, environment: dict[str, str], **__: object) -> None:
        write_records(environment, report_url=report_url)

    monkeypatch.setenv("CV_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    monkeypatch.setattr("cv_platform.local.graph.materialize", materialize)
    assert main(["run", "configs/digits.yaml"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1:] == ["  evaluation: good", "  deployment: deployed", *([line] if line else [])]


def test_each_run_has_a_log_of_its_own_and_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written: list[Path] = []

    def materialize(_: str, environment: dict[str, str], *, log: Path, **__: object) -> None:
        log.write_text("said")
        written.append(log)
        write_records(environment)

    monkeypatch.setenv("CV_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    monkeypatch.setattr("cv_platform.local.graph.materialize", materialize)
    assert [main(["run", "configs/digits.yaml"]) for _ in range(2)] == [0, 0]
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("digits: ")]
    assert said == [f"digits: log in {path}" for path in written]
    assert [path.read_text() for path in sorted((tmp_path / "home" / "logs").glob("run-*"))] == ["said", "said"]
    assert len({*written}) == 2


def test_a_service_of_another_experiment_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def materialize(_: str, environment: dict[str, str], **__: object) -> None:
        write_records(environment)

    monkeypatch.setenv("CV_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    monkeypatch.setattr("cv_platform.local.graph.materialize", materialize)
    pointer = {"model_name": "cats", "version": "v", "since_utc": "2026-01-31T06:00:00Z", "experiment": "cats"}
    storage = CentralStorage(Settings.from_environment().storage_url)
    storage.write_pointer("image_classifier", ProductionPointer.model_validate(pointer))
    assert main(["run", "configs/digits.yaml"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "belongs to the experiment cats" in captured.err
    assert "deploy.service: digits" in captured.err
    assert "deploy.takes_over: cats" in captured.err
    storage.write_pointer("image_classifier", ProductionPointer.model_validate({**pointer, "experiment": "digits"}))
    assert main(["run", "configs/digits.yaml"]) == 0
