"""What the spool does at the end of its disk, and how it gets away from there."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest

from cv_platform.errors import SpoolFullError
from cv_platform.files import free_bytes
from cv_platform.local.http import free_port
from cv_platform.serving.app import create_app
from cv_platform.serving.log.spool import Spool
from cv_platform_tests.support.app_fixtures import ADMIN_TOKEN, MakeWorker
from cv_platform_tests.support.http_client import Client, flat_image, png
from cv_platform_tests.support.log_entries import answered, append_to
from cv_platform_tests.support.waiting import wait_until


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    spool = Spool(tmp_path / "spool")
    yield spool
    spool.close()


def fill_the_disk(monkeypatch: pytest.MonkeyPatch, spool: Spool) -> None:
    """Makes what is free count as the reserve, as at the end of a disk."""
    reserve_bytes = 2 * free_bytes(spool.path.parent)
    monkeypatch.setattr(spool._room, "limits", replace(spool._room.limits, reserve_bytes=reserve_bytes))


def test_entries_end_before_the_disk_does_and_what_is_drained_still_leaves(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    append_to(spool, answered())
    with monkeypatch.context() as full:
        fill_the_disk(full, spool)
        with pytest.raises(SpoolFullError, match="bytes free on the disk"):
            append_to(spool, answered())
        with pytest.raises(SpoolFullError):
            spool.try_out()
        spool.delete(spool.read_batch(10, 10**6).rows)
        assert spool.depth() == 0
    spool.try_out()
    assert spool.depth() == 0, "trying leaves nothing"
    append_to(spool, answered())
    assert spool.depth() == 1


def test_a_spool_whose_folder_was_deleted_takes_nothing_more(spool: Spool) -> None:
    append_to(spool, answered())
    shutil.rmtree(spool.path.parent)
    # SQLite itself would go on writing to files that nobody can open again.
    with pytest.raises(SpoolFullError, match="No such file"):
        append_to(spool, answered())


def test_a_service_that_starts_on_a_full_disk_waits_for_room_and_then_answers(
    make_worker: MakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as full:

        def no_room(*_: object) -> None:
            raise sqlite3.OperationalError("database or disk is full")

        full.setattr("cv_platform.serving.log.spool.prepare", no_room)
        worker = make_worker()
        client = Client(create_app(worker))
        response = client.predict(png(flat_image(10, 20, 30)))
        assert response.status_code == 503
        assert response.json()["expected"].startswith("room in the request log")
        assert client.get("/readyz").status_code == 503
        assert "takes no entries" in client.get("/health_check").json()["message"]
    wait_until(lambda: client.get("/health_check").status_code == 200)
    assert client.predict(png(flat_image(10, 20, 30))).status_code == 200


def test_a_service_that_has_stopped_does_not_speak_of_disks(make_worker: MakeWorker) -> None:
    worker = make_worker()
    client = Client(create_app(worker), {"Authorization": f"Bearer {ADMIN_TOKEN}"})
    make_worker.stop(worker)
    for response in (client.get(f"/predictions/{uuid4()}"), client.delete(f"/predictions/{uuid4()}")):
        assert response.status_code == 503
        assert response.json()["expected"] == "a running service"
        assert "is stopping" in response.json()["message"]
        assert int(response.headers["retry-after"]) > 0


def test_health_recovers_without_a_request_that_would_show_it(
    make_worker: MakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = make_worker(DATABASE_URL=f"postgresql://nobody@127.0.0.1:{free_port()}/none")
    client = Client(create_app(worker))
    picture = png(flat_image(10, 20, 30))
    with monkeypatch.context() as full:
        fill_the_disk(full, worker.log.opened.spool)
        assert client.predict(picture).status_code == 503
        assert client.get("/health_check").status_code == 503
    wait_until(lambda: client.get("/health_check").status_code == 200)
    assert client.predict(picture).status_code == 200
