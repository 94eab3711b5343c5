import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from cv_platform.serving.model.fallback import write_fallback
from cv_platform.serving.model.holder import ModelHolder, Pace, make_worker_id
from cv_platform.serving.model.worker_watch import WorkerWatch
from cv_platform.storage import CentralStorage, ProductionPointer, WorkerHeartbeat
from cv_platform_tests.support.production import SERVICE, damage, point_to, version_of
from cv_platform_tests.support.tiny_models import MODEL_NAME, TinyExport, publish_tiny, tiny_images
from cv_platform_tests.support.waiting import wait_until


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "storage"


@pytest.fixture
def storage(root: Path) -> CentralStorage:
    return CentralStorage(root)


@pytest.fixture
def start(storage: CentralStorage, cache: Path) -> Iterator[Callable[..., ModelHolder]]:
    """Starts holders, and stops them at the end."""
    holders: list[ModelHolder] = []

    def make(*, bundled: Path | None = None, worker_id: str | None = None, **pace: float) -> ModelHolder:
        holder = ModelHolder(
            WorkerWatch(storage, SERVICE),
            worker_id=worker_id or f"worker-{len(holders)}",
            cache=cache,
            bundled=bundled,
            pace=Pace(poll_seconds=0.02, **pace),
        )
        holders.append(holder)
        holder.start()
        return holder

    yield make
    for holder in holders:
        holder.stop()


def test_starts_with_the_version_that_the_pointer_names(storage, start, hand_made: TinyExport):
    older, newer = publish_tiny(storage, hand_made), publish_tiny(storage, hand_made)
    point_to(storage, older)
    holder = start()
    assert version_of(holder) == older.version != newer.version
    status = holder.status()
    assert status["model_source"] == "pointer"
    assert status["pointer_version"] == older.version
    assert status["last_swap_error"] is None
    json.dumps(status)


def test_starts_without_a_model_and_takes_the_first_deployment(storage, start, hand_made: TinyExport):
    holder = start()
    assert holder.current() is None
    metadata = publish_tiny(storage, hand_made)
    point_to(storage, metadata)
    wait_until(lambda: version_of(holder) == metadata.version)
    assert holder.status()["model_source"] == "pointer"


def test_swaps_under_load_without_a_failed_or_mixed_answer(
    storage, start, hand_made: TinyExport, other_hand_made: TinyExport
):
    one, two = publish_tiny(storage, hand_made), publish_tiny(storage, other_hand_made)
    point_to(storage, one)
    holder = start()
    image = tiny_images(1, seed=9)[0]
    first = holder.current()
    assert first is not None
    answers: list[tuple[str, np.ndarray]] = []
    failures: list[BaseException] = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            try:
                model = holder.current()
                assert model is not None
                answers.append((model.metadata.version, model.predict(image).probabilities))
            except BaseException as err:
                failures.append(err)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for metadata in (two, one, two):
        point_to(storage, metadata)
        wait_until(lambda version=metadata.version: bool(answers) and answers[-1][0] == version)
        # What came last may have been asked of the version before.
        wait_until(lambda version=metadata.version: holder.status()["model_version"] == version)
    done.set()
    for thread in threads:
        thread.join(timeout=30)
    assert not failures
    second = holder.current()
    assert second is not None
    expected = {one.version: first.predict(image).probabilities, two.version: second.predict(image).probabilities}
    assert np.abs(expected[one.version] - expected[two.version]).max() > 1e-3
    assert all(np.allclose(probabilities, expected[version], atol=1e-6) for version, probabilities in answers)


def test_a_corrupt_bundle_leaves_the_last_good_model_serving(storage, root, start, hand_made: TinyExport):
    good, bad = publish_tiny(storage, hand_made), publish_tiny(storage, hand_made)
    damage(root, bad)
    point_to(storage, good)
    holder = start()
    pointer = point_to(storage, bad)
    wait_until(lambda: holder.status()["failed_version"] == bad.version)
    assert version_of(holder) == good.version
    assert "golden.npz" in holder.status()["last_swap_error"]
    wait_until(lambda: storage.read_heartbeats(SERVICE)[0].failed_version == bad.version)
    beat = storage.read_heartbeats(SERVICE)[0]
    assert (beat.version, beat.failed_pointer_utc) == (good.version, pointer.since_utc)

    point_to(storage, good)
    wait_until(lambda: holder.status()["failed_version"] is None)
    assert holder.status()["last_swap_error"] is None


def test_a_version_that_failed_is_left_alone_until_the_pointer_moves(storage, root, start, hand_made: TinyExport):
    bad = publish_tiny(storage, hand_made)
    path = root / "models" / MODEL_NAME / bad.version / "golden.npz"
    whole = path.read_bytes()
    damage(root, bad)
    point_to(storage, bad)
    holder = start(retry_seconds=3600.0)
    assert holder.status()["failed_version"] == bad.version
    path.write_bytes(whole)
    holder._follow_pointer()
    assert holder.current() is None
    point_to(storage, bad)
    wait_until(lambda: version_of(holder) == bad.version)
    assert (holder.status()["failed_version"], holder.status()["last_swap_error"]) == (None, None)


