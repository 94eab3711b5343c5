"""What does not answer (a frozen database, a disk, an object store) costs its own routes, and those in bounded time."""

import asyncio
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from uuid import uuid4

import httpx
import prometheus_client
import pytest
from sqlalchemy import create_engine, text

from cv_platform.errors import ServiceError
from cv_platform.serving.app import create_app
from cv_platform.serving.capacity import worker_calls
from cv_platform.serving.capacity.bounded_calls import BoundedCalls
from cv_platform.serving.capacity.limits import ServingLimits
from cv_platform.serving.model.runtime import LoadedModel
from cv_platform.serving.routes import predictions
from cv_platform.serving.routes.parts import WorkerParts
from cv_platform.serving.telemetry.metrics import ServingMetrics
from cv_platform.serving.worker import open_worker
from cv_platform.settings import Settings
from cv_platform_tests.support.app_fixtures import ADMIN_TOKEN, MakeWorker, spooled
from cv_platform_tests.support.http_client import Client, FixedModels, GatedRuntime, flat_image, png
from cv_platform_tests.support.log_entries import hold_writer, wait_until_drained
from cv_platform_tests.support.tiny_models import tiny_metadata
from cv_platform_tests.support.waiting import wait_until

IMAGE = png(flat_image(1, 2, 3))
ADMIN = {"Authorization": f"Bearer {ADMIN_TOKEN}"}


def test_a_slow_statement_is_a_408(make_worker: MakeWorker):
    client = Client(create_app(make_worker(limits=ServingLimits(small_body_seconds=0.05))))

    async def stuck() -> AsyncIterator[bytes]:
        yield b'{"true_class": '
        await asyncio.sleep(30)

    response = client.post(f"/feedback/{uuid4()}", content=stuck(), headers={"Content-Type": "application/json"})
    assert response.status_code == 408
    assert response.headers["connection"] == "close"


