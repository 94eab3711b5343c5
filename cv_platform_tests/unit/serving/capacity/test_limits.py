import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from cv_platform.serving.capacity.limits import PROMOTION_SECONDS, Gate, ServingLimits
from cv_platform.settings import Settings


def test_the_gate_admits_up_to_its_limit_and_again_after_one_left():
    gate = Gate(2)
    assert [gate.enter(), gate.enter(), gate.enter()] == [True, True, False]
    assert gate.is_full
    gate.leave()
    assert not gate.is_full
    assert gate.enter()
    assert gate.inside == 2


def test_the_gate_counts_right_when_threads_race():
    gate = Gate(10)
    barrier = threading.Barrier(16)

    def enter_often(_: int) -> int:
        barrier.wait()
        return sum(gate.enter() for _ in range(1_000))

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(enter_often, range(16))) == 10
    assert gate.inside == 10


def test_several_places_are_taken_all_or_none():
    gate = Gate(4)
    assert [gate.enter(3), gate.enter(2), gate.enter(1)] == [True, False, True]
    gate.leave(3)
    assert gate.inside == 1


def test_a_gate_for_nobody_is_refused():
    with pytest.raises(ValueError, match="1 or more"):
        Gate(0)


def settings(**environment: str) -> Settings:
    return Settings.from_environment(environment)


def test_without_settings_a_worker_takes_its_share_of_the_cores_and_room_for_a_batch():
    limits = ServingLimits.of(settings(CV_SERVICE_WORKERS="2"), cores=8)
    assert (limits.predict_threads, limits.model_threads) == (4, 1)
    assert limits.max_in_flight == 16 * 4 + 32
    assert limits.max_batch_files == 32
    assert limits.predict_seconds == 30.0


def test_settings_win_over_what_is_derived():
    limits = ServingLimits.of(
        settings(
            CV_SERVICE_WORKERS="2",
            CV_PREDICT_THREADS="1",
            CV_PREDICT_TIMEOUT_SECONDS="5",
            CV_MAX_IN_FLIGHT="7",
            CV_MAX_BATCH_FILES="3",
        ),
        cores=8,
    )
    assert (limits.predict_threads, limits.model_threads) == (1, 4)
    assert (limits.max_in_flight, limits.max_batch_files, limits.predict_seconds) == (7, 3, 5.0)


def test_a_batch_is_never_larger_than_what_could_be_admitted():
    assert ServingLimits.of(settings(CV_MAX_IN_FLIGHT="4"), cores=2).max_batch_files == 4
    assert ServingLimits.of(settings(CV_RATE_LIMIT_PER_MINUTE="10"), cores=2).max_batch_files == 10


def test_the_deadline_holds_only_where_the_routes_own_limits_do_not():
    limits = ServingLimits.of(settings(CV_PREDICT_TIMEOUT_SECONDS="100"), cores=2)
    assert limits.longest_seconds > limits.upload_seconds + 2 * 100
    short = ServingLimits.of(settings(CV_PREDICT_TIMEOUT_SECONDS="1"), cores=2)
    assert short.longest_seconds > short.small_body_seconds + PROMOTION_SECONDS
