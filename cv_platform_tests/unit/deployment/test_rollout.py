import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest

from cv_platform.config import DeployConfig
from cv_platform.deployment.rollout import deploy, rollback
from cv_platform.errors import CorruptBundleError, DeploymentError
from cv_platform.files import exclusive
from cv_platform.serving.model import worker_watch
from cv_platform.serving.model.holder import ModelHolder, Pace
from cv_platform.serving.model.promotion import PROMOTION_LOCK, Promoter
from cv_platform.storage import CentralStorage, ProductionPointer, WorkerHeartbeat
from cv_platform_tests.support.record_samples import model_bundle
from cv_platform_tests.support.tiny_models import TinyExport, publish_tiny
from cv_platform_tests.support.waiting import wait_until

SERVICE = "image_classifier"


def config(timeout_seconds: float = 30.0) -> DeployConfig:
    return DeployConfig(service=SERVICE, confirm_timeout_seconds=timeout_seconds)


@pytest.fixture
def storage(tmp_path: Path) -> CentralStorage:
    return CentralStorage(tmp_path / "storage")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], ModelHolder]]:
    """Starts real workers' holders, and stops them at the end."""
    holders: list[ModelHolder] = []

    def make(worker_id: str, url: Path | None = None) -> ModelHolder:
        holder = ModelHolder(
            worker_watch.WorkerWatch(CentralStorage(url or tmp_path / "storage"), SERVICE),
            worker_id=worker_id,
            cache=tmp_path / f"cache-{worker_id}",
            pace=Pace(poll_seconds=0.02),
        )
        holders.append(holder)
        holder.start()
        wait_until(lambda: worker_id in {beat.worker_id for beat in holder._storage.read_heartbeats(SERVICE)})
        return holder

    yield make
    for holder in holders:
        holder.stop()


