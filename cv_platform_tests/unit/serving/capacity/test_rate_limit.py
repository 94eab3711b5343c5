import multiprocessing
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest

from cv_platform.errors import ServiceError
from cv_platform.serving.capacity import rate_limit
from cv_platform.serving.capacity.rate_limit import RateLimiter, client_of_address


class Clock:
    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def limiter(tmp_path: Path, clock: Clock) -> Iterator[RateLimiter]:
    limiter = RateLimiter(tmp_path / "cache" / "rate_limits", 6, clock=clock)
    yield limiter
    limiter.close()


def test_a_minutes_images_may_come_at_once_and_come_back_evenly(limiter: RateLimiter, clock: Clock):
    assert [limiter.take(b"a") for _ in range(6)] == [None] * 6
    assert limiter.take(b"a") == 10  # Six per minute: one in ten seconds.
    clock.now += 9
    assert limiter.take(b"a") == 1
    clock.now += 1
    assert limiter.take(b"a") is None
    assert limiter.take(b"a") == 10
    clock.now += 600
    assert limiter.take(b"a", 6) is None
    assert limiter.take(b"a") == 10


def test_several_images_are_taken_all_or_none(limiter: RateLimiter):
    assert limiter.take(b"a", 4) is None
    assert limiter.take(b"a", 3) == 10
    assert limiter.take(b"a", 2) is None
    assert limiter.take(b"a", 6) == 60


def test_a_refusal_costs_nothing(limiter: RateLimiter, clock: Clock):
    limiter.take(b"a", 6)
    for _ in range(100):
        limiter.take(b"a")
    clock.now += 10
    assert limiter.take(b"a") is None


def test_each_client_has_its_own_limit(limiter: RateLimiter):
    assert limiter.take(b"a", 6) is None
    assert limiter.take(b"b", 6) is None
    assert limiter.take(b"a") == 10


def test_the_workers_of_a_host_count_together_and_a_restart_forgives_nobody(tmp_path: Path, clock: Clock):
    path = tmp_path / "rate_limits"
    first, second = RateLimiter(path, 6, clock=clock), RateLimiter(path, 6, clock=clock)
    assert first.take(b"a", 4) is None
    assert second.take(b"a", 3) == 10
    assert second.take(b"a", 2) is None
    first.close()
    second.close()
    again = RateLimiter(path, 6, clock=clock)
    assert again.take(b"a") == 10
    again.close()


def test_a_clock_that_was_put_back_shuts_nobody_out_for_longer_than_a_minute(limiter: RateLimiter, clock: Clock):
    limiter.take(b"a", 6)
    clock.now -= 86_400
    assert limiter.take(b"a") == 10
    clock.now += 10
    assert limiter.take(b"a") is None


def test_memory_is_bounded_and_the_file_names_nobody(tmp_path: Path, limiter: RateLimiter):
    path = tmp_path / "cache" / "rate_limits"
    before = path.stat().st_size
    limiter.take(b"key:my-secret-key")
    for number in range(20_000):
        limiter.take(str(number).encode())
    assert path.stat().st_size == before < 300_000
    assert b"my-secret" not in path.read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_crowd_makes_it_forget_the_quietest_first(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rate_limit, "SETS", 1)
    limiter = RateLimiter(tmp_path / "limits", 6, clock=clock)
    limiter.take(b"busy", 6)
    for number in range(rate_limit.WAYS - 1):
        limiter.take(f"quiet-{number}".encode())
    limiter.take(b"new")
    assert limiter.take(b"busy") == 10
    limiter.close()


def test_a_damaged_file_starts_afresh(tmp_path: Path, clock: Clock):
    path = tmp_path / "limits"
    path.write_bytes(b"nonsense")
    limiter = RateLimiter(path, 6, clock=clock)
    assert limiter.take(b"a") is None
    limiter.close()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ServiceError, match="CV_RATE_LIMIT_PER_MINUTE"):
        RateLimiter(tmp_path / "file" / "limits", 6)


def test_threads_that_race_take_exactly_the_limit(tmp_path: Path, clock: Clock):
    limiter = RateLimiter(tmp_path / "limits", 500, clock=clock)
    barrier = threading.Barrier(8)

    def take_many(_: int) -> int:
        barrier.wait()
        return sum(limiter.take(b"a") is None for _ in range(200))

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(take_many, range(8))) == 500
    limiter.close()


def _take_many(path: str, _: int) -> int:
    limiter = RateLimiter(Path(path), 500, clock=Clock())
    taken = sum(limiter.take(b"a") is None for _ in range(400))
    limiter.close()
    return taken


def test_processes_that_race_take_exactly_the_limit(tmp_path: Path):
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:  # Unlike Pool, it kills no worker.
        taken = list(pool.map(_take_many, [str(tmp_path / "limits")] * 2, range(2)))
    assert sum(taken) == 500


def test_an_ipv6_client_is_its_network_and_a_mapped_address_the_one_it_stands_for():
    assert client_of_address("2001:db8:1:2::1") == client_of_address("2001:db8:1:2:ffff::9%eth0")
    assert client_of_address("2001:db8:1:3::1") != client_of_address("2001:db8:1:2::1")
    assert client_of_address("::ffff:10.0.0.1") == client_of_address("10.0.0.1") != client_of_address("10.0.0.2")
    assert client_of_address(None) != client_of_address("a-unix-socket")
