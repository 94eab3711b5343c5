from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from cv_platform.monitoring.exported_metrics import HELP, export_drift, export_production, export_retention
from cv_platform.records import ProductionMetrics
from cv_platform_tests.support.drift_reports import drift_report, make_report

MODEL = {"experiment": "digits", "model": "digits_classifier", "version": "20260131T060000Z-1f3c9a2e"}


def samples(path: Path) -> dict[tuple[str, str], float]:
    """Returns the values by name and by the label that tells the series of a name apart."""
    found: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(path.read_text()):
        assert family.type == "gauge"
        assert family.documentation == HELP[family.name]
        for sample in family.samples:
            own = {name: value for name, value in sample.labels.items() if name not in MODEL}
            found[sample.name, "".join(own.values())] = sample.value
    return found


def test_a_report_with_drift_says_so_and_how_clearly(tmp_path: Path) -> None:
    export_drift(tmp_path, drift_report())

    found = samples(tmp_path / "metrics" / "drift-digits.prom")

    assert found["cv_drift_verdict", "drift"] == 1.0
    assert found["cv_drift_verdict", "no drift"] == 0.0
    assert found["cv_drift_verdict", "insufficient data"] == 0.0
    assert found["cv_drift_window_rows", ""] == 300.0
    assert found["cv_drift_window_end_timestamp_seconds", ""] == datetime(2026, 2, 8, tzinfo=UTC).timestamp()
    assert found["cv_drift_adjusted_p_value", "bbsd_ks"] == 0.002
    assert found["cv_drift_alarm_level", ""] == 0.05
    assert found["cv_drift_statistic", "uae_mmd"] == 0.01
    assert found["cv_drift_report_timestamp_seconds", ""] > 1.7e9


def test_the_next_report_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    export_drift(tmp_path, drift_report())
    export_drift(tmp_path, make_report())

    found = samples(tmp_path / "metrics" / "drift-digits.prom")

    assert found["cv_drift_verdict", "drift"] == 0.0
    assert found["cv_drift_verdict", "insufficient data"] == 1.0
    assert {name for name, _ in found}.isdisjoint({"cv_drift_adjusted_p_value", "cv_drift_statistic"})
    assert [path.name for path in (tmp_path / "metrics").iterdir()] == ["drift-digits.prom"]


def test_names_with_quotes_stay_readable(tmp_path: Path) -> None:
    export_drift(tmp_path, make_report(model={"model_name": 'a "b"\\', "version": "v"}))

    text = (tmp_path / "metrics" / "drift-digits.prom").read_text()

    assert {s.labels["model"] for f in text_string_to_metric_families(text) for s in f.samples} == {'a "b"\\'}


def test_versions_are_shown_with_what_people_said_of_them(tmp_path: Path) -> None:
    judged = {
        "model_version": MODEL["version"],
        "classifier_type": "multi-class",
        "predictions": 40,
        "with_feedback": 10,
        "coverage": 0.25,
        "accuracy": 0.4,
        "right_share": 0.4,
        "interval": (0.17, 0.69),
        "verdict": "worse than on the test split",
    }
    metrics = ProductionMetrics.model_validate(
        {
            "experiment": "digits",
            "model_name": "digits_classifier",
            "window_start_utc": datetime(2026, 2, 1, tzinfo=UTC),
            "window_end_utc": datetime(2026, 2, 8, tzinfo=UTC),
            "predictions": 40,
            "with_feedback": 10,
            "alpha": 0.05,
            "min_feedback": 5,
            "directory": tmp_path,
            "versions": [judged],
        }
    )

    export_production(tmp_path, metrics)

    assert samples(tmp_path / "metrics" / "production-digits.prom") == {
        ("cv_production_predictions", ""): 40.0,
        ("cv_production_feedback", ""): 10.0,
        ("cv_production_accuracy_ratio", ""): 0.4,
        ("cv_production_worse", ""): 1.0,
    }


def test_retention_says_when_it_was_there(tmp_path: Path) -> None:
    export_retention(tmp_path)

    assert samples(tmp_path / "metrics" / "log_retention.prom")["cv_log_retention_timestamp_seconds", ""] > 1.7e9