@pytest.fixture
def beating(storage: CentralStorage) -> Iterator[Callable[..., None]]:
    """Starts workers that beat, whose clocks are an hour off, and that take no version that they are not given."""
    stopping = threading.Event()
    threads: list[threading.Thread] = []

    def beat(worker_id: str, n: int, **says: Any) -> None:
        now = datetime.now(UTC) + timedelta(hours=-1, microseconds=n)
        storage.write_heartbeat(SERVICE, WorkerHeartbeat(worker_id=worker_id, beat_utc=now, **says))

    def go_on(worker_id: str, **says: Any) -> None:
        for n in itertools.count(1):
            if stopping.wait(0.05):
                return
            beat(worker_id, n, **says)

    def start(worker_id: str, **says: Any) -> None:
        beat(worker_id, 0, **says)  # here, as a deployment that lists the workers before the first beat sees none
        threads.append(threading.Thread(target=go_on, args=(worker_id,), kwargs=says))
        threads[-1].start()

    yield start
    stopping.set()
    for thread in threads:
        thread.join(timeout=30)


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has not beaten for two seconds counts as dead: forty beats of `beating`."""
    monkeypatch.setattr(worker_watch, "HEARTBEAT_STALE_SECONDS", 2.0)


def pointer_version(storage: CentralStorage) -> str | None:
    pointer = storage.read_pointer(SERVICE)
    return pointer.version if pointer else None


def test_every_running_worker_confirms(storage: CentralStorage, cache: Path, start, hand_made: TinyExport):
    first, second = publish_tiny(storage, hand_made), publish_tiny(storage, hand_made)
    deploy(model_bundle(first).model, config(), experiment="tiny", storage=storage, cache=cache)
    workers = [start("a"), start("b")]
    done = deploy(model_bundle(second).model, config(), experiment="tiny", storage=storage, cache=cache)
    assert done.confirmed_workers == ("a", "b")
    assert (done.model.version, done.previous_version) == (second.version, first.version)
    assert "2 worker(s)" in done.message
    assert [worker.status()["model_version"] for worker in workers] == [second.version] * 2


@pytest.mark.usefixtures("_impatient")
def test_without_a_running_service_the_next_start_serves_it(
    storage: CentralStorage, cache: Path, start, hand_made: TinyExport
):
    metadata = publish_tiny(storage, hand_made)
    # A worker that died without a goodbye does not count, however fresh its last beat looks.
    storage.write_heartbeat(SERVICE, WorkerHeartbeat(worker_id="dead", beat_utc=datetime.now(UTC)))
    done = deploy(model_bundle(metadata).model, config(), experiment="tiny", storage=storage, cache=cache)
    assert done.confirmed_workers == ()
    assert done.previous_version is None
    assert "no service is running; the next start serves it" in done.message
    assert "without a heartbeat" in done.message
    assert done.message.endswith(": dead")
    assert start("a").status()["model_version"] == metadata.version


@pytest.mark.usefixtures("_impatient")
def test_what_a_dead_worker_has_said_confirms_nothing(
    storage: CentralStorage, cache: Path, beating, hand_made: TinyExport
):
    metadata = publish_tiny(storage, hand_made)
    served: dict[str, Any] = {"model_name": metadata.model_name, "version": metadata.version}
    storage.write_heartbeat(SERVICE, WorkerHeartbeat(worker_id="dead", beat_utc=datetime.now(UTC), **served))
    beating("b", **served)
    done = deploy(model_bundle(metadata).model, config(), experiment="tiny", storage=storage, cache=cache)
    assert done.confirmed_workers == ("b",)
    assert done.message.endswith(": dead")


def test_a_worker_that_lives_by_another_clock_is_waited_for(
    storage: CentralStorage, cache: Path, beating, hand_made: TinyExport
):
    good, new = publish_tiny(storage, hand_made), publish_tiny(storage, hand_made)
    deploy(model_bundle(good).model, config(), experiment="tiny", storage=storage, cache=cache)
    beating("an-hour-behind", model_name="tiny", version=good.version)
    with pytest.raises(DeploymentError, match=f"an-hour-behind \\(runs {good.version}\\)"):
        deploy(model_bundle(new).model, config(0.3), experiment="tiny", storage=storage, cache=cache)
    assert pointer_version(storage) == good.version


@pytest.mark.usefixtures("_impatient")
def test_a_version_that_kills_every_worker_is_not_taken_for_a_service_that_does_not_run(
    storage: CentralStorage, cache: Path, hand_made: TinyExport
):
    good, new = publish_tiny(storage, hand_made), publish_tiny(storage, hand_made)
    deploy(model_bundle(good).model, config(), experiment="tiny", storage=storage, cache=cache)

    def beat_until_it_is_there() -> None:
        while pointer_version(storage) != new.version:
            storage.write_heartbeat(SERVICE, WorkerHeartbeat(worker_id="victim", beat_utc=datetime.now(UTC)))
            time.sleep(0.05)

    victim = threading.Thread(target=beat_until_it_is_there)
    victim.start()
    wait_until(lambda: bool(storage.read_heartbeats(SERVICE)))
    with pytest.raises(DeploymentError, match="those that ran have stopped"):
        deploy(model_bundle(new).model, config(4.0), experiment="tiny", storage=storage, cache=cache)
    victim.join(timeout=30)
    assert pointer_version(storage) == good.version


def test_a_bundle_that_fails_its_load_test_moves_nothing(
    storage: CentralStorage, cache: Path, tmp_path: Path, hand_made: TinyExport
):
    good, bad = publish_tiny(storage, hand_made), publish_tiny(storage, hand_made)
    deploy(model_bundle(good).model, config(), experiment="tiny", storage=storage, cache=cache)
    (tmp_path / "storage" / "models" / "tiny" / bad.version / "golden.npz").write_bytes(b"")
    with pytest.raises(CorruptBundleError):
        deploy(model_bundle(bad).model, config(), experiment="tiny", storage=storage, cache=cache)
    assert pointer_version(storage) == good.version


def test_a_worker_that_cannot_take_the_version_is_named_and_the_pointer_put_back(
    storage: CentralStorage, cache: Path, tmp_path: Path, start, hand_made: TinyExport
):
    good, new = publish_tiny(storage, hand_made), publish_tiny(storage, hand_made)
    deploy(model_bundle(good).model, config(), experiment="tiny", storage=storage, cache=cache)
    start("a")
    # This worker reaches the same pointer and heartbeats, but another, broken copy of the bundles.
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "services").symlink_to(tmp_path / "storage" / "services")
    other = CentralStorage(broken)
    publish_tiny(other, hand_made, good.version)
    publish_tiny(other, hand_made, new.version)
    (broken / "models" / "tiny" / new.version / "golden.npz").unlink()
    worker = start("b", broken)
    with pytest.raises(DeploymentError, match=r"b: .*golden\.npz"):
        deploy(model_bundle(new).model, config(), experiment="tiny", storage=storage, cache=cache)
    assert pointer_version(storage) == good.version
    assert worker.status()["model_version"] == good.version


def test_an_error_about_an_earlier_pointer_is_not_held_against_this_deployment(
    storage: CentralStorage, cache: Path, beating, hand_made: TinyExport
):
    metadata = publish_tiny(storage, hand_made)
    beating(
        "a",
        model_name=metadata.model_name,
        version=metadata.version,
        last_swap_error="an old one",
        failed_version=metadata.version,
        failed_pointer_utc=datetime.now(UTC) - timedelta(minutes=1),
    )
    done = deploy(model_bundle(metadata).model, config(), experiment="tiny", storage=storage, cache=cache)
    assert done.confirmed_workers == ("a",)


def test_a_worker_that_does_not_answer_in_time_puts_the_pointer_back(
    storage: CentralStorage, cache: Path, beating, hand_made: TinyExport
):
    good, new = publish_tiny(storage, hand_made), publish_tiny(storage, hand_made)
    deploy(model_bundle(good).model, config(), experiment="tiny", storage=storage, cache=cache)
    beating("stuck", model_name="tiny", version=good.version)
    with pytest.raises(DeploymentError, match=f"stuck \\(runs {good.version}\\)"):
        deploy(model_bundle(new).model, config(0.3), experiment="tiny", storage=storage, cache=cache)
    assert pointer_version(storage) == good.version


def test_a_first_deployment_that_fails_leaves_no_pointer(
    storage: CentralStorage, cache: Path, beating, hand_made: TinyExport
):
    metadata = publish_tiny(storage, hand_made)
    beating("stuck")
    with pytest.raises(DeploymentError, match="runs nothing"):
        deploy(model_bundle(metadata).model, config(0.3), experiment="tiny", storage=storage, cache=cache)
    assert storage.read_pointer(SERVICE) is None


def test_an_update_while_a_deployment_waits_for_its_turn_is_what_a_failure_returns_to(
    storage: CentralStorage, cache: Path, beating, hand_made: TinyExport
):
    first, second, third = (publish_tiny(storage, hand_made) for _ in range(3))
    deploy(model_bundle(first).model, config(), experiment="tiny", storage=storage, cache=cache)
    beating("stuck")
    lock = cache / PROMOTION_LOCK
    with ThreadPoolExecutor(1) as pool:
        with exclusive(lock, timeout_seconds=1):  # As another update holds it, which then moves the pointer.
            held = _open_files(lock)
            failing = pool.submit(
                deploy, model_bundle(third).model, config(0.3), experiment="tiny", storage=storage, cache=cache
            )
            wait_until(lambda: _open_files(lock) > held)
            before = storage.read_pointer(SERVICE)
            assert before is not None
            update = before.model_copy(update={"version": second.version, "since_utc": datetime.now(UTC)})
            storage.swap_pointer(SERVICE, before, update)
        with pytest.raises(DeploymentError, match="stuck"):
            failing.result(timeout=60)
    assert storage.read_pointer(SERVICE) == update


def _open_files(path: Path) -> int:
    """Counts the descriptors of this process that are open on a file."""
    return [file.path for file in psutil.Process().open_files()].count(str(path))


def test_an_update_at_the_moment_of_putting_back_stays(
    storage: CentralStorage, cache: Path, beating, hand_made: TinyExport
):
    class Hurried(CentralStorage):
        """Lets somebody else promote `third` once this deployment has given up, before it puts the pointer back."""

        def swap_pointer(self, service: str, expected: ProductionPointer | None, new: ProductionPointer | None) -> None:
            if new is not None and new.version == first.version and expected is not None:
                Promoter(storage, SERVICE, cache, cache / PROMOTION_LOCK).promote(third.model_name, third.version)
            super().swap_pointer(service, expected, new)

    first, second, third = (publish_tiny(storage, hand_made) for _ in range(3))
    deploy(model_bundle(first).model, config(), experiment="tiny", storage=storage, cache=cache)
    beating("stuck")
    with pytest.raises(DeploymentError):
        deploy(model_bundle(second).model, config(0.3), experiment="tiny", storage=Hurried(storage.url), cache=cache)
    assert pointer_version(storage) == third.version


def test_rollback_returns_to_the_version_before(storage: CentralStorage, cache: Path, start, hand_made: TinyExport):
    first, second = publish_tiny(storage, hand_made), publish_tiny(storage, hand_made)
    deploy(model_bundle(first).model, config(), experiment="tiny", storage=storage, cache=cache)
    worker = start("a")
    deploy(model_bundle(second).model, config(), experiment="tiny", storage=storage, cache=cache)
    done = rollback(SERVICE, storage, cache)
    assert (done.model.version, done.previous_version) == (first.version, second.version)
    assert done.confirmed_workers == ("a",)
    assert worker.status()["model_version"] == first.version


def test_rollback_refuses_before_a_second_deployment(storage: CentralStorage, cache: Path):
    with pytest.raises(DeploymentError, match="nothing was deployed"):
        rollback(SERVICE, storage, cache)
