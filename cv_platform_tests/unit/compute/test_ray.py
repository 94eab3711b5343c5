"""The engine `ray`; what needs a cluster is marked so, and `make test-ray` runs it on one of two cores."""

from __future__ import annotations

import compileall
import hashlib
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.ray_nodes import ray_nodes
from cv_platform.compute import map_shards, open_engine, ray_engine
from cv_platform.compute.ray_engine import SOURCE, RayEngine, different_versions
from cv_platform.datasets import manifest as manifests
from cv_platform.datasets.manifest import build_manifest
from cv_platform.errors import ComputeError, InvalidDatasetError, ShardError
from cv_platform.scoring import score
from cv_platform.scoring.score import score_images
from cv_platform.settings import Settings
from cv_platform.storage import CentralStorage
from cv_platform_tests import portable
from cv_platform_tests.support import poison
from cv_platform_tests.support.pictures import class_folders
from cv_platform_tests.support.tiny_models import TinyExport, publish_tiny
from cv_platform_tests.support.waiting import wait_until
from cv_platform_tests.unit.datasets.conftest import dataset, model
from cv_platform_tests.unit.datasets.test_engines import (
    require_embedding_without_poison,
    require_packing_names_poison,
    require_same_bytes,
)
from cv_platform_tests.unit.datasets.test_engines import require_poison_named as require_poison_in_manifest
from cv_platform_tests.unit.evaluation.test_engines import require_same_answers
from cv_platform_tests.unit.scoring.test_score import VERSION
from cv_platform_tests.unit.scoring.test_score import require_poison_named as require_poison_in_scores

from .tasks import Noted, Numbers, assigned, count_up, doubled, note_gpu, noted, noted_slowly, read_back, shards


def test_without_ray_the_error_says_which_extra_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    settings = Settings.from_environment({"CV_COMPUTE": "ray"})
    with pytest.raises(ComputeError, match=r"pip install 'cv-platform\[ray\]', or set CV_COMPUTE=local"):
        open_engine(settings)


def test_a_head_that_fails_to_start_what_serves_a_client_is_asked_again() -> None:
    failures = [ConnectionAbortedError("Starting Ray client server failed."), ConnectionAbortedError("again")]
    addresses: list[str] = []

    def init(*, address: str, **_: Any) -> None:
        addresses.append(address)
        if failures:
            raise failures.pop()

    ray_like = SimpleNamespace(init=init, shutdown=lambda: None, __version__="2.60.0")
    ray_engine._join(ray_like, "ray://head:10001")
    assert addresses == 3 * ["ray://head:10001"]
    failures += [RuntimeError("another Python")]
    with pytest.raises(ComputeError, match="another Python"):
        ray_engine._join(ray_like, "ray://head:10001")
    assert len(addresses) == 4, "what does not pass is not tried again"


def test_what_nodes_have_otherwise_is_named() -> None:
    here = {"python": "3.11.7", "numpy": "1.26.4"}
    nodes = {"one": here, "two": {"python": "3.12.1"}}
    assert different_versions(here, nodes) == [
        "two has python 3.12.1 instead of 3.11.7",
        "two has numpy none instead of 1.26.4",
    ]


