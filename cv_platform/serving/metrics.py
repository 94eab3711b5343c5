"""What Prometheus is told; `/metrics` itself is BentoML's, which sums over its workers.

`prometheus_client` decides at its import whether it writes to files shared by all workers (PROMETHEUS_MULTIPROC_DIR,
which BentoML sets for them). It is therefore imported when the first `ServingMetrics` is made, and never before.
https://prometheus.github.io/client_python/multiprocess/
"""

from __future__ import annotations

import threading
from typing import Any

_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)


class ServingMetrics:
    """Counters, a histogram and gauges of one worker.

    Args:
        registry: a registry of `prometheus_client`; None takes the default one, which BentoML shows.
    """

    def __init__(self, registry: Any = None) -> None:
        import prometheus_client as prometheus

        registry = registry or prometheus.REGISTRY
        self._requests = prometheus.Counter(
            "cv_predict_requests", "Answers to POST /predict by status code.", ["status"], registry=registry
        )
        self._seconds = prometheus.Histogram(
            "cv_predict_seconds",
            "Seconds from the arrival of POST /predict to its log entry, by status code.",
            ["status"],
            buckets=_BUCKETS,
            registry=registry,
        )
        self._classes = prometheus.Counter(
            "cv_predicted_class",
            "Predictions by model version and class.",
            ["model", "version", "predicted"],
            registry=registry,
        )
        self._explain_failures = prometheus.Counter(
            "cv_explain_failures", "Predictions that were answered without their pictures.", registry=registry
        )
        self._unlogged = prometheus.Counter(
            "cv_unlogged_refusals", "Refused requests whose log entry could not be kept.", registry=registry
        )
        self._feedback = prometheus.Counter("cv_feedback", "True classes received.", registry=registry)
        # Each worker has a spool of its own.
        self._spool_depth = prometheus.Gauge(
            "cv_spool_entries", "Log entries waiting for the database.", multiprocess_mode="livesum", registry=registry
        )
        self._spool_age = prometheus.Gauge(
            "cv_spool_oldest_seconds",
            "Age of the oldest log entry that waits for the database.",
            multiprocess_mode="livemax",
            registry=registry,
        )

    def predict_answered(self, status: int, seconds: float) -> None:
        """Counts one answer to POST /predict."""
        self._requests.labels(str(status)).inc()
        self._seconds.labels(str(status)).observe(seconds)

    def predicted(self, model_name: str, version: str, predicted_class: str) -> None:
        """Counts one prediction by its class."""
        self._classes.labels(model_name, version, predicted_class).inc()

    def explain_failed(self) -> None:
        """Counts a prediction that was answered without its pictures."""
        self._explain_failures.inc()

    def refusal_unlogged(self) -> None:
        """Counts a refused request whose log entry could not be kept."""
        self._unlogged.inc()

    def feedback_received(self) -> None:
        """Counts a true class that was received."""
        self._feedback.inc()

    def spool(self, depth: int, oldest_seconds: float | None) -> None:
        """Says how much waits in the spool, and how long the oldest entry has waited (None: nothing waits)."""
        self._spool_depth.set(depth)
        self._spool_age.set(oldest_seconds or 0.0)


_process_metrics: ServingMetrics | None = None
_making = threading.Lock()


def process_metrics() -> ServingMetrics:
    """Returns the metrics of this process: a registry takes each name only once, however many threads ask first."""
    global _process_metrics
    with _making:
        if _process_metrics is None:
            _process_metrics = ServingMetrics()
        return _process_metrics
