"""The labelling page in a real browser, before a real service and PostgreSQL: what labellers do, and who may."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import cv2
import httpx
import numpy as np
import pytest
import uvicorn
from playwright.sync_api import Page, Route, expect
from sqlalchemy import Engine, insert, select

from cv_platform.database.connection import make_engine
from cv_platform.database.schema import feedback, labeling_items, predictions
from cv_platform.local.http import free_port
from cv_platform.serving.app import create_app
from cv_platform.serving.log.deletion import delete_from_database
from cv_platform.serving.log.labels import agreements
from cv_platform_tests.support.app_fixtures import MakeWorker
from cv_platform_tests.support.http_client import FixedModels, brightness_model
from cv_platform_tests.support.page_fixtures import MakeVisit, browser, make_visit
from cv_platform_tests.support.page_steps import keep_screenshot, low_contrast, nameless_controls
from cv_platform_tests.support.postgres import own_database
from cv_platform_tests.support.waiting import wait_until

__all__ = ["browser", "make_visit"]

pytestmark = [pytest.mark.xdist_group("page"), pytest.mark.timeout(280)]
ANNA, BEN, CARLA, CLIENT = "key-of-anna", "key-of-ben-1", "key-of-carla", "key-of-clients"
NAMES = ("<img src=x onerror=alert(1)>", "<script>alert(1)</script>", "blueberry-" * 12)
"""Of what is red, green and blue."""
PHONE = {"viewport": {"width": 360, "height": 740}, "device_scale_factor": 2, "has_touch": True}


@pytest.fixture(scope="module")
def engine(_template_url: str) -> Iterator[Engine]:
    with own_database(_template_url, template="cv_template") as url:
        engine = make_engine(url)
        yield engine
        engine.dispose()


Serve = Callable[..., str]


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """Starts services with a model that computes by hand, each with a home of its own; returns where they answer."""
    workers: list[MakeWorker] = []
    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(**environment: str) -> str:
        workers.append(MakeWorker(tmp_path_factory.mktemp("labelling")))
        models = FixedModels(brightness_model(class_names=NAMES))
        app, port = create_app(workers[-1](models=models, CV_ADMIN_TOKEN="", **environment)), free_port()
        server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
        running.append((server, threading.Thread(target=server.run)))
        running[-1][1].start()
        wait_until(lambda: server.started)
        return f"http://127.0.0.1:{port}"

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(60)
    for worker in workers:
        worker.stop_all()


@pytest.fixture(scope="module")
def service(serve: Serve, engine: Engine) -> str:
    """A closed service with two labellers, whose classes have hostile names."""
    return serve(
        DATABASE_URL=engine.url.render_as_string(hide_password=False),
        CV_LABELLER_KEYS=f"anna={ANNA},ben={BEN},carla={CARLA}",
        CV_API_KEYS=CLIENT,
    )


def picture(at: int) -> bytes:
    """Returns a PNG that is red, green or blue, darker from left to right, of a size of its own."""
    pixels = np.zeros((64 + at, 96, 3), np.uint8)
    pixels[:, :, 2 - at % 3] = np.linspace(250, 120, 96, dtype=np.uint8)
    return cv2.imencode(".png", pixels)[1].tobytes()


@pytest.fixture
def queue(service: str, engine: Engine) -> list[UUID]:
    """Six answers that are all that is asked: red, green, blue, and once more."""
    with engine.begin() as connection:
        for table in (labeling_items, feedback):
            connection.execute(table.delete())
        connection.execute(predictions.update().values(model_name="former"))
    ids: list[UUID] = []
    for at in range(6):
        files = {"file": ("x.png", picture(at))}
        answer = httpx.post(f"{service}/predict", files=files, headers={"X-API-Key": CLIENT}, timeout=60)
        assert answer.json()["predicted_classes"] == [NAMES[at % 3]]
        ids.append(UUID(answer.json()["prediction_id"]))
    known = select(predictions.c.prediction_id).where(predictions.c.prediction_id.in_(ids))

    def are_drained() -> bool:
        with engine.connect() as connection:
            return len(connection.execute(known).all()) == len(ids)

    wait_until(are_drained)
    facts: dict[str, Any] = {"experiment": "colours", "reason": "uncertain", "score": 1.0}
    rows = [
        {**facts, "item_id": uuid4(), "prediction_id": name, "place": place, "window_end_utc": datetime.now(UTC)}
        for place, name in enumerate(ids)
    ]
    with engine.begin() as connection:
        connection.execute(insert(labeling_items), rows)
    return ids


def said(engine: Engine) -> list[tuple[UUID, str, str]]:
    columns = (feedback.c.prediction_id, feedback.c.true_class, feedback.c.source)
    with engine.connect() as connection:
        return [tuple(row) for row in connection.execute(select(*columns).order_by(feedback.c.id))]


def ask(url: str, method: str, path: str, key: str | None = ANNA, **options: Any) -> httpx.Response:
    headers = {"X-API-Key": key} if key else {}
    return httpx.request(method, f"{url}/labels{path}", headers=headers, timeout=30, **options)


def enter(make_visit: MakeVisit, service: str, key: str, **options: Any) -> Page:
    page = make_visit(**options).context.new_page()
    page.goto(f"{service}/labelling")
    dialog = page.get_by_role("dialog", name="This service needs a key")
    dialog.get_by_label("Key").fill(key)
    page.keyboard.press("Enter")
    expect(page.locator("#model")).to_have_attribute("data-state", "ready")
    return page


def expect_image(page: Page, name: str, waiting: int) -> None:
    """Waits until the page has drawn the image that the model takes for `name`."""
    expect(page.locator("#verdict")).to_contain_text(name)
    expect(page.locator("#status")).to_contain_text(name)
    expect(page.locator("#waiting")).to_contain_text(f"{waiting} image")


def test_a_labeller_answers_by_keyboard_takes_back_and_a_second_one_is_compared(
    service: str, engine: Engine, queue: list[UUID], make_visit: MakeVisit
) -> None:
    page = enter(make_visit, service, ANNA)
    expect(page.locator("#model-text")).to_have_text("Labels are anna’s")
    expect_image(page, NAMES[0], 6)
    width, height = page.locator("#original").evaluate("(image) => [image.naturalWidth, image.naturalHeight]")
    assert width / height == pytest.approx(96 / 64, rel=0.02)
    page.keyboard.press("h")
    expect(page.locator("#heat")).to_be_visible()
    keep_screenshot(page, "labelling-desktop")
    assert low_contrast(page) == []
    assert nameless_controls(page) == []
    page.keyboard.press("Enter")
    expect_image(page, NAMES[1], 5)
    page.keyboard.press("3")
    expect_image(page, NAMES[2], 4)
    page.keyboard.press("n")
    expect_image(page, NAMES[0], 3)
    page.keyboard.press("s")
    expect_image(page, NAMES[1], 2)
    anna = "labeller:anna"
    first = [(queue[0], NAMES[0], anna), (queue[1], NAMES[2], anna), (queue[2], "", anna)]
    assert said(engine) == first
    page.keyboard.press("u")
    expect_image(page, NAMES[2], 3)
    assert said(engine) == first[:2]
    page.get_by_role("button", name="None of these").click()
    expect_image(page, NAMES[1], 2)
    other = enter(make_visit, service, BEN)
    expect_image(other, NAMES[0], 3)
    held: list[Route] = []
    other.route("**/labels?mode=second*", lambda route: held.append(route))
    other.get_by_label("Asked").select_option("second")
    other.keyboard.press("Enter")
    expect(other.locator("#status")).to_be_empty()
    held[0].continue_()
    other.unroute_all(behavior="wait")
    for at, key in enumerate(("Enter", "Enter", "n")):
        expect_image(other, NAMES[at], 3 - at)
        other.keyboard.press(key)
    expect(other.get_by_role("heading", name="Nothing is waiting")).to_be_visible()
    ben = [(queue[at], name, "labeller:ben") for at, name in enumerate((NAMES[0], NAMES[1], ""))]
    assert said(engine)[3:] == ben, "a key that is pressed before the other images have come answers nothing"
    other.get_by_text("Who has labelled").click()
    # Two of three agree; by chance 1/9 + 1/9 would: (2/3 - 2/9) / (1 - 2/9).
    expect(other.locator("#agreement-text")).to_contain_text("anna and ben366.7 %0.57")
    assert page.evaluate("document.querySelectorAll('main img').length") == 1, "nothing that a name brought"


def test_a_grid_on_a_phone_labels_what_nobody_pressed(
    service: str, engine: Engine, queue: list[UUID], make_visit: MakeVisit
) -> None:
    page = enter(make_visit, service, CARLA, **PHONE)
    expect_image(page, NAMES[0], 6)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    keep_screenshot(page, "labelling-phone")
    page.get_by_label("Shown").select_option("grid")
    tiles = page.locator("#tiles button")
    expect(tiles).to_have_count(6)
    expect(page.locator("#tiles img[src]")).to_have_count(6)
    tiles.nth(2).tap()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert low_contrast(page) == []
    assert nameless_controls(page) == []
    keep_screenshot(page, "labelling-phone-grid")
    page.get_by_role("button", name="Confirm the others").tap()
    expect_image(page, NAMES[2], 1)
    others = [0, 1, 3, 4, 5]
    assert said(engine) == [(queue[at], NAMES[at % 3], "labeller:carla") for at in others]
    page.get_by_role("button", name="Undo").tap()
    expect_image(page, NAMES[0], 6)
    assert said(engine) == [], "all of it is taken back"


def test_an_empty_queue_says_so_and_low_confidence_can_be_reviewed(
    service: str, engine: Engine, queue: list[UUID], make_visit: MakeVisit
) -> None:
    with engine.begin() as connection:
        connection.execute(labeling_items.delete())
    page = enter(make_visit, service, BEN)
    expect(page.get_by_role("heading", name="Nothing is waiting")).to_be_visible()
    answer = ask(service, "GET", "?mode=review").json()
    confidences = [task["confidence"] for task in answer["tasks"]]
    assert (answer["waiting"], confidences) == (6, sorted(confidences))
    ids = [task["prediction_id"] for task in answer["tasks"]]
    rest = ask(service, "GET", f"?mode=review&limit=1&passed={ids[0]}&passed={ids[1]}").json()
    assert (rest["waiting"], [task["prediction_id"] for task in rest["tasks"]]) == (4, ids[2:3])
    page.get_by_label("Asked").select_option("review")
    expect(page.locator("#status")).to_contain_text("One of the latest answers of low confidence.")
    page.keyboard.press("Enter")
    expect(page.locator("#waiting")).to_have_text("5 images are waiting")
    expect(page.locator("#status")).to_contain_text("One of the latest answers of low confidence.")
    page.keyboard.press("s")
    page.get_by_label("Asked").select_option("second")
    page.get_by_label("Asked").select_option("review")
    expect(page.locator("#waiting")).to_have_text("4 images are waiting")
    assert [source for *_, source in said(engine)] == ["labeller:ben"]


def test_only_labellers_label_and_nobody_in_the_name_of_another(
    service: str, engine: Engine, queue: list[UUID]
) -> None:
    place = f"/{queue[0]}"
    body = {"true_class": NAMES[2]}
    for key, status in ((None, 401), (CLIENT, 401), ("key-of-nobody", 401)):
        for method, path in (("GET", ""), ("GET", "/agreement"), ("GET", place), ("POST", place), ("DELETE", place)):
            assert ask(service, method, path, key).status_code == status, (method, path)
    assert ask(service, "POST", place, json={**body, "source": "labeller:ben"}).status_code == 422
    forged = httpx.post(
        f"{service}/feedback/{queue[0]}",
        json={**body, "source": "labeller:anna"},
        headers={"X-API-Key": CLIENT},
    )
    assert forged.status_code == 422
    assert ask(service, "POST", place, json={"true_class": "pear"}).status_code == 422
    assert ask(service, "POST", f"/{uuid4()}", json=body).status_code == 404
    assert ask(service, "GET", "?limit=1000").status_code == 422
    assert ask(service, "DELETE", place).status_code == 404, "there is nothing to take back"
    assert said(engine) == []


def test_two_labellers_on_one_image_have_a_label_each_and_a_deleted_one_takes_none(
    service: str, engine: Engine, queue: list[UUID]
) -> None:
    place = f"/{queue[0]}"
    for key, name in ((ANNA, NAMES[0]), (BEN, NAMES[1]), (ANNA, NAMES[2])):
        assert ask(service, "POST", place, key, json={"true_class": name}).status_code == 200
    assert ask(service, "DELETE", place, ANNA).status_code == 200
    assert said(engine) == [(queue[0], NAMES[0], "labeller:anna"), (queue[0], NAMES[1], "labeller:ben")]
    assert delete_from_database(engine, queue[0])
    assert ask(service, "POST", place, json={"true_class": NAMES[0]}).status_code == 404
    assert said(engine) == []
    assert queue[0] not in {UUID(task["prediction_id"]) for task in ask(service, "GET", "").json()["tasks"]}


def test_without_labellers_or_database_the_routes_say_what_is_missing(serve: Serve) -> None:
    closed = serve()
    assert ask(closed, "GET", "").status_code == 403
    away = serve(CV_LABELLER_KEYS=f"anna={ANNA}", DATABASE_URL="postgresql://nobody@127.0.0.1:9/none")
    refused = ask(away, "GET", "")
    assert refused.status_code == 503
    assert "database unreachable" in refused.json()["message"]


def test_kappa_is_as_worked_by_hand() -> None:
    # 35 of 50 agree; by chance (25 * 30 + 25 * 20) / 50**2 = 0.5 would.
    pairs = [("y", "y")] * 20 + [("y", "n")] * 5 + [("n", "y")] * 10 + [("n", "n")] * 15
    (found,) = agreements([{"b": b, "a": a} for a, b in pairs])
    assert (found.first, found.second, found.images, found.agreed) == ("a", "b", 50, 35)
    assert found.kappa == pytest.approx(0.4)
    assert agreements([{"a": "x", "b": "x"}])[0].kappa is None
    assert agreements([{"a": "x"}]) == []
