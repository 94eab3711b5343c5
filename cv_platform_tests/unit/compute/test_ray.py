"""The engine `ray`; what needs a cluster is marked so, and `make test-ray` runs it on one of two cores."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cv_platform.compute import map_shards, open_engine, ray_engine
from cv_platform.compute.ray_engine import RayEngine, different_versions
from cv_platform.errors import ComputeError, InvalidDatasetError, ShardError
from cv_platform.settings import Settings
from cv_platform_tests.unit.datasets.test_engines import require_same_bytes

from .tasks import Noted, Numbers, doubled, noted, shards


def test_without_ray_the_error_says_which_extra_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    settings = Settings.from_environment({"CV_COMPUTE": "ray"})
    with pytest.raises(ComputeError, match=r"pip install 'cv-platform\[ray\]', or set CV_COMPUTE=local"):
        open_engine(settings)


def test_what_nodes_have_otherwise_is_named() -> None:
    here = {"python": "3.11.7", "numpy": "1.26.4"}
    nodes = {"one": here, "two": {"python": "3.12.1"}}
    assert different_versions(here, nodes) == [
        "two has python 3.12.1 instead of 3.11.7",
        "two has numpy none instead of 1.26.4",
    ]


@pytest.fixture(scope="module")
def ray() -> Iterator[RayEngine]:
    ray = pytest.importorskip("ray", reason="Ray, of the extra ray")
    yield RayEngine()
    ray.shutdown()


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_ray_makes_the_same_bytes(ray: RayEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_same_bytes(tmp_path, ray, monkeypatch)


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_shard_that_kills_its_workers_is_named_and_an_error_is_raised_as_it_is(ray: RayEngine) -> None:
    done: list[int] = []
    work = map_shards(doubled, shards(4), engine=ray, title="Doubling", total=8)
    with pytest.raises(ShardError, match=r"numbers from 6 \(has ended 3 processes, .* by WorkerCrashed\)"):
        done.extend(value for _, result in work for value in result)
    assert done == [0, 2, 4, 6, 8, 10]
    with pytest.raises(InvalidDatasetError, match="Expected no 9"):
        list(map_shards(doubled, [Numbers((9,))], engine=ray, title="Doubling", total=1))


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_killed_worker_costs_its_shard_alone(ray: RayEngine, tmp_path: Path) -> None:
    work = [Noted((number,), tmp_path, dies=number == 3) for number in range(8)]
    assert [result for _, result in map_shards(noted, work, engine=ray, title="Noting", total=8)] == [1] * 8
    counts = [len(list(tmp_path.glob(f"{number}-*"))) for number in range(8)]
    assert counts == [1, 1, 1, 2, 1, 1, 1, 1]


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_cluster_with_other_packages_is_refused(ray: RayEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ray.workers >= 1
    real = ray_engine.importlib.metadata.version
    monkeypatch.setattr(ray_engine.importlib.metadata, "version", lambda name: "1.0" if name == "numpy" else real(name))
    with pytest.raises(ComputeError, match=rf"has numpy {real('numpy')} instead of 1\.0\. Install the same ones"):
        ray_engine._require_same(sys.modules["ray"])
