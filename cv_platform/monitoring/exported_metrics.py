"""What Prometheus is told of monitoring: small files, which node-exporter's textfile collector reads.

Reports are made once a week by a process that then ends; nobody could scrape it. So each kind of result has a file
below `$CV_HOME/metrics`, replaced as a whole, which says what the latest one found and when it was made. A person who
takes an experiment away deletes its files. https://github.com/prometheus/node_exporter#textfile-collector
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import get_args

from cv_platform.files import write_file
from cv_platform.records import DriftReport, ProductionMetrics, ReportVerdict

FOLDER = "metrics"
"""Below `CV_HOME`."""
Samples = Iterable[tuple[Mapping[str, str], float]]
"""Labels and value of each series."""


def export_drift(home: Path, report: DriftReport) -> None:
    """Replaces the metrics of the experiment's latest drift report.

    Args:
        home: `CV_HOME`.
        report: of any window; the one made last counts.

    Raises:
        OSError: the file cannot be written.
    """
    model = {"experiment": report.experiment, "model": report.model.model_name, "version": report.model.version}
    _write(
        home / FOLDER / f"drift-{report.experiment}.prom",
        {
            "cv_drift_report_timestamp_seconds": [(model, time.time())],
            "cv_drift_window_end_timestamp_seconds": [(model, report.window_end_utc.timestamp())],
            "cv_drift_window_rows": [(model, report.rows)],
            "cv_drift_verdict": [({**model, "verdict": v}, v == report.verdict) for v in get_args(ReportVerdict)],
            "cv_drift_adjusted_p_value": [({**model, "detector": d}, p) for d, p in report.adjusted_p_values.items()],
            "cv_drift_alarm_level": [(model, report.alpha)],
            "cv_drift_statistic": [({**model, "detector": d}, value) for d, value in report.statistics.items()],
        },
    )


def export_production(home: Path, metrics: ProductionMetrics) -> None:
    """Replaces the metrics of how the experiment's model versions do in production.

    Args:
        home: `CV_HOME`.
        metrics: the latest ones.

    Raises:
        OSError: the file cannot be written.
    """
    versions = [
        ({"experiment": metrics.experiment, "model": metrics.model_name, "version": version.model_version}, version)
        for version in metrics.versions
    ]
    worse = {version.model_version for version in metrics.worse_versions}
    _write(
        home / FOLDER / f"production-{metrics.experiment}.prom",
        {
            "cv_production_predictions": [(model, version.predictions) for model, version in versions],
            "cv_production_feedback": [(model, version.with_feedback) for model, version in versions],
            "cv_production_accuracy_ratio": [
                (model, version.accuracy) for model, version in versions if version.accuracy is not None
            ],
            "cv_production_worse": [(model, version.model_version in worse) for model, version in versions],
        },
    )


def export_retention(home: Path) -> None:
    """Notes that retention has gone through the request log just now.

    Args:
        home: `CV_HOME`.

    Raises:
        OSError: the file cannot be written.
    """
    _write(home / FOLDER / "log_retention.prom", {"cv_log_retention_timestamp_seconds": [({}, time.time())]})


HELP: Mapping[str, str] = {
    "cv_drift_report_timestamp_seconds": "When the latest drift report was made, in seconds since 1970.",
    "cv_drift_window_end_timestamp_seconds": "End of the window that it judged, in seconds since 1970.",
    "cv_drift_window_rows": "Requests that it judged.",
    "cv_drift_verdict": "1 for its verdict, 0 for the others.",
    "cv_drift_adjusted_p_value": "Of a detector, corrected for all; drift at or below cv_drift_alarm_level.",
    "cv_drift_alarm_level": "Level of the report's test: its part of monitor.false_alarms_per_year.",
    "cv_drift_statistic": "Of a detector: the largest KS distance, MMD squared, a multiple of chance's distance.",
    "cv_production_predictions": "Predictions of a version in the monitor's window.",
    "cv_production_feedback": "Of them, those whose true class somebody has stated.",
    "cv_production_accuracy_ratio": "Accuracy of those.",
    "cv_production_worse": "1 when a version is significantly less often right than on its test split.",
    "cv_log_retention_timestamp_seconds": "When retention last went through the request log, in seconds since 1970.",
}
"""Every metric there is, with its text; the same in each file, as node-exporter asks for."""


class _Gauges:
    """A collector of these samples."""

    def __init__(self, samples: Mapping[str, Samples]) -> None:
        self._samples = samples

    def collect(self) -> Iterable[object]:
        from prometheus_client.core import GaugeMetricFamily

        for name, series in self._samples.items():
            family = GaugeMetricFamily(name, HELP[name])
            for labels, value in series:
                family.add_sample(name, dict(labels), float(value))
            yield family


def _write(path: Path, samples: Mapping[str, Samples]) -> None:
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry()
    registry.register(_Gauges(samples))  # pyright: ignore[reportArgumentType]
    write_file(path, generate_latest(registry))
