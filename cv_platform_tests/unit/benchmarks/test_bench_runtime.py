from __future__ import annotations

from benchmarks.bench_runtime import _judge
from benchmarks.harness import Observation


def served(worker_ready_seconds: float, worker_mib: float) -> list[Observation]:
    metrics = {
        "p50_ms": 5.0,
        "worker_ready_seconds": worker_ready_seconds,
        "ready_seconds": worker_ready_seconds + 1.0,
        "worker_mib": worker_mib,
    }
    return [Observation(units=10, wall_seconds=1.0, cpu_seconds=1.0, metrics=metrics)]


def called(wall_seconds: float) -> list[Observation]:
    return [Observation(units=10, wall_seconds=wall_seconds, cpu_seconds=None)]


def test_each_promise_is_judged_by_its_ratio() -> None:
    _, checks = _judge(
        {
            "onnx, served": served(worker_ready_seconds=4.0, worker_mib=100.0),
            "tensorflow, served": served(worker_ready_seconds=10.0, worker_mib=500.0),
            "onnx, in process": called(0.5),
            "tensorflow, in process": called(1.0),
        },
        seed=0,
    )
    held = {check.what.partition(", ONNX")[0]: check.held for check in checks}
    assert held == {
        "memory of a worker": True,
        "start of a worker to ready": False,
        "start of BentoML to ready": True,
        "latency over HTTP, p50": True,
        "latency of the combined call": True,
    }
