"""What becomes of a spool that nobody drains: how full it gets, what leaves it, and what is said of it."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path

import pytest

from cv_platform.errors import SpoolFullError
from cv_platform.local.http import free_port
from cv_platform.serving.app import create_app
from cv_platform.serving.log.deletion import delete_from_spools
from cv_platform.serving.log.drainer import Drainer, LogStatus
from cv_platform.serving.log.limits import LEAST_RESERVE_BYTES, LogLimits
from cv_platform.serving.log.request_log import RequestLog
from cv_platform.serving.log.spool import Spool
from cv_platform.settings import Settings
from cv_platform_tests.support.app_fixtures import MakeWorker, spooled
from cv_platform_tests.support.http_client import Client, flat_image, png
from cv_platform_tests.support.log_entries import answered, append_to
from cv_platform_tests.support.waiting import wait_until

BOUND = 1_000_000


@pytest.fixture(autouse=True)
def quick_drainer(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what one moment brings is little, as the bound is."""
    monkeypatch.setattr("cv_platform.serving.log.drainer._LINGER_SECONDS", 0.01)


def nowhere() -> str:
    return f"postgresql://nobody@127.0.0.1:{free_port()}/none"


def limits(**changes: object) -> LogLimits:
    return LogLimits(**{"max_bytes": BOUND, "may_have_database": lambda: False, **changes})


def record_ids(folder: Path) -> list[str]:
    """Returns the entries of spools that nobody owns, oldest first."""
    ids: list[str] = []
    for path in sorted(folder.glob("*.sqlite")):
        spool = Spool.adopt(path)
        assert spool is not None
        ids += [row.entry_id for row in spool.read_batch(10_000, 10**9).rows]
        spool.close()
    return ids


def append_all(log: RequestLog, count: int) -> list[str]:
    entries = [answered(image=bytes([number]) * 50_000) for number in range(count)]
    for entry in entries:
        append_to(log, entry)
        # As a client that comes again after a 503 would; the bound is smaller here than what one moment can bring.
        wait_until(lambda: not log.spool.is_crowded())
    return [str(entry.entry_id) for entry in entries]


def test_without_a_database_the_oldest_entries_are_dropped_and_it_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), RequestLog(tmp_path, None, limits()) as log:
        ids = append_all(log, 40)  # Twice what there is room for.
        status = log.status()
    kept = record_ids(tmp_path)
    assert kept == ids[-len(kept) :]
    assert 5 <= len(kept) < 20
    assert (status.dropped_rows, status.archived_rows, status.depth) == (40 - len(kept), 0, len(kept))
    assert (status.database, status.last_error) == ("not configured", None)
    (line,) = [record.getMessage() for record in caplog.records if "oldest entries are dropped" in record.getMessage()]
    assert "DATABASE_URL" in line


def test_the_oldest_entries_go_to_the_archive_where_one_is_set(tmp_path: Path) -> None:
    spools, archive = tmp_path / "spool", tmp_path / "archive"
    with RequestLog(spools, None, limits(archive=archive)) as log:
        ids = append_all(log, 40)
        status = log.status()
        kept = log._drainer._archive
        assert kept is not None
        oldest = json.loads(kept.read_batch(1, 10**6).rows[0].record)["prediction_id"]
        found = log.find_prediction(oldest)
        assert found is not None, "it is still found"
        assert found.image == bytes([0]) * 50_000
        assert log.delete_prediction(oldest)
        assert log.find_prediction(oldest) is None
    assert (status.dropped_rows, status.archived_rows) == (0, 40 - status.depth)
    assert record_ids(archive) + record_ids(spools) == ids
    assert not delete_from_spools(archive, oldest)


def test_what_a_former_process_left_is_the_oldest_and_goes_first(tmp_path: Path) -> None:
    former = Spool(tmp_path)
    left = [answered(image=bytes([number]) * 50_000) for number in range(8)]
    for entry in left:
        append_to(former, entry)
    former.close()
    with RequestLog(tmp_path, None, limits()) as log:
        wait_until(lambda: log.status().depth == 8)  # It counts, although nothing is drained.
        ids = append_all(log, 30)
        wait_until(lambda: not former.path.exists())
        status = log.status()
    kept = record_ids(tmp_path)
    assert kept == ids[-len(kept) :]
    assert status.dropped_rows >= 8


