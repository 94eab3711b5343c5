"""What strangers can have refused as fast as the network takes it does not fill the spool."""

from collections import Counter
from typing import Any

import pytest

from cv_platform.serving.app import create_app
from cv_platform.serving.capacity import refusal_bounds
from cv_platform.serving.capacity.refusal_bounds import Allowance, Rate
from cv_platform.serving.routes.parts import WorkerParts
from cv_platform_tests.support.app_fixtures import ADMIN_TOKEN, MakeWorker, spooled
from cv_platform_tests.support.http_client import Client, flat_image, png

IMAGE = png(flat_image(10, 20, 30))
UPLOAD = {"files": {"file": ("a.png", IMAGE)}}
EMPTY = {"content": b""}
FLOOD = 2_000
AT_ONCE = 50


def flood(client: Client, count: int, **options: Any) -> Counter[int]:
    statuses: Counter[int] = Counter()
    for _ in range(count // AT_ONCE):
        statuses.update(r.status_code for r in client.together([("POST", "/predict", options)] * AT_ONCE))
    return statuses


def counted(worker: WorkerParts) -> Counter[tuple[str, str, str]]:
    """Returns how many refusals there were by route, status and how they are logged."""
    (family,) = [family for family in worker.metrics.registry.collect() if family.name == "cv_refusals"]
    return Counter(
        {
            (s.labels["route"], s.labels["status"], s.labels["logged"]): int(s.value)
            for s in family.samples
            if s.name == "cv_refusals_total"
        }
    )


@pytest.fixture
def no_refill(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long a test takes must not decide how many entries there are."""
    monkeypatch.setattr(refusal_bounds, "KEPT", Rate(100, 0.0))
    monkeypatch.setattr(refusal_bounds, "SAMPLED", Rate(20, 0.0))


@pytest.mark.usefixtures("no_refill")
@pytest.mark.parametrize(
    ("environment", "headers", "options", "status"),
    [
        ({"CV_API_KEYS": "known"}, {"X-API-Key": "guessed"}, EMPTY, 401),
        ({"CV_API_KEYS": "known"}, {}, {"content": b"x" * 300_000}, 413),
        ({"CV_API_KEYS": "known"}, {"Sec-Fetch-Site": "cross-site"}, EMPTY, 403),
        ({"CV_ALLOWED_HOSTS": "other"}, {}, EMPTY, 421),
        ({"CV_API_KEYS": "known", "CV_RATE_LIMIT_PER_MINUTE": "1"}, {"X-API-Key": "known"}, EMPTY, 429),
        ({"CV_RATE_LIMIT_PER_MINUTE": "1"}, {}, EMPTY, 429),
    ],
    ids=["wrong key", "too large", "other site", "other host", "too many of a key", "too many"],
)
def test_a_flood_of_what_is_refused_leaves_a_sample_and_a_count(
    make_worker: MakeWorker, environment: dict[str, str], headers: dict[str, str], options: Any, status: int
):
    worker = make_worker(**environment)
    app = create_app(worker)
    if status == 429:  # The first one is within the limit.
        assert Client(app, headers).post("/predict", **EMPTY).status_code == 422
    before = len(spooled(worker))
    assert flood(Client(app, headers), FLOOD, **options) == {status: FLOOD}
    records = spooled(worker)[before:]
    assert [record["response_status_code"] for record in records] == [status] * 20
    of_status = {key: count for key, count in counted(worker).items() if key[1] == str(status)}
    assert of_status == {
        ("/predict", str(status), "sampled"): 20,
        ("/predict", str(status), "counted"): FLOOD - 20,
    }


@pytest.mark.usefixtures("no_refill")
def test_an_open_service_keeps_a_bounded_number_of_what_it_could_not_use(make_worker: MakeWorker):
    worker = make_worker()
    assert flood(Client(create_app(worker)), 500, **EMPTY) == {422: 500}
    assert len(spooled(worker)) == 120
    assert counted(worker) == {
        ("/predict", "422", "durable"): 100,
        ("/predict", "422", "sampled"): 20,
        ("/predict", "422", "counted"): 380,
    }


@pytest.mark.usefixtures("no_refill")
def test_each_refusal_of_a_client_with_a_key_is_durable_before_it_leaves(make_worker: MakeWorker):
    worker = make_worker(CV_API_KEYS="known")
    keyed = Client(create_app(worker), {"X-API-Key": "known"})
    assert flood(keyed, 150, **EMPTY) == {422: 150}
    assert keyed.predict(b"x" * 300_000).status_code == 413  # Before any route has asked for the key.
    broken = [("files", (f"{number}.png", b"no image")) for number in range(3)]
    assert keyed.post("/predict/batch", files=broken).status_code == 415
    assert counted(worker) == {
        ("/predict", "422", "durable"): 150,
        ("/predict", "413", "durable"): 1,
        ("/predict/batch", "415", "durable"): 3,
    }
    assert len(spooled(worker)) == 154


def test_a_deletion_works_after_a_flood(make_worker: MakeWorker):
    worker = make_worker(CV_API_KEYS="known")
    app = create_app(worker)
    stored = Client(app, {"X-API-Key": "known"}).predict(IMAGE).json()["prediction_id"]
    assert flood(Client(app), FLOOD, **UPLOAD) == {401: FLOOD}
    admin = Client(app, {"Authorization": f"Bearer {ADMIN_TOKEN}"})
    assert admin.delete(f"/predictions/{stored}").status_code == 200
    assert stored not in str(spooled(worker))


def test_an_allowance_comes_back_evenly_up_to_its_size(monkeypatch: pytest.MonkeyPatch):
    now = 100.0
    monkeypatch.setattr("cv_platform.serving.capacity.refusal_bounds.time.monotonic", lambda: now)
    allowance = Allowance(Rate(3, 0.5))
    assert [allowance.take() for _ in range(4)] == [True, True, True, False]
    now += 2.0  # One has come back.
    assert [allowance.take() for _ in range(2)] == [True, False]
    now += 1000.0
    assert [allowance.take() for _ in range(4)] == [True, True, True, False]