def test_a_disk_that_hangs_while_a_prediction_is_written_is_a_503_once(
    make_worker: MakeWorker, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("cv_platform.serving.log.worker_log.APPEND_SECONDS", 0.3)
    worker = make_worker(limits=ServingLimits(predict_threads=1, predict_seconds=30))
    client = Client(create_app(worker))
    go = hold_writer(worker.log.opened.spool)
    response = client.predict(IMAGE)
    assert response.status_code == 503
    assert client.get("/health_check").status_code == 503
    worker.admission.threads.submit(lambda: None).result(30)  # The threads that predict do not hang with the disk.
    go.set()
    assert client.predict(IMAGE).status_code == 200
    assert client.get("/health_check").status_code == 200
    assert [record["response_status_code"] for record in spooled(worker)] == [200]  # Nobody waited for the first.


def test_the_probes_tell_a_worker_that_is_busy_from_one_that_hangs(make_worker: MakeWorker):
    runtime = GatedRuntime()
    models = FixedModels(LoadedModel(tiny_metadata(), runtime))
    worker = make_worker(models=models, limits=ServingLimits(predict_threads=2, predict_seconds=0.25))
    client = Client(create_app(worker))

    def statuses() -> tuple[int, int]:
        return client.get("/livez").status_code, client.get("/readyz").status_code

    assert statuses() == (200, 200)
    assert client.predict(IMAGE).status_code == 504
    assert statuses() == (200, 200)  # One thread is left.
    assert client.predict(IMAGE).status_code == 504
    wait_until(lambda: statuses()[1] == 503)
    assert "takes too long" in client.get("/readyz").json()["message"]
    wait_until(lambda: statuses() == (503, 503))
    assert "retry-after" not in client.get("/livez").headers  # It does not get well by itself.
    assert worker.admission.is_stuck()
    runtime.go.set()
    wait_until(lambda: statuses() == (200, 200))


def test_strangers_see_no_name_of_a_host(worker: WorkerParts, client: Client):
    assert client.get("/health_check").json()["model"]["worker_id"] == "5eaf00d1"
    full = Client(client.app, ADMIN).get("/health_check").json()["model"]
    assert full["worker_id"] == "host-4711"
    assert "public_id" not in full


def test_readiness_follows_the_log(worker: WorkerParts, client: Client):
    assert client.get("/readyz").status_code == 200
    worker.log.append_error = "/secret/spool is full"
    for path in ("/readyz", "/health_check"):
        answer = client.get(path)
        assert answer.status_code == 503
        assert answer.headers["retry-after"]
        assert "takes no entries: full or unwritable" in answer.json()["message"]
    assert client.get("/livez").status_code == 200


def test_a_worker_that_could_not_start_lets_go_and_can_start_later(tmp_path: Path):
    home = tmp_path / "home"
    (home / "cache" / "rate_limits").mkdir(parents=True)  # A folder where a file belongs.
    settings = Settings.from_environment(
        {"CV_HOME": str(home), "CV_STORAGE": str(tmp_path / "storage"), "CV_RATE_LIMIT_PER_MINUTE": "5"}
    )

    def opened() -> AbstractContextManager[WorkerParts]:
        metrics = ServingMetrics(prometheus_client.CollectorRegistry())
        return open_worker(settings, models=FixedModels(), metrics=metrics)

    with pytest.raises(ServiceError, match="rate_limits"), opened():
        pass
    assert list((home / "spool").iterdir()) == []
    (home / "cache" / "rate_limits").rmdir()
    with opened() as worker:
        assert worker.log.opened.status().depth == 0
    assert list((home / "spool").iterdir()) == []


@pytest.fixture
def hung_disk(worker: WorkerParts, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Lets no look at the spool end until the event is set."""
    go = threading.Event()
    status = worker.log.opened.status

    def hang() -> object:
        assert go.wait(60)
        return status()

    monkeypatch.setattr(worker.log.opened, "status", hang)
    yield go
    go.set()


def test_health_answers_while_the_spools_disk_hangs_with_the_figures_it_had(
    worker: WorkerParts, hung_disk: threading.Event
):
    reads = BoundedCalls("looks at the spool", "its disk", threads=1, places=1, seconds=0.05)
    worker.calls.status_reads = reads
    client = Client(create_app(worker))
    known = worker.log._last_status
    if known is None:
        hung_disk.set()
        client.get("/health_check")
        hung_disk.clear()
        known = worker.log._last_status
    assert known is not None
    worker.log._last_status = known[0] - 60, known[1]
    for _ in range(3):
        health = client.get("/health_check")
        assert health.status_code == 200
        assert health.json()["spool"]["entries"] == 0
        assert health.json()["spool"]["as_of_seconds"] >= 60
        assert "disk does not answer" in health.json()["message"]


def test_storage_that_hangs_is_a_503_and_takes_no_thread_of_the_others(
    worker: WorkerParts, monkeypatch: pytest.MonkeyPatch
):
    go = threading.Event()
    monkeypatch.setattr(worker.storage, "read_pointer", lambda service: go.wait(60))
    reads = BoundedCalls("reads of storage", "central storage", threads=2, places=2, seconds=0.05)
    worker.calls.storage_reads = reads
    client = Client(create_app(worker))
    statuses = [client.get("/models/current").status_code for _ in range(3)]
    assert statuses == [503, 503, 429]
    assert client.get("/").status_code == 200
    assert client.predict(IMAGE).status_code == 200
    go.set()


def test_an_update_whose_storage_hangs_is_a_503_and_takes_no_thread_of_the_others(
    worker: WorkerParts, monkeypatch: pytest.MonkeyPatch
):
    updates = BoundedCalls("updates", "fetching the model", threads=2, places=2, seconds=1.0, may_succeed=True)
    worker.calls.promotions = updates
    admin = Client(create_app(worker), ADMIN)
    go = threading.Event()
    ended = threading.Event()

    def hang(model_name: str) -> list[str]:
        assert go.wait(60)
        ended.set()
        return []

    monkeypatch.setattr(worker.storage, "bundle_versions", hang)
    late = admin.put("/update_model/tiny.yaml")
    assert late.status_code == 504  # Not 503 with a time to come again: a rollback that is repeated undoes itself.
    assert "retry-after" not in late.headers
    assert "may still succeed" in late.json()["message"]
    # It still holds the lock of updates: whoever comes next is told so, however many come.
    assert [admin.post("/rollback").status_code for _ in range(50)] == [409] * 50
    assert admin.get("/models/current").status_code == 200
    assert admin.predict(IMAGE).status_code == 200
    go.set()
    assert ended.wait(60)


@pytest.fixture
def freeze(database_url: str) -> Iterator[Callable[[], None]]:
    """Returns a function that stops PostgreSQL (its postmaster and every backend) by SIGSTOP; it goes on at the end."""
    stopped: list[int] = []
    engine = create_engine(database_url)

    def stop() -> None:
        with engine.connect() as connection:
            pids = connection.execute(text("SELECT pid FROM pg_stat_activity ORDER BY pid")).scalars().all()
            postmaster = int(Path(f"/proc/{pids[0]}/stat").read_text().rpartition(")")[2].split()[1])
        for pid in (postmaster, *pids):
            os.kill(pid, signal.SIGSTOP)
            stopped.append(pid)

    yield stop
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)
    engine.dispose()


def test_a_frozen_database_answers_503_in_time_and_the_rest_goes_on(
    make_worker: MakeWorker, database_url: str, freeze: Callable[[], None], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(worker_calls, "LOOK_UP_SECONDS", 1.0)
    monkeypatch.setattr(predictions, "DELETION_SECONDS", 1.0)
    worker = make_worker(DATABASE_URL=database_url)
    app = create_app(worker)
    drained = Client(app).predict(IMAGE).json()["prediction_id"]
    wait_until_drained(worker.log.opened)

    async def look_up(client: httpx.AsyncClient, count: int) -> list[int]:
        responses = await asyncio.gather(*(client.get(f"/predictions/{drained}") for _ in range(count)))
        return [response.status_code for response in responses]

    async def scenario() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client, asyncio.timeout(60):
            assert await look_up(client, 2) == [200, 200]  # Their two connections stay in the pool.
            freeze()
            # Many more than there are threads: none of them is left without an answer.
            statuses = await look_up(client, 3 * worker_calls.LOOK_UP_THREADS)
            assert set(statuses) <= {429, 503}
            assert 503 in statuses
            assert (await client.get("/health_check")).status_code == 200
            assert (await client.get("/")).status_code == 200
            fresh = await client.post("/predict", files={"file": ("a.png", IMAGE)})
            assert fresh.status_code == 200
            # What has not reached the database yet is found in the spool, by the threads that do not hang.
            while (await client.get(f"/predictions/{fresh.json()['prediction_id']}")).status_code != 200:
                await asyncio.sleep(0.1)  # Those that wait for a connection have not given up yet.
            delete = await client.delete(f"/predictions/{drained}", headers=ADMIN)
            assert delete.status_code == 503

    asyncio.run(scenario())
