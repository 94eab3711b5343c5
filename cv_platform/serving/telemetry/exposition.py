"""Renders the metrics for a scrape: of all workers, without those that are gone and without old models.

`prometheus_client` keeps the values of several workers in files (one per worker and kind) and cannot remove a series
from them. So what is over is left out here: live gauges of workers that died without a word, models that a worker no
longer serves, and all but the last few model versions. https://prometheus.github.io/client_python/multiprocess/
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from cv_platform.serving.telemetry.metrics import MODEL_INFO, MODEL_SERVED, WORKER_STARTED, ServingMetrics

if TYPE_CHECKING:
    from prometheus_client import Metric

KEPT_VERSIONS = 5
"""Model versions whose series are shown: those that were taken up last, by any worker."""


def render(metrics: ServingMetrics) -> tuple[bytes, str]:
    """Returns the text that Prometheus reads, and its media type."""
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
    shown.register(_Shown(families))
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
