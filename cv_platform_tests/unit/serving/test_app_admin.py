import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import pytest
from starlette.types import ASGIApp, Message

from cv_platform.files import exclusive
from cv_platform.serving.app import create_app
from cv_platform.serving.model.worker_watch import WorkerWatch
from cv_platform.serving.routes.parts import WorkerParts
from cv_platform.storage import CentralStorage, ProductionPointer, WorkerHeartbeat
from cv_platform_tests.support.app_fixtures import ADMIN_TOKEN, MakeWorker
from cv_platform_tests.support.http_client import Client, flat_image, png, send_raw
from cv_platform_tests.support.tiny_models import TinyExport, publish_tiny

SERVICE = "image_classifier"
VERSIONS = ("20260101T000000Z-0000000a", "20260102T000000Z-0000000b")
ADMIN_ROUTES = [
    ("PUT", "/update_model/tiny.yaml"),
    ("POST", "/rollback"),
    ("DELETE", "/predictions/4f0c4a52-3f0b-4a5e-9d0e-6f2f1f0c9f11"),
]


@pytest.fixture
def storage(tmp_path: Path) -> CentralStorage:
    return CentralStorage(tmp_path / "storage")


def test_admin_routes_are_closed_while_no_token_is_configured(make_worker: MakeWorker):
    client = Client(create_app(make_worker(CV_ADMIN_TOKEN="")), {"Authorization": "Bearer "})
    for method, path in ADMIN_ROUTES:
        response = client.request(method, path)
        assert response.status_code == 403, path
        assert "CV_ADMIN_TOKEN" in response.json()["message"]


@pytest.mark.parametrize(("method", "path"), ADMIN_ROUTES)
def test_admin_routes_ask_for_the_token(client: Client, method: str, path: str):
    for header in (None, "", "Bearer", "Bearer ", f"Basic {ADMIN_TOKEN}", ADMIN_TOKEN):
        response = client.request(method, path, headers={} if header is None else {"Authorization": header})
        assert response.status_code == 401, header
        assert response.headers["www-authenticate"].startswith("Bearer")


@pytest.mark.parametrize(("method", "path"), ADMIN_ROUTES)
def test_admin_routes_refuse_a_wrong_token(client: Client, method: str, path: str):
    for token in (b"wrong", ADMIN_TOKEN[:-1].encode(), ADMIN_TOKEN.encode() + b"x", b"\xff\xfe"):
        response = client.request(method, path, headers={"Authorization": b"Bearer " + token})
        assert response.status_code == 403, token
        assert ADMIN_TOKEN not in response.text


NO_METADATA_FILES = [
    "..%2f..%2fetc%2fpasswd",
    "%2e%2e/%2e%2e/etc/passwd",
    "%2fetc%2fpasswd.yaml",
    "a/b.yaml",
    "..yaml",
    ".yaml",
    "tiny",
    "tiny.yml",
    "Tiny.yaml",
    "tiny.yaml%20",
    "t%C3%AFny.yaml",
    "..%5c..%5ctiny.yaml",
    "x" * 64 + ".yaml",
    "s3:%2f%2fbucket%2ftiny.yaml",
]


def test_a_metadata_file_is_a_name_and_never_a_path(admin: Client):
    for name in NO_METADATA_FILES:
        response = admin.put(f"/update_model/{name}")
        assert response.status_code == 422, name
        assert "never a path" in response.json()["expected"]


def test_a_name_with_a_newline_in_it_reaches_no_model(admin: Client):
    response = admin.put("/update_model/tiny%0a.yaml")
    assert response.status_code == 400
    assert response.json()["expected"] == "one of the routes of /docs"


def test_a_version_is_of_the_form_of_versions(admin: Client):
    for version in ("latest", "../x", "20260101T000000Z", "20260101T000000Z-0000000G", "", "a\x00"):
        assert admin.put("/update_model/tiny.yaml", params={"version": version}).status_code == 422, version


def test_an_unpublished_model_is_a_404(admin: Client):
    response = admin.put("/update_model/tiny.yaml")
    assert response.status_code == 404
    assert "tiny" in response.json()["message"]


def test_a_rollback_with_nothing_before_says_so(admin: Client):
    response = admin.post("/rollback")
    assert response.status_code == 409
    assert "nothing was deployed" in response.json()["message"]
    assert response.json()["expected"] == "an earlier version to go back to"


