from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from cv_platform.serving.model.worker_watch import HEARTBEAT_STALE_SECONDS, WorkerWatch
from cv_platform.storage import CentralStorage, WorkerHeartbeat

SERVICE = "image_classifier"
NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)


class Observer:
    """Watches with a clock that the test moves."""

    def __init__(self, storage: CentralStorage) -> None:
        self.seconds = 5000.0
        self._watch = WorkerWatch(storage, SERVICE, clock=lambda: self.seconds)

    def states_after(self, seconds: float) -> dict[str, str]:
        self.seconds += seconds
        return {worker.beat.worker_id: worker.state for worker in self._watch.look()}


@pytest.fixture
def storage(tmp_path: Path) -> CentralStorage:
    return CentralStorage(tmp_path)


@pytest.fixture
def observer(storage: CentralStorage) -> Observer:
    return Observer(storage)


def beat(storage: CentralStorage, at: datetime, worker_id: str = "a") -> None:
    storage.write_heartbeat(SERVICE, WorkerHeartbeat(worker_id=worker_id, beat_utc=at))


@pytest.mark.parametrize("ahead", [timedelta(0), timedelta(seconds=10), timedelta(days=-3650), timedelta(hours=2)])
def test_a_worker_lives_while_it_beats_whatever_its_clock_says(
    storage: CentralStorage, observer: Observer, ahead: timedelta
):
    beat(storage, NOON + ahead)
    assert observer.states_after(0) == {"a": "unknown"}
    for n in range(1, 4):
        beat(storage, NOON + ahead + timedelta(seconds=2 * n))
        assert observer.states_after(2) == {"a": "live"}


def test_a_clock_that_is_set_back_is_a_beat(storage: CentralStorage, observer: Observer):
    beat(storage, NOON)
    observer.states_after(0)
    beat(storage, NOON - timedelta(hours=1))
    assert observer.states_after(2) == {"a": "live"}


def test_a_worker_is_dead_once_it_was_watched_for_long_enough_without_a_beat(
    storage: CentralStorage, observer: Observer
):
    beat(storage, datetime.now(UTC))  # Fresh by every clock, and yet nobody lives.
    assert observer.states_after(0) == {"a": "unknown"}
    assert observer.states_after(HEARTBEAT_STALE_SECONDS) == {"a": "unknown"}
    assert observer.states_after(0.1) == {"a": "dead"}
    beat(storage, NOON)
    assert observer.states_after(1) == {"a": "live"}
    assert observer.states_after(HEARTBEAT_STALE_SECONDS) == {"a": "live"}
    assert observer.states_after(0.1) == {"a": "dead"}


def test_who_appears_while_others_are_watched_lives_and_who_goes_is_forgotten(
    storage: CentralStorage, observer: Observer
):
    assert observer.states_after(0) == {}
    beat(storage, NOON, "new")
    assert observer.states_after(1) == {"new": "live"}
    storage.remove_heartbeat(SERVICE, "new")
    assert observer.states_after(1) == {}


def test_a_beat_of_a_time_when_nobody_looked_proves_nothing(storage: CentralStorage, observer: Observer):
    """It may be of the first of these hours."""
    beat(storage, NOON)
    observer.states_after(0)
    beat(storage, NOON + timedelta(seconds=2))
    beat(storage, NOON, "new")
    assert observer.states_after(7200) == {"a": "unknown", "new": "unknown"}
    beat(storage, NOON + timedelta(seconds=4))
    assert observer.states_after(2) == {"a": "live", "new": "unknown"}
    assert observer.states_after(HEARTBEAT_STALE_SECONDS - 1) == {"a": "live", "new": "dead"}