def test_a_version_that_failed_is_tried_again_after_a_while(storage, root, start, hand_made: TinyExport):
    bad = publish_tiny(storage, hand_made)
    path = root / "models" / MODEL_NAME / bad.version / "golden.npz"
    whole = path.read_bytes()
    damage(root, bad)
    point_to(storage, bad)
    holder = start(retry_seconds=0.05)
    path.write_bytes(whole)
    wait_until(lambda: version_of(holder) == bad.version)
    assert (holder.status()["failed_version"], holder.status()["last_swap_error"]) == (None, None)


@pytest.mark.parametrize("content", [b"", b"{", b'{"model_name": "tiny"}', b"\xff\xfe"])
def test_an_unreadable_pointer_changes_nothing(storage, root, start, hand_made: TinyExport, content: bytes):
    metadata = publish_tiny(storage, hand_made)
    point_to(storage, metadata)
    holder = start()
    (root / "services" / SERVICE / "production.json").write_bytes(content)
    wait_until(lambda: holder.status()["storage_error"] is not None)
    assert version_of(holder) == metadata.version


def test_storage_that_goes_away_changes_nothing_and_its_return_is_noticed(storage, root, start, hand_made: TinyExport):
    metadata = publish_tiny(storage, hand_made)
    point_to(storage, metadata)
    holder = start()
    away = root.with_name("away")
    root.rename(away)

    def is_a_file() -> bool:
        shutil.rmtree(root, ignore_errors=True)  # A heartbeat may have made it anew.
        with suppress(IsADirectoryError):
            root.write_text("a file where the folder was")
        return root.is_file()

    wait_until(is_a_file)
    wait_until(lambda: holder.status()["storage_error"] is not None)
    assert version_of(holder) == metadata.version

    def is_back() -> bool:
        shutil.rmtree(root, ignore_errors=True)
        with suppress(OSError):
            away.rename(root)
        return not away.exists()

    root.unlink()
    wait_until(is_back)
    wait_until(lambda: holder.status()["storage_error"] is None)
    assert version_of(holder) == metadata.version


def test_a_pointer_that_vanishes_is_noticed_and_changes_nothing(storage, root, start, hand_made: TinyExport):
    metadata = publish_tiny(storage, hand_made)
    point_to(storage, metadata)
    holder = start()
    away = root.with_name("away")
    root.rename(away)  # An unmounted disk: an empty folder, which the heartbeat makes anew.
    wait_until(lambda: "pointer" in (holder.status()["storage_error"] or ""))
    assert version_of(holder) == metadata.version

    def is_back() -> bool:
        shutil.rmtree(root, ignore_errors=True)
        try:
            away.rename(root)
        except OSError:  # A heartbeat was faster.
            return False
        return True

    wait_until(is_back)
    wait_until(lambda: holder.status()["storage_error"] is None)
    assert version_of(holder) == metadata.version


class FlakyStorage(CentralStorage):
    """Storage whose driver raises an error of its own while `broken`."""

    broken = False

    def read_pointer(self, service: str) -> ProductionPointer | None:
        if self.broken:
            raise RuntimeError("the driver's own error")
        return super().read_pointer(service)


def test_an_error_of_the_storage_driver_does_not_end_the_following(storage, root, cache, hand_made: TinyExport):
    one, two = publish_tiny(storage, hand_made), publish_tiny(storage, hand_made)
    point_to(storage, one)
    flaky = FlakyStorage(root)
    holder = ModelHolder(WorkerWatch(flaky, SERVICE), worker_id="w", cache=cache, pace=Pace(poll_seconds=0.02))
    holder.start()
    try:
        flaky.broken = True
        wait_until(lambda: holder.status()["storage_error"] == "the driver's own error")
        flaky.broken = False
        point_to(storage, two)
        wait_until(lambda: version_of(holder) == two.version)
        assert holder.status()["storage_error"] is None
    finally:
        holder.stop()


def test_starts_from_the_last_good_version_when_the_pointer_names_a_corrupt_one(
    storage, root, start, hand_made: TinyExport
):
    good, bad = publish_tiny(storage, hand_made), publish_tiny(storage, hand_made)
    damage(root, bad)
    point_to(storage, good)
    start().stop()
    point_to(storage, bad)
    holder = start()
    assert version_of(holder) == good.version
    assert holder.status()["model_source"] == "last good"
    assert holder.status()["failed_version"] == bad.version


def test_starts_from_the_last_good_version_when_storage_is_gone(storage, root, start, hand_made: TinyExport):
    metadata = publish_tiny(storage, hand_made)
    point_to(storage, metadata)
    start().stop()
    shutil.rmtree(root)
    root.write_text("a file where the folder was")
    holder = start()
    assert version_of(holder) == metadata.version
    model = holder.current()
    assert model is not None
    assert model.predict(tiny_images(1)[0]).probabilities.shape == (3,)
    root.unlink()


