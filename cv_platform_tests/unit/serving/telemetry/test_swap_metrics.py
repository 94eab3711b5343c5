"""What the metrics say of models that are taken up, refused and fallen back to, with a real holder and real bundles."""

from pathlib import Path

import prometheus_client

from cv_platform.serving.telemetry.metrics import ServingMetrics
from cv_platform.serving.worker import note_load, open_worker
from cv_platform.settings import Settings
from cv_platform.storage import CentralStorage
from cv_platform_tests.support.metrics_text import Samples, shown, value
from cv_platform_tests.support.production import damage, point_to
from cv_platform_tests.support.tiny_models import TinyExport, publish_tiny
from cv_platform_tests.support.waiting import wait_until


def swaps(metrics: ServingMetrics) -> dict[str, float | None]:
    samples = shown(metrics)
    return {one: value(samples, "cv_model_swaps_total", outcome=one) for one in ("swapped", "refused", "fallback")}


def serving(samples: Samples) -> list[str]:
    return [dict(labels)["version"] for name, labels in samples if name == "cv_model_info"]


def test_swaps_refusals_and_fallbacks_are_counted(tmp_path: Path, hand_made: TinyExport):
    root = tmp_path / "storage"
    storage = CentralStorage(root)
    settings = Settings.from_environment({"CV_HOME": str(tmp_path / "home"), "CV_STORAGE": str(root)})
    metrics = ServingMetrics(prometheus_client.CollectorRegistry())
    first = publish_tiny(storage, hand_made)
    point_to(storage, first)
    assert swaps(metrics) == {"swapped": 0, "refused": 0, "fallback": 0}
    with open_worker(settings, metrics=metrics) as worker:
        assert swaps(metrics) == {"swapped": 1, "refused": 0, "fallback": 0}
        second = publish_tiny(storage, hand_made)
        point_to(storage, second)
        wait_until(lambda: swaps(metrics)["swapped"] == 2)
        broken = publish_tiny(storage, hand_made)
        damage(root, broken)
        point_to(storage, broken)
        wait_until(lambda: swaps(metrics)["refused"] == 1)
        samples = shown(metrics)
        assert serving(samples) == [second.version]
        assert value(samples, "cv_model_swap_duration_seconds_count", outcome="swapped") == 2
        assert value(samples, "cv_model_swap_duration_seconds_count", outcome="refused") == 1
        note_load(worker)
        assert value(shown(metrics), "cv_storage_up") == 1

    metrics = ServingMetrics(prometheus_client.CollectorRegistry())
    with open_worker(settings, metrics=metrics):
        pass
    assert swaps(metrics) == {"swapped": 0, "refused": 1, "fallback": 1}
    assert serving(shown(metrics)) == [second.version]