def test_sources_are_told_apart_in_a_folder_and_in_a_zip_and_not_where_there_are_none(tmp_path: Path) -> None:
    def digest(of: Path) -> str:
        code = "import sys; from cv_platform.compute.ray_engine import source_digest; print(source_digest('pets'))"
        environment = {**os.environ, "PYTHONPATH": f"{of}"}
        return subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).strip()

    package = tmp_path / "folder" / "pets"
    for name in ("__init__.py", "dogs/__init__.py", "dogs/bark.py", "dogs/page.html"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(f"# {name}\n")
    # sha256 of each path, the bytes of its file, and what is in it.
    parts = (f"{name} {len(name) + 3}\n# {name}\n" for name in ("__init__.py", "dogs/__init__.py", "dogs/bark.py"))
    expected = hashlib.sha256("".join(parts).encode()).hexdigest()[:12]
    assert digest(package.parent) == expected
    assert digest(Path(shutil.make_archive(str(tmp_path / "pets"), "zip", package.parent))) == expected
    (package / "dogs" / "bark.py").write_text("# another dog\n")
    other = digest(package.parent)
    assert other != expected
    compileall.compile_dir(package, quiet=1, legacy=True)
    for path in package.rglob("*.py"):
        path.unlink()
    assert digest(package.parent) == ""
    nodes = {"one": {SOURCE: ""}, "two": {SOURCE: other}, "three": {}}
    assert different_versions({SOURCE: expected}, nodes) == [
        f"two has source of cv-platform {other} instead of {expected}",
        f"three has source of cv-platform none instead of {expected}",  # Of an earlier release.
    ]
    assert different_versions({SOURCE: ""}, {"two": {SOURCE: other}}) == []


def test_a_processor_is_told_by_what_it_rounds_by() -> None:
    told = {name: _processor(environment) for name, environment in portable.settings().items()}
    assert len({ray_engine.processor(), *told.values()}) == 1 + len(told)
    for name, processor in told.items():
        assert processor.split()[0] == ray_engine.platform.machine()
        assert not name.startswith("AVX2 ") or processor.endswith(" AVX2")


def _processor(environment: dict[str, str]) -> str:
    code = "from cv_platform.compute.ray_engine import processor; print(processor())"
    return subprocess.check_output([sys.executable, "-c", code], env={**os.environ, **environment}, text=True).strip()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    pytest.importorskip("ray", reason="Ray, of the extra ray")
    with ray_nodes(2) as nodes:
        yield nodes


@pytest.fixture
def ray(cluster: Any) -> RayEngine:
    return RayEngine(str(cluster.address))


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_ray_makes_the_same_bytes(ray: RayEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_same_bytes(tmp_path, ray, monkeypatch)


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_networks_give_the_same_answers_by_ray(ray: RayEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_same_answers(tmp_path, ray, monkeypatch)


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_an_image_that_kills_workers_is_a_row_of_a_manifest_and_of_scores(
    ray: RayEngine, tmp_path: Path, hand_made: TinyExport, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = class_folders(tmp_path / "images", 6)
    monkeypatch.setattr(manifests, "describe", poison.describes)
    monkeypatch.setattr(score, "score_batch", poison.scores)
    build_manifest(tmp_path, data_path="images", annotations=None, model=model(), dataset=dataset(), engine=ray)
    require_poison_in_manifest(tmp_path)
    settings = Settings.from_environment({"CV_HOME": str(tmp_path / "home")})
    publish_tiny(CentralStorage(settings.storage_url), hand_made, VERSION)
    output = tmp_path / "scores.parquet"
    scored = score_images(str(images), VERSION, output, settings=settings, engine=ray)
    assert (scored.images, scored.problems) == (12, 1)
    require_poison_in_scores(output, images)


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_an_image_that_kills_workers_has_no_embedding_and_is_named_by_the_packing(
    ray: RayEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_embedding_without_poison(tmp_path / "embedded", ray, monkeypatch)
    require_packing_names_poison(tmp_path / "packed", ray, monkeypatch)


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_shard_that_kills_its_workers_is_named_and_an_error_is_raised_as_it_is(ray: RayEngine) -> None:
    done: list[int] = []
    work = map_shards(doubled, shards(4), engine=ray, title="Doubling", total=8)
    with pytest.raises(ShardError, match=r"numbers from 6 \(has ended 3 processes, .* by WorkerCrashed\)"):
        done.extend(value for _, result in work for value in result)
    assert done == [0, 2, 4, 6, 8, 10]
    with pytest.raises(InvalidDatasetError, match="Expected no 9") as caught:
        list(map_shards(doubled, [Numbers((9,))], engine=ray, title="Doubling", total=1))
    assert caught.value.__notes__ == [f"Of numbers from 9, in a process of its own on {socket.gethostname()}"]


FULL = """
from cv_platform.compute import map_shards, ray_engine
from cv_platform_tests.unit.compute.tasks import held, shards
ray_engine._require_same = lambda ray: None  # A task that the monitor would end, too.
list(map_shards(held, shards(1), engine=ray_engine.RayEngine(), title="Holding", total=2))
"""


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_shard_that_rays_memory_monitor_ends_is_given_up() -> None:
    pytest.importorskip("ray", reason="Ray, of the extra ray")
    monitor = {"RAY_memory_usage_threshold": "0.01", "RAY_memory_monitor_refresh_ms": "100"}
    run = subprocess.run([sys.executable, "-c", FULL], env={**os.environ, **monitor}, capture_output=True, text=True)
    assert "numbers from 0 (has ended 3 processes, the last of which by OutOfMemory)" in run.stderr


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_killed_worker_costs_its_shard_alone(
    ray: RayEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    work = [Noted((number,), tmp_path, dies=number == 3) for number in range(8)]
    assert [result for _, result in map_shards(noted, work, engine=ray, title="Noting", total=8)] == [1] * 8
    counts = [len(list(tmp_path.glob(f"{number}-*"))) for number in range(8)]
    assert counts == [1, 1, 1, 2, 1, 1, 1, 1]
    (said,) = caplog.messages
    assert said == "A worker of Ray: numbers from 3 is tried again, after the end of a process that worked on it (1)"


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_cluster_with_other_packages_is_refused(ray: RayEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ray.workers >= 1
    real = ray_engine.importlib.metadata.version
    monkeypatch.setattr(ray_engine.importlib.metadata, "version", lambda name: "1.0" if name == "numpy" else real(name))
    with pytest.raises(ComputeError, match=rf"has numpy {real('numpy')} instead of 1\.0\. Install the same ones"):
        ray_engine._require_same(sys.modules["ray"])


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_cluster_with_another_check_out_of_the_same_version_is_refused(cluster: Any, tmp_path: Path) -> None:
    """Not from this check-out: workers of its machine would import what lies in the driver's working folder."""
    there = shutil.copytree(Path(ray_engine.__file__).parents[1], tmp_path / "there" / "cv_platform")
    node = cluster.add_node(num_cpus=1, env_vars={"PYTHONPATH": str(there.parent)})
    code = "import sys; from cv_platform.compute.ray_engine import RayEngine; print(RayEngine(sys.argv[1]).workers)"
    join = [sys.executable, "-c", code, str(cluster.address)]
    try:
        cluster.wait_for_nodes()
        same = subprocess.run(join, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert int(same.stdout) >= 3
        with (there / "properties.py").open("a") as file:
            file.write("# one more line\n")
        other = subprocess.run(join, cwd=tmp_path, capture_output=True, text=True, check=False)
    finally:
        cluster.remove_node(node)
    here = ray_engine.source_digest("cv_platform")
    said = rf"\({node.node_id[:8]}\) has source of cv-platform \w{{12}} instead of {here}\. Install .* same check-out"
    assert re.search(said, other.stderr), other.stderr
    assert other.stderr.count("instead of") == 1, "of one node"


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_processors_that_round_otherwise_are_named(
    ray: RayEngine, cluster: Any, caplog: pytest.LogCaptureFixture
) -> None:
    assert ray.workers >= 1
    ray_engine._require_same(sys.modules["ray"])
    assert caplog.messages == [], "nodes of this machine are alike"
    older = next(iter(portable.settings().values()))
    node = cluster.add_node(num_cpus=1, env_vars=older)
    try:
        cluster.wait_for_nodes()
        ray_engine._require_same(sys.modules["ray"])
    finally:
        cluster.remove_node(node)
    (said,) = caplog.messages
    assert f"than this one ({ray_engine.processor()}): " in said
    assert f"({node.node_id[:8]}) has {_processor(older)}. Vectors" in said


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_without_an_address_a_ray_of_its_own_is_started_beside_a_running_cluster(cluster: Any) -> None:
    code = """
from cv_platform.compute.ray_engine import RayEngine
engine = RayEngine()
engine.workers
import ray
print(ray.get_runtime_context().gcs_address)
"""
    environment = {**os.environ, "RAY_ADDRESS": str(cluster.address)}
    own = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).split()[-1]
    assert own != str(cluster.address)


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_shards_wait_for_a_storage_that_is_away(
    ray: RayEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def come_back() -> None:
        wait_until(lambda: list(tmp_path.glob("asked-*")))
        (tmp_path / "storage").mkdir()

    returning = threading.Thread(target=come_back)
    returning.start()
    work = [Noted((number,), tmp_path) for number in range(6)]
    assert [images for _, images in map_shards(read_back, work, engine=ray, title="Reading", total=6)] == [1] * 6
    returning.join()
    waited = r"A worker of Ray: numbers from \d is tried again in 1 s: Expected the storage\. Received: nothing"
    assert re.search(waited, caplog.text), "the driver's log has it"


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_killed_node_costs_the_shards_that_it_worked_on(ray: RayEngine, cluster: Any, tmp_path: Path) -> None:
    node = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    work = [Noted((number,), tmp_path) for number in range(12)]
    done: list[tuple[Noted, int]] = []
    for outcome in map_shards(noted_slowly, work, engine=ray, title="Noting", total=12):
        if not done:
            for process in node.all_processes["raylet"]:
                process.process.kill()
        done.append(outcome)
    assert done == [(shard, 1) for shard in work]
    counts = [len(list(tmp_path.glob(f"{number}-*"))) for number in range(12)]
    assert min(counts) == 1
    assert sum(counts) <= 12 + 2, "what another node had finished is not done again"


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_task_has_memory_kept_for_it(ray: RayEngine) -> None:
    made = [result for _, result in map_shards(assigned, shards(3), engine=ray, title="Memory", total=6)]
    assert [(round(one["CPU"]), round(one["memory"])) for one in made] == 3 * [(1, 2**30)]


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_node_that_comes_later_with_another_package_is_refused(ray: RayEngine, cluster: Any, tmp_path: Path) -> None:
    assert ray.workers == 2, "the cluster is joined, and its nodes are asked"
    other = tmp_path / "simplejpeg-99.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: simplejpeg\nVersion: 99.0\n")
    node = cluster.add_node(num_cpus=1, env_vars={"PYTHONPATH": str(tmp_path)})
    try:
        wait_until(lambda: ray.workers == 3)  # Cluster counts a node that another test has killed, too.
        wrong = rf"\({node.node_id[:8]}\) has simplejpeg 99\.0 instead of .*\. Install the same ones there"
        work = [Noted((number,), tmp_path) for number in range(12)]
        with pytest.raises(ComputeError, match=wrong):
            list(map_shards(noted_slowly, work, engine=ray, title="Noting", total=12))
        with pytest.raises(ComputeError, match=wrong), ray.together(partial(note_gpu, tmp_path), 3):
            pass
    finally:
        cluster.remove_node(node)


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_what_the_first_of_several_reports_comes_in_order_and_before_its_error(ray: RayEngine) -> None:
    received: list[int] = []
    with ray.together(partial(count_up, False), 2, receive=received.append) as first_death:
        assert first_death() is None
    with (
        ray.together(partial(count_up, True), 2, receive=received.append) as first_death,
        pytest.raises(InvalidDatasetError, match=r"Expected five\. Received: four\."),
    ):
        first_death()
    assert received == [0, 1, 2, 3, 0, 1, 2, 3]


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_processes_that_work_together_wait_for_a_gpu_each(
    ray: RayEngine, cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ray.gpus_each(1) == 0
    work = partial(note_gpu, tmp_path)
    with monkeypatch.context() as context:
        context.setattr(ray_engine, "_PLACE_SECONDS", 0.1)
        with pytest.raises(ComputeError, match=r"2 cores and 2 GPUs, for 2 members. Received: 2 and 0, "):
            ray.together(work, 2, gpus_each=1).__enter__()

    def wait_for_all() -> str | None:
        with ray.together(work, 2, gpus_each=1) as first_death:
            return first_death()

    with ThreadPoolExecutor(1) as pool:
        death = pool.submit(wait_for_all)
        nodes = [cluster.add_node(num_cpus=1, num_gpus=1) for _ in range(2)]
        try:
            assert death.result() is None
            assert (ray.gpus_each(2), ray.gpus_each(3)) == (1, 0)
        finally:
            for node in nodes:
                cluster.remove_node(node)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"0-of-2": "[0] 0", "1-of-2": "[0] 0"}