def test_nothing_is_dropped_while_a_database_may_come(tmp_path: Path) -> None:
    spool = Spool(tmp_path, LogLimits(max_bytes=BOUND))
    drainer = Drainer(spool, None, LogLimits(max_bytes=BOUND))
    append_to(spool, answered(image=b"x" * 950_000))
    assert spool.is_crowded()
    drainer._drain_once()
    assert (drainer.status().depth, drainer.status().dropped_rows) == (1, 0)
    spool.close()


def test_spools_of_others_that_are_gone_count_while_the_database_is_away(tmp_path: Path) -> None:
    for _ in range(3):
        former = Spool(tmp_path)
        append_to(former, answered())
        former.close()
    with RequestLog(tmp_path, nowhere()) as log:
        wait_until(lambda: log.status().database == "unreachable" and log.status().depth == 3)
        assert (log.status().oldest_age_seconds or -1) >= 0
    assert len(record_ids(tmp_path)) == 3, "they are left to the next one"


def test_a_slow_disk_is_not_a_dead_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(tmp_path)
    drainer = Drainer(spool, nowhere(), adopt=False)
    drainer._state = "ok", None
    monkeypatch.setattr("cv_platform.serving.log.spool._JOB_SECONDS", 0.05)
    is_over = threading.Event()
    held = spool._writer.submit(lambda _: is_over.wait(30))
    begun = spool.begin(answered())
    begun.settle("ok", 0.1)
    with pytest.raises(SpoolFullError) as caught:
        drainer._drain_once()
    drainer._note(caught.value)
    state, message = drainer._state
    assert (state, str(message)[:38]) == ("ok", "The spool fails: Expected the disk of ")
    is_over.set()
    held.result(30)
    spool.close()


@pytest.mark.parametrize(("spare", "reserve"), [("0", LEAST_RESERVE_BYTES), ("1000000000", 1_000_000_000)])
def test_the_reserve_is_the_installations_but_never_too_small_to_recover(
    tmp_path: Path, spare: str, reserve: int
) -> None:
    environment = {"CV_HOME": str(tmp_path), "CV_SPARE_DISK_BYTES": spare, "CV_SPOOL_MAX_BYTES": "5000000"}
    bounds = LogLimits.of(Settings.from_environment(environment))
    assert (bounds.reserve_bytes, bounds.max_bytes, bounds.archive) == (reserve, 5_000_000, None)
    assert not bounds.may_have_database()
    (tmp_path / "postgres").mkdir()
    assert bounds.may_have_database(), "the embedded one may only be stopped"
    url = {"DATABASE_URL": "postgresql://somebody@host/log"}
    assert LogLimits.of(Settings.from_environment({**environment, **url})).may_have_database()


def test_a_service_without_a_database_answers_for_ever(make_worker: MakeWorker) -> None:
    worker = make_worker(CV_SPOOL_MAX_BYTES="1000000", CV_LOG_IMAGES="all")
    client = Client(create_app(worker))
    for number in range(50):
        # Noise, so that each upload is of its own and does not compress.
        image = png(flat_image(number, 0, 0)) + bytes([number]) * 40_000
        while (status := client.predict(image).status_code) == 503:
            wait_until(lambda: not worker.log.opened.spool.is_crowded())
        assert status == 200
    wait_until(lambda: worker.log.opened.status().dropped_rows > 0)
    wait_until(lambda: not worker.log.opened.spool.is_crowded())
    assert len(spooled(worker)) < 30
    worker.log.tend()
    (family,) = [family for family in worker.metrics.registry.collect() if family.name == "cv_log_evicted_entries"]
    counted = {s.labels["outcome"]: s.value for s in family.samples if s.name.endswith("_total")}
    assert counted["archived"] == 0
    assert counted["dropped"] == worker.log.opened.status().dropped_rows
    health = client.get("/health_check")
    assert health.status_code == 200
    assert "There is no database: of the oldest log entries" in health.json()["message"]


def test_metrics_of_evicted_entries_survive_a_new_drainer(make_worker: MakeWorker) -> None:
    worker = make_worker()
    for dropped in (3, 5, 2):  # The third is a new drainer's.
        worker.metrics.log_is(LogStatus(0, None, "not configured", None, 0, 0, dropped_rows=dropped))
    total = worker.metrics.registry.get_sample_value("cv_log_evicted_entries_total", {"outcome": "dropped"})
    assert total == 5 + 2
