"""What Prometheus is told. Names, labels and buckets are here; `exposition.py` renders them for a scrape.

`prometheus_client` decides at its import whether it writes to files shared by all workers (PROMETHEUS_MULTIPROC_DIR,
which BentoML sets for them). It is therefore imported when the first `ServingMetrics` is made, and never before.
Every label has few values, and none comes from a client: routes are templates, methods are known ones, classes and
versions are those of models that were served. https://prometheus.io/docs/practices/naming/,
https://prometheus.github.io/client_python/multiprocess/
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from cv_platform.serving.telemetry.log_status import LogStatus

Stage = Literal["receive", "wait", "decode", "model", "explain", "encode", "append"]
"""Of a prediction: read the body, wait for a thread, decode and resize, call the model, draw, render, make durable."""
SwapOutcome = Literal["swapped", "refused", "fallback"]
ShadowOutcome = Literal["agreed", "differed", "failed", "dropped"]
"""Of a shadow, beside what the client was told; dropped: it was busy."""
RefusalLogging = Literal["durable", "sampled", "counted"]
"""Of a refused prediction: an entry that the refusal waited for, one that it did not wait for, none."""

REQUESTS = "cv_http_requests"
REQUEST_SECONDS = "cv_http_request_duration_seconds"
MODEL_INFO = "cv_model_info"
WORKER_STARTED = "cv_worker_started_timestamp_seconds"
MODEL_SERVED = "cv_model_served_timestamp_seconds"
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_OTHER = "other"
_MAX_CLASSES = 200
"""Classes of one model version that are counted by name; more than these are counted as `other`."""
_REQUEST_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_STAGE_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0)
_SWAP_BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_CONFIDENCE_BUCKETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)


class ServingMetrics:
    """The metrics of one worker; safe to use from any thread.

    Args:
        registry: a registry of `prometheus_client`; None takes the default one.
    """

    def __init__(self, registry: Any = None) -> None:
        import prometheus_client as prometheus

        self.registry: Any = registry or prometheus.REGISTRY

        def counter(name: str, text: str, *labels: str) -> Any:
            return prometheus.Counter(name, text, labels, registry=self.registry)

        def gauge(name: str, text: str, *labels: str, mode: str = "livesum") -> Any:
            return prometheus.Gauge(name, text, labels, multiprocess_mode=mode, registry=self.registry)  # type: ignore[arg-type]

        def histogram(name: str, text: str, *labels: str, buckets: Sequence[float]) -> Any:
            return prometheus.Histogram(name, text, labels, buckets=buckets, registry=self.registry)

        self._requests = counter(
            REQUESTS, "Answers by route, method, status and model.", "route", "method", "status", "version"
        )
        self._request_seconds = histogram(
            REQUEST_SECONDS,
            "Seconds from the arrival of a request to the end of its answer.",
            *("route", "status_class"),
            buckets=_REQUEST_BUCKETS,
        )
        stages = histogram(
            "cv_predict_stage_duration_seconds", "Seconds of a prediction's stages.", "stage", buckets=_STAGE_BUCKETS
        )
        self._stages: Mapping[Stage, Any] = {stage: stages.labels(stage) for stage in get_args(Stage)}
        self._images = counter("cv_predict_images", "Images sent for a prediction, by status.", "status")
        self._refusals = counter(
            "cv_refusals", "Refused predictions, by how they are logged.", "route", "status", "logged"
        )
        self._predictions = counter(
            "cv_predictions", "Predictions by model and class.", "model", "version", "predicted_class"
        )
        self._unknown = counter("cv_predictions_unknown", "Predictions of images that are unknown.", "model", "version")
        self._confidence = histogram(
            "cv_prediction_confidence_ratio",
            "Highest probability of a prediction.",
            *("model", "version"),
            buckets=_CONFIDENCE_BUCKETS,
        )
        self.explain_failures = counter("cv_explain_failures", "Predictions that were answered without their pictures.")
        self.feedback = counter("cv_feedback", "True classes received.")
        self.append_failures = counter("cv_log_append_failures", "Log entries that the spool did not take.")
        self.unlogged_refusals = counter(
            "cv_log_dropped_entries", "Refusals that were answered without their log entry."
        )
        self._drained = counter("cv_log_drained_entries", "Log entries that the database has taken.")
        evicted = counter(
            "cv_log_evicted_entries", "Oldest log entries that left a full spool, as there is no database.", "outcome"
        )
        self._evicted = {outcome: evicted.labels(outcome) for outcome in ("dropped", "archived")}
        # Each worker has a spool of its own: they add up, the oldest counts.
        self._spool_entries = gauge("cv_spool_entries", "Log entries that wait for the database.")
        self._spool_bytes = gauge("cv_spool_bytes", "Size of the spool's files.")
        self._spool_age = gauge(
            "cv_spool_oldest_entry_age_seconds", "Age of the oldest log entry that waits.", mode="livemax"
        )
        self._rejected = gauge("cv_spool_rejected_entries", "Log entries that the database refuses for good.")
        self._database_up = gauge("cv_database_up", "1 while every worker reaches the log's database.", mode="livemin")
        self._storage_up = gauge("cv_storage_up", "1 while every worker reaches central storage.", mode="livemin")
        self._in_flight = gauge("cv_in_flight", "Places taken, by what they limit.", "limit")
        self._in_flight_limit = gauge("cv_in_flight_limit", "Places there are; beyond, 429.", "limit")
        self._memory = gauge("cv_request_memory_bytes", "Taken by uploads and decoded images.")
        self._memory_limit = gauge("cv_request_memory_limit_bytes", "What there is for them; beyond, 429.")
        self._swaps = counter("cv_model_swaps", "Attempts to take up a model, by outcome.", "outcome")
        self._swap_seconds = histogram(
            "cv_model_swap_duration_seconds", "Seconds of such an attempt.", "outcome", buckets=_SWAP_BUCKETS
        )
        self._shadow_images = counter(
            "cv_shadow_images", "Answered images that a shadow was to be asked about.", "version", "outcome"
        )
        self._shadow_unknown = counter(
            "cv_shadow_unknown", "Those that are unknown to the shadow and not to who answered.", "version"
        )
        self._shadow_seconds = histogram(
            "cv_shadow_duration_seconds",
            "Seconds of a shadow's answer, in spare time.",
            "version",
            buckets=_STAGE_BUCKETS,
        )
        self._info = gauge(
            MODEL_INFO, "1 for the model that a worker serves.", "model", "version", "runtime", mode="liveall"
        )
        self._served = gauge(
            MODEL_SERVED, "When a model was last taken up, in seconds since 1970.", "model", "version", mode="max"
        )
        gauge(WORKER_STARTED, "When a worker started.", mode="liveall").set_to_current_time()
        for outcome in get_args(SwapOutcome):
            self._swaps.labels(outcome)  # From zero on, so that the first one is an increase.
        self._answers: dict[tuple[str, str, int, str], tuple[Any, Any]] = {}
        self._models: dict[tuple[str, str], tuple[Any, dict[str, Any]]] = {}
        self._serving: tuple[str, str, str] | None = None
        self._rows_before: dict[str, int] = {}
        self._lock = threading.Lock()

    def answered(self, *, route: str, method: str, status: int, version: str | None, seconds: float) -> None:
        """Counts one answer; `route` is a template, never a path, and unknown methods count as `other`."""
        key = (route, method if method in _METHODS else _OTHER, status, version or "")
        series = self._answers.get(key)
        if series is None:  # `labels` costs more than counting does.
            series = self._requests.labels(*key), self._request_seconds.labels(route, f"{status // 100}xx")
            self._answers[key] = series
        series[0].inc()
        series[1].observe(seconds)

    def image_answered(self, status: int) -> None:
        """Counts one image that was sent for a prediction; a batch has many, each with a status of its own."""
        self._images.labels(str(status)).inc()

    def refused(self, route: str, status: int, logged: RefusalLogging) -> None:
        """Counts one refused image by the template of its route."""
        self._refusals.labels(route, str(status), logged).inc()

    def stage_ended(self, stage: Stage, seconds: float) -> None:
        """Notes how long one stage of a prediction took."""
        self._stages[stage].observe(seconds)

    def predicted(
        self, model_name: str, version: str, classes: Sequence[str], confidence: float, *, is_unknown: bool = False
    ) -> None:
        """Counts one prediction: for multi-label any number of classes; the confidence is the highest probability."""
        model = self._models.get((model_name, version))
        if model is None:
            model = self._confidence.labels(model_name, version), dict[str, Any]()
            self._models[model_name, version] = model
        of_confidence, of_class = model
        of_confidence.observe(confidence)
        if is_unknown:
            self._unknown.labels(model_name, version).inc()
        for name in classes:
            series = of_class.get(name)
            if series is None:
                label = name if len(of_class) < _MAX_CLASSES else _OTHER
                series = self._predictions.labels(model_name, version, label)
                if label != _OTHER:
                    of_class[name] = series
            series.inc()

    def log_is(self, status: LogStatus) -> None:
        """Says what waits in the spool, and how the database is."""
        self._spool_entries.set(status.depth)
        self._spool_bytes.set(status.spool_bytes)
        self._spool_age.set(status.oldest_age_seconds or 0.0)
        self._rejected.set(status.rejected)
        self._database_up.set(status.database == "ok")
        rows = {
            "drained": (self._drained, status.drained_rows),
            "dropped": (self._evicted["dropped"], status.dropped_rows),
            "archived": (self._evicted["archived"], status.archived_rows),
        }
        with self._lock:
            for name, (series, count) in rows.items():
                # A drainer that follows the database to another address counts from zero again.
                before = self._rows_before.get(name, 0)
                series.inc(count - before if count >= before else count)
                self._rows_before[name] = count

    def storage_is(self, *, reachable: bool) -> None:
        """Says whether central storage can be reached."""
        self._storage_up.set(reachable)

    def places_are(self, limit_name: str, taken: int, limit: int) -> None:
        """Says how many places of a limit are taken, and how many there are."""
        self._in_flight.labels(limit_name).set(taken)
        self._in_flight_limit.labels(limit_name).set(limit)

    def memory_is(self, taken_bytes: int, limit_bytes: int) -> None:
        """Says how many bytes uploads and decoded images take, and how many there are."""
        self._memory.set(taken_bytes)
        self._memory_limit.set(limit_bytes)

    def swap_ended(self, outcome: SwapOutcome, seconds: float) -> None:
        """Counts an attempt to take up a model."""
        self._swaps.labels(outcome).inc()
        self._swap_seconds.labels(outcome).observe(seconds)

    def shadow_answered(
        self, version: str, outcome: ShadowOutcome, seconds: float | None = None, *, is_unknown: bool = False
    ) -> None:
        """Counts one image that a shadow was to be asked about, and what came of it."""
        self._shadow_images.labels(version, outcome).inc()
        if seconds is not None:
            self._shadow_seconds.labels(version).observe(seconds)
        if is_unknown:
            self._shadow_unknown.labels(version).inc()

    def serves(self, model_name: str, version: str, runtime: str) -> None:
        """Says which model this worker serves from now on."""
        model = (model_name, version, runtime)
        with self._lock:
            before, self._serving = self._serving, model
        if before is not None and before != model:
            self._info.labels(*before).set(0)  # Files of workers forget nothing: `exposition` leaves zeros out.
        self._info.labels(*model).set(1)
        self._served.labels(model_name, version).set_to_current_time()


_process_metrics: ServingMetrics | None = None
_making = threading.Lock()


def process_metrics() -> ServingMetrics:
    """Returns the metrics of this process: a registry takes each name only once, however many threads ask first."""
    global _process_metrics
    with _making:
        if _process_metrics is None:
            _process_metrics = ServingMetrics()
        return _process_metrics
