"""Renders the metrics for a scrape: of all workers, without those that are gone and without old models.

`prometheus_client` keeps the values of several workers in files (one per worker and kind) and cannot remove a series
from them. So what is over is left out here: live gauges of workers that died without a word, models that a worker no
longer serves, and all but the last few model versions. https://prometheus.github.io/client_python/multiprocess/

BentoML's own metrics of requests are off, as their label `endpoint` is whatever path a client asks for. Dashboards that
are made for them find those of answers by the same names, with a route's template for endpoint, read from ours. Its two
gauges, requests in progress and the time of the last one, are left out: each would be a write more at a request, and
`cv_in_flight` and an increase of the counter say it.
https://docs.bentoml.com/en/latest/build-with-bentoml/observability/metrics.html
"""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cv_platform.serving.telemetry.metrics import (
    MODEL_INFO,
    MODEL_SERVED,
    REQUEST_SECONDS,
    REQUESTS,
    WORKER_STARTED,
    ServingMetrics,
)

if TYPE_CHECKING:
    from prometheus_client import Metric

KEPT_VERSIONS = 5
"""Model versions whose series are shown: those that were taken up last, by any worker."""


def render(metrics: ServingMetrics, bento: Mapping[str, str] | None = None) -> tuple[bytes, str]:
    """Returns the text that Prometheus reads, and its media type.

    Args:
        metrics: of this worker.
        bento: `service_name` and `service_version`, the labels of BentoML's metrics.
    """
    import prometheus_client as prometheus
    from prometheus_client import multiprocess, values

    if values.ValueClass is values.MutexValue:
        families = list(metrics.registry.collect())
    else:
        workers = prometheus.CollectorRegistry()
        multiprocess.MultiProcessCollector(workers)
        families = list(workers.collect())
        dead = _dead_workers(families)
        if dead:
            for pid in dead:
                # Another worker may answer a scrape at the same moment, and be first.
                with contextlib.suppress(FileNotFoundError):
                    multiprocess.mark_process_dead(pid)  # pyright: ignore[reportUnknownMemberType]
            families = list(workers.collect())
    shown = prometheus.CollectorRegistry()
    shown.register(_Shown([*families, *_bentomls(families, bento or {})]))
    return prometheus.generate_latest(shown), prometheus.CONTENT_TYPE_LATEST


class _Shown:
    """A collector: these families, without what is over."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        over = _versions_that_are_over(self._families)
        for family in self._families:
            family.samples = [
                sample
                for sample in family.samples
                if (sample.labels.get("model"), sample.labels.get("version")) not in over
                and not (sample.name == MODEL_INFO and sample.value == 0)
            ]
            yield family


def _bentomls(families: Iterable[Metric], bento: Mapping[str, str]) -> Iterable[Metric]:
    """Returns BentoML's counter and histogram of requests, as ours count them.

    Ours times answers by the class of their status, so that is what stands for the code there.
    """
    from prometheus_client.core import Metric

    counts = defaultdict[tuple[str, str, str, str | None], float](float)
    for family in families:
        for sample in family.samples:
            labels = sample.labels
            if sample.name == f"{REQUESTS}_total":
                counts["request_total", labels["route"], labels["status"], None] += sample.value
            elif sample.name.startswith(REQUEST_SECONDS) and not sample.name.endswith("_created"):
                name = sample.name.removeprefix(REQUEST_SECONDS)
                key = (f"request_duration_seconds{name}", labels["route"], labels["status_class"], labels.get("le"))
                counts[key] += sample.value
    requests = Metric("bentoml_service_request", "Answers, by BentoML's name.", "counter")
    seconds = Metric("bentoml_service_request_duration_seconds", "Seconds of answers, by BentoML's name.", "histogram")
    for (name, route, status, limit), count in counts.items():
        labels = {"endpoint": route, "http_response_code": status, **bento, **({} if limit is None else {"le": limit})}
        family = requests if name == "request_total" else seconds
        family.add_sample(f"bentoml_service_{name}", labels, count)
    return requests, seconds


def _versions_that_are_over(families: Iterable[Metric]) -> set[tuple[str | None, str | None]]:
    taken_up = sorted(
        (sample.value, sample.labels["model"], sample.labels["version"]) for sample in _samples(families, MODEL_SERVED)
    )
    # Requests are counted by version alone, which is as good as unique.
    return {pair for _, model, version in taken_up[:-KEPT_VERSIONS] for pair in ((model, version), (None, version))}


def _dead_workers(families: Iterable[Metric]) -> list[int]:
    """Returns the processes that were killed: nobody else notices that their live gauges are over."""
    dead: list[int] = []
    for pid in {int(sample.labels["pid"]) for sample in _samples(families, WORKER_STARTED)}:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            dead.append(pid)
        except PermissionError:
            continue
    return dead


def _samples(families: Iterable[Metric], name: str) -> list[Any]:
    return [sample for family in families if family.name == name for sample in family.samples]