def test_a_corrupt_last_good_version_falls_back_to_the_bundled_model(
    storage, root, start, cache, tmp_path, hand_made: TinyExport, other_hand_made: TinyExport
):
    good = publish_tiny(storage, hand_made)
    bundled = publish_tiny(storage, other_hand_made)
    write_fallback(other_hand_made.folder, bundled, tmp_path / "bundled")
    point_to(storage, good)
    start().stop()
    damage(root, good)
    damage(cache / "last_good", good)
    holder = start(bundled=tmp_path / "bundled")
    assert version_of(holder) == bundled.version
    assert holder.status()["model_source"] == "bundled"


def test_a_bundled_model_serves_until_a_version_is_deployed_and_is_not_kept_as_last_good(
    storage, start, cache, tmp_path, hand_made: TinyExport, other_hand_made: TinyExport
):
    bundled = publish_tiny(storage, other_hand_made)
    write_fallback(other_hand_made.folder, bundled, tmp_path / "bundled")
    holder = start(bundled=tmp_path / "bundled")
    assert version_of(holder) == bundled.version
    assert not (cache / "last_good").exists()
    deployed = publish_tiny(storage, hand_made)
    point_to(storage, deployed)
    wait_until((cache / "last_good" / "models" / MODEL_NAME / deployed.version).exists)
    assert version_of(holder) == deployed.version
    assert not (cache / "last_good" / "models" / MODEL_NAME / bundled.version).exists()


def test_only_the_last_good_version_is_kept(storage, start, cache, hand_made: TinyExport):
    versions = [publish_tiny(storage, hand_made) for _ in range(3)]
    point_to(storage, versions[0])
    holder = start()
    kept = cache / "last_good" / "models" / MODEL_NAME
    for metadata in versions:
        point_to(storage, metadata)
        wait_until(lambda version=metadata.version: version_of(holder) == version)
        wait_until(lambda version=metadata.version: [path.name for path in kept.glob("*")] == [version])
    assert version_of(holder) == versions[-1].version
    assert len(storage.bundle_versions(MODEL_NAME)) == 3  # In storage all of them stay.


def test_workers_of_one_host_start_together(storage, cache, hand_made: TinyExport):
    metadata = publish_tiny(storage, hand_made)
    point_to(storage, metadata)
    holders = [
        ModelHolder(WorkerWatch(storage, SERVICE), worker_id=f"w{n}", cache=cache, pace=Pace(poll_seconds=0.02))
        for n in range(3)
    ]
    threads = [threading.Thread(target=holder.start) for holder in holders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    try:
        assert [version_of(holder) for holder in holders] == [metadata.version] * 3
        wait_until(lambda: [beat.worker_id for beat in storage.read_heartbeats(SERVICE)] == ["w0", "w1", "w2"])
    finally:
        for holder in holders:
            holder.stop()


def test_heartbeat_says_what_the_worker_runs_and_goes_with_it(storage, start, hand_made: TinyExport):
    metadata = publish_tiny(storage, hand_made)
    point_to(storage, metadata)
    holder = start()
    wait_until(lambda: [beat.version for beat in storage.read_heartbeats(SERVICE)] == [metadata.version])
    beat = storage.read_heartbeats(SERVICE)[0]
    assert (beat.worker_id, beat.model_name, beat.last_swap_error) == (holder.worker_id, MODEL_NAME, None)
    wait_until(lambda: storage.read_heartbeats(SERVICE)[0] != beat)  # It goes on to say so.
    holder.stop()
    assert storage.read_heartbeats(SERVICE) == []


def test_can_be_started_again_after_a_stop(storage, start, hand_made: TinyExport):
    one, two = publish_tiny(storage, hand_made), publish_tiny(storage, hand_made)
    point_to(storage, one)
    holder = start()
    holder.stop()
    holder.start()
    assert version_of(holder) == one.version
    point_to(storage, two)
    wait_until(lambda: version_of(holder) == two.version)
    wait_until(lambda: [beat.version for beat in storage.read_heartbeats(SERVICE)] == [two.version])
    beat = storage.read_heartbeats(SERVICE)[0]
    wait_until(lambda: storage.read_heartbeats(SERVICE)[0] != beat)


def test_workers_that_stay_still_are_taken_off_the_list_whatever_their_clocks_say(storage, start):
    for worker_id, age in (("behind", timedelta(days=1)), ("ahead", timedelta(days=-1))):
        storage.write_heartbeat(SERVICE, WorkerHeartbeat(worker_id=worker_id, beat_utc=datetime.now(UTC) - age))
    start(worker_id="patient")
    start(worker_id="hasty", forget_seconds=3.0)
    wait_until(lambda: {beat.worker_id for beat in storage.read_heartbeats(SERVICE)} == {"patient", "hasty"})


def test_worker_ids_can_be_file_names():
    assert set(make_worker_id()) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-.")