def test_a_rollback_right_after_the_first_deployment_says_so(admin: Client, storage: CentralStorage):
    pointer = ProductionPointer(model_name="tiny", version=VERSIONS[0], since_utc=datetime.now(UTC))
    storage.write_pointer(SERVICE, pointer)
    response = admin.post("/rollback")
    assert response.status_code == 409
    assert f"it serves tiny {VERSIONS[0]} since its first deployment" in response.json()["message"]
    assert response.json()["expected"] == "an earlier version to go back to"
    assert storage.read_pointer(SERVICE) == pointer


def test_a_rollback_to_a_version_that_is_gone_asks_for_none_by_name(admin: Client, storage: CentralStorage):
    pointer = ProductionPointer(
        model_name="tiny",
        version=VERSIONS[1],
        previous_model_name="tiny",
        previous_version=VERSIONS[0],
        since_utc=datetime.now(UTC),
    )
    storage.write_pointer(SERVICE, pointer)
    response = admin.post("/rollback")
    assert response.status_code == 404
    assert f"Received: {VERSIONS[0]}" in response.json()["message"]
    assert response.json()["message"].endswith("Promote a version by its name instead.")
    assert response.json()["expected"] == "an earlier version that is still published"
    assert storage.read_pointer(SERVICE) == pointer


def test_moves_production_to_the_newest_version_to_a_named_one_and_back(
    admin: Client, storage: CentralStorage, hand_made: TinyExport
):
    for version in VERSIONS:
        publish_tiny(storage, hand_made, version)
    response = admin.put("/update_model/tiny.yaml")
    assert response.status_code == 200
    assert response.json()["production"]["version"] == VERSIONS[1]
    response = admin.put("/update_model/tiny.yaml", params={"version": VERSIONS[0]})
    assert response.json()["production"]["version"] == VERSIONS[0]
    assert response.json()["production"]["previous_version"] == VERSIONS[1]
    response = admin.post("/rollback")
    assert response.json()["production"]["version"] == VERSIONS[1]
    pointer = storage.read_pointer(SERVICE)
    assert pointer is not None
    assert pointer.version == VERSIONS[1]
    assert admin.put("/update_model/tiny.yaml", params={"version": "20260103T000000Z-0000000c"}).status_code == 404


def test_a_corrupt_model_is_refused_and_production_stays(
    admin: Client, storage: CentralStorage, hand_made: TinyExport, tmp_path: Path
):
    publish_tiny(storage, hand_made, VERSIONS[0])
    (tmp_path / "storage" / "models" / "tiny" / VERSIONS[0] / "golden.npz").write_bytes(b"damaged")
    response = admin.put("/update_model/tiny.yaml")
    assert response.status_code == 409
    assert "Production stays" in response.json()["message"]
    assert response.json()["expected"] == "a model that passes its load test"
    assert storage.read_pointer(SERVICE) is None


def test_only_one_update_runs_at_a_time(admin: Client, worker: WorkerParts):
    worker.promoter.lock.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(worker.promoter.lock, timeout_seconds=1):  # As another worker would hold it.
        response = admin.put("/update_model/tiny.yaml")
        assert admin.post("/rollback").status_code == 409
    assert response.status_code == 409
    assert int(response.headers["retry-after"]) > 0
    assert "another update" in response.json()["message"]
    assert admin.put("/update_model/tiny.yaml").status_code == 404  # The lock is free again.


def test_shows_the_pointer_and_which_workers_live_and_follow_it(
    worker: WorkerParts, client: Client, admin: Client, storage: CentralStorage
):
    now = datetime.now(UTC)
    assert client.get("/models/current").json() == {"service": SERVICE, "production": None, "workers": []}
    storage.write_pointer(SERVICE, ProductionPointer(model_name="tiny", version=VERSIONS[1], since_utc=now))

    def beat(worker_id: str, version: str, ahead: timedelta) -> None:
        storage.write_heartbeat(
            SERVICE,
            WorkerHeartbeat(
                worker_id=f"host-{worker_id}",
                public_id=worker_id,
                model_name="tiny",
                version=version,
                beat_utc=now + ahead,
            ),
        )

    # All three are listed; the clocks of those that go on beating are far from ours.
    beat("a", VERSIONS[1], timedelta(hours=-1))
    beat("b", VERSIONS[0], timedelta(hours=1))
    beat("c", VERSIONS[1], timedelta(0))
    fresh = replace(worker, workers=WorkerWatch(storage, SERVICE))  # As of a worker that has just started.
    client, admin = Client(create_app(fresh)), Client(create_app(fresh), admin.headers)
    assert [w["is_live"] for w in client.get("/models/current").json()["workers"]] == [False, False, False]
    beat("a", VERSIONS[1], timedelta(hours=-1, seconds=2))
    beat("b", VERSIONS[0], timedelta(hours=1, seconds=2))
    body = client.get("/models/current").json()
    assert body["production"]["version"] == VERSIONS[1]
    assert "public_id" not in body["workers"][0]
    assert "host" not in str(body["workers"])  # Which machine it is, is for admins.
    named = admin.get("/models/current").json()
    assert [worker["worker_id"] for worker in named["workers"]] == ["host-a", "host-b", "host-c"]
    assert [(w["worker_id"], w["is_live"], w["is_current"]) for w in body["workers"]] == [
        ("a", True, True),
        ("b", True, False),
        ("c", False, True),
    ]


def test_an_unreadable_pointer_is_a_503_that_names_it_to_an_admin(client: Client, admin: Client, tmp_path: Path):
    path = tmp_path / "storage" / "services" / SERVICE / "production.json"
    path.parent.mkdir(parents=True)
    path.write_text("{")
    response = client.get("/models/current")
    assert response.status_code == 503
    assert "storage unreadable" in response.json()["message"]
    assert "production.json" not in response.text
    assert str(tmp_path) not in response.text
    assert "production.json" in admin.get("/models/current").json()["message"]


@pytest.fixture
def closed(make_worker: MakeWorker) -> Client:
    return Client(create_app(make_worker(CV_API_KEYS="first-key,second-key")))


KEYED = [
    ("POST", "/predict"),
    ("POST", "/predict/batch"),
    ("POST", "/feedback/4f0c4a52-3f0b-4a5e-9d0e-6f2f1f0c9f11"),
    ("GET", "/predictions/4f0c4a52-3f0b-4a5e-9d0e-6f2f1f0c9f11"),
    ("GET", "/predictions/4f0c4a52-3f0b-4a5e-9d0e-6f2f1f0c9f11/passport"),
    ("POST", "/feedback"),
]


@pytest.mark.parametrize(("method", "path"), KEYED)
def test_api_keys_close_the_predictions(closed: Client, method: str, path: str):
    for key in (None, b"", b"wrong", b"first-key,second-key", b"first-ke", b"\xff"):
        response = closed.request(method, path, headers={} if key is None else {"X-API-Key": key})
        assert response.status_code == 401, key
        assert "X-API-Key" in response.json()["expected"]
    for value in (b"first-key", b"Basic first-key", b"Bearer", b"Bearer wrong", b"Bearer first-key x", b"Bearer \xff"):
        assert closed.request(method, path, headers={"Authorization": value}).status_code == 401, value


@pytest.mark.parametrize("key", ["first-key", "second-key"])
@pytest.mark.parametrize("header", ["X-API-Key: {}", "Authorization: Bearer {}", "authorization: bearer  {}"])
def test_each_api_key_opens_them(closed: Client, key: str, header: str):
    name, value = header.format(key).split(": ")
    headers = {name: value}
    assert closed.predict(png(flat_image(1, 2, 3)), headers=headers).status_code == 200
    assert closed.get(KEYED[3][1], headers=headers).status_code in {404, 503}


def test_white_space_around_an_api_key_is_no_part_of_it(closed: Client):
    for key in (b"first-key  ", b"\tfirst-key \t", b"  second-key"):
        assert send_raw(closed.app, "GET", KEYED[3][1], headers=[(b"x-api-key", key)]).status in {404, 503}, key
    for key in (b"first-key\xa0", b"first -key", b" \t"):
        assert send_raw(closed.app, "GET", KEYED[3][1], headers=[(b"x-api-key", key)]).status == 401, key


def test_the_page_the_health_and_the_docs_stay_open(closed: Client):
    assert [closed.get(path).status_code for path in ("/", "/docs", "/openapi.json", "/health_check")] == [200] * 4


def test_a_stranger_is_refused_before_a_body_is_read(make_worker: MakeWorker) -> None:
    app = create_app(make_worker(CV_API_KEYS="first-key"))
    for path, content_type in (
        (f"/feedback/{uuid4()}", "application/json"),
        ("/feedback", "application/json"),
        ("/predict", "multipart/form-data; boundary=y"),
        ("/predict/batch", "multipart/form-data; boundary=y"),
    ):
        assert asyncio.run(_status_without_body(app, path, content_type)) == 401, path


async def _status_without_body(app: ASGIApp, path: str, content_type: str) -> int:
    async def receive() -> Message:
        raise AssertionError("the body was read")

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"host", b"x"), (b"content-type", content_type.encode()), (b"content-length", b"100")]
    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers}
    await app(
        {**scope, "http_version": "1.1", "scheme": "http", "root_path": "", "client": ("127.0.0.1", 1)}, receive, send
    )
    return sent[0]["status"]
