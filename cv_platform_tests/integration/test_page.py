"""The service's page in a real browser, with a real model behind it: what visitors do, see, hear and are told."""

from __future__ import annotations

import base64
import re
from datetime import UTC, datetime
from typing import Literal
from uuid import uuid4

import cv2
import httpx
import numpy as np
import pytest
from playwright.sync_api import Locator, Route, expect

from cv_platform_tests.support.app_fixtures import spooled
from cv_platform_tests.support.page_fixtures import (
    COLOURS,
    INSECURE_HOST,
    MakeVisit,
    Serve,
    Service,
    browser,
    drawn,
    make_visit,
    serve,
    service,
)
from cv_platform_tests.support.page_steps import (
    choose,
    deliver,
    expect_verdict,
    keep_screenshot,
    low_contrast,
    nameless_controls,
    shown_bars,
    upload,
)

__all__ = ["browser", "make_visit", "serve", "service"]

pytestmark = [pytest.mark.xdist_group("page"), pytest.mark.timeout(120)]
PHONE = {"viewport": {"width": 360, "height": 740}, "device_scale_factor": 2, "has_touch": True}
KEY = "a-key-of-this-test-only"
HOSTILE_FILE = "<img src=x onerror=alert(1)> & “friends”.png"
HOSTILE_CLASSES = ("<b>cherry</b>", "<script>alert(1)</script>", "blueberry-" * 12, "&lt;lemon", "ice'\"", "plum")


def test_a_chosen_image_gets_the_answer_that_the_service_gives(service: Service, make_visit: MakeVisit):
    page = make_visit().open(service.url)
    keep_screenshot(page, "desktop-start")
    image = drawn("cherry")
    choose(page, upload("kitchen table.png", image))
    expect_verdict(page, "cherry")
    body = service.predict(image)
    page.get_by_role("button", name="Show all 6 classes").click()
    assert shown_bars(page) == {name: f"{100 * share:.1f} %" for name, share in body["prediction"].items()}
    filled = page.locator("#bars .chosen .track").evaluate("(n) => n.firstChild.clientWidth / n.clientWidth")
    assert filled == pytest.approx(body["prediction"]["cherry"], abs=0.01)
    assert page.title() == "cherry – Image classifier"
    expect(page.locator("#status")).to_have_text(re.compile(r"kitchen table\.png: cherry, \d+\.\d %\."))
    for name in ("Your image", "What the model looked at"):
        expect(page.get_by_role("figure", name=name).locator("img")).to_be_visible()
    keep_screenshot(page, "desktop")


def test_an_image_unlike_all_that_was_learned_is_called_so(service: Service, make_visit: MakeVisit):
    page = make_visit().open(service.url)
    warning = page.get_by_text("This image is unlike those that the model has learned from.")
    choose(page, upload("empty table.png", drawn()))
    expect(warning).to_be_visible()
    assert service.predict(drawn())["is_unknown"]
    keep_screenshot(page, "desktop-unknown")
    choose(page, upload("cherry.png", drawn("cherry")))
    expect_verdict(page, "cherry")
    expect(warning).to_be_hidden()


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_images_arrive_by(way: Literal["drop", "paste"], service: Service, make_visit: MakeVisit):
    page = make_visit().open(service.url)
    deliver(page, way, upload("lime.png", drawn("lime")), upload("plum.png", drawn("plum")))
    expect_verdict(page, "lime")
    expect(page.locator("#history-list button.entry")).to_have_count(2)
    deliver(page, way)
    expect(page.locator("#notice")).to_be_visible(visible=way == "drop")


def test_several_images_become_a_list_of_answers_and_failures(service: Service, make_visit: MakeVisit):
    page = make_visit().open(service.url)
    fruits = list(COLOURS)
    broken = upload("holiday.png", b"this is no image")
    choose(page, broken, *[upload(f"{fruit}.png", drawn(fruit)) for fruit in fruits])
    expect(page.locator("#history-list button.entry")).to_have_count(6)
    # In the order in which they were chosen; the first that worked is shown, although others may have been faster.
    assert page.locator("#history-list b").all_text_contents() == ["holiday.png", *fruits]
    expect_verdict(page, fruits[0])
    expect(page.locator("#notice")).to_contain_text("1 of 7 images could not be classified.")
    row = page.get_by_role("listitem").filter(has_text="holiday.png")
    expect(row).to_contain_text("This file is not an image that can be read.")
    keep_screenshot(page, "desktop-several")
    expect(row.get_by_role("button", name="Try again")).to_have_count(0)
    row.get_by_role("button", name="Remove holiday.png").click()
    expect(row).to_have_count(0)
    entry = page.locator("#history-list button.entry").filter(has_text="ice.png")
    entry.click()
    expect_verdict(page, "ice")
    expect(entry).to_have_attribute("aria-current", "true")
    page.reload()
    expect_verdict(page, "ice")
    expect(page.locator("#history-list button.entry")).to_have_count(6)
    page.locator("#history-list button.entry").filter(has_text="plum.png").click()
    expect_verdict(page, "plum")
    expect(page.locator("#original")).to_be_visible()
    page.get_by_role("button", name="Clear the list").click()
    expect(page.locator("#history")).to_be_hidden()
    expect(page.locator("#result")).to_be_hidden()
    page.reload()
    expect(page.locator("#history")).to_be_hidden()


def test_the_first_image_chosen_is_shown_and_not_the_first_that_is_answered(service: Service, make_visit: MakeVisit):
    page = make_visit().open(service.url)
    held: list[Route] = []

    def hold_ice(route: Route) -> None:
        if b"ice.png" in (route.request.post_data_buffer or b""):
            held.append(route)
        else:
            route.continue_()

    page.route("**/predict", hold_ice)
    choose(page, *[upload(f"{fruit}.png", drawn(fruit)) for fruit in ("ice", "plum", "lime")])
    entries = page.locator("#history-list button.entry")
    expect(entries).to_have_count(2)
    expect(page.locator("#result")).to_be_hidden()
    (late,) = held
    late.continue_()
    expect(entries).to_have_count(3)
    expect_verdict(page, "ice")


def test_the_camera_starts_on_a_click_takes_pictures_and_lets_go(service: Service, make_visit: MakeVisit):
    page = make_visit().open(service.url)
    expect(page.locator("#camera")).to_be_hidden()
    page.get_by_role("button", name="Use the camera").click()
    snap = page.get_by_role("button", name="Take a picture")
    expect(snap).to_be_focused()
    snap.click()
    # The browser's test picture is green.
    expect_verdict(page, "lime")
    keep_screenshot(page, "desktop-camera")
    snap.click()
    expect(page.locator("#history-list button.entry")).to_have_count(2)
    assert nameless_controls(page) == []
    track = page.evaluate_handle("document.getElementById('video').srcObject.getVideoTracks()[0]")
    page.get_by_role("button", name="Stop the camera").click()
    assert track.evaluate("(track) => track.readyState") == "ended"
    expect(page.locator("#camera")).to_be_hidden()
    expect(page.get_by_role("button", name="Use the camera")).to_be_focused()


def test_a_refused_or_impossible_camera_is_explained(service: Service, make_visit: MakeVisit):
    def refuse(route: Route) -> None:
        response = route.fetch()
        route.fulfill(response=response, headers={**response.headers, "permissions-policy": "camera=()"})

    visit = make_visit()
    visit.expected += ("Permissions policy violation: camera",)
    visit.context.route(service.url + "/", refuse)
    page = visit.open(service.url)
    page.get_by_role("button", name="Use the camera").click()
    expect(page.get_by_role("alert")).to_contain_text("The camera was refused.")
    visit = make_visit()
    visit.expected += ("The Cross-Origin-Opener-Policy header has been ignored",)
    page = visit.open(service.url.replace("127.0.0.1", INSECURE_HOST))
    page.get_by_role("button", name="Use the camera").click()
    expect(page.get_by_role("alert")).to_contain_text("needs a secure address")


def test_only_the_page_may_ask_for_the_camera(service: Service):
    allowed = httpx.get(service.url).headers["permissions-policy"]
    assert allowed == "camera=(self), microphone=(), geolocation=()"
    for path in ("/docs", "/page/app.js", "/health_check"):
        assert "camera=()" in httpx.get(service.url + path).headers["permissions-policy"]


def test_the_heat_map_lies_on_the_fruit_and_can_be_dimmed_and_hidden(service: Service, make_visit: MakeVisit):
    page = make_visit().open(service.url)
    choose(page, upload("a.png", drawn("cherry", "lime", "lime")))
    expect_verdict(page, "lime")
    encoded = page.locator("#heat").evaluate("(canvas) => canvas.toDataURL()").partition(",")[2]
    picture = cv2.imdecode(np.frombuffer(base64.b64decode(encoded), np.uint8), cv2.IMREAD_UNCHANGED)
    # How strong (alpha) the map is in each third: the cherry's on the left, the limes' in the middle and on the right.
    left, middle, right = (third[:, :, 3].mean() for third in np.array_split(picture, 3, axis=1))
    assert min(middle, right) > 10
    assert left < min(middle, right) / 5
    heat, slider = page.locator("#heat"), page.get_by_role("slider", name="Strength")
    expect(heat).to_have_css("opacity", "0.75")
    slider.fill("30")
    expect(heat).to_have_css("opacity", "0.3")
    expect(page.locator("#opacity-text")).to_have_text("30 %")
    toggle = page.get_by_role("checkbox", name="Heat-map")
    toggle.uncheck()
    expect(heat).to_have_css("opacity", "0")
    expect(slider).to_be_disabled()
    toggle.check()
    expect(heat).to_have_css("opacity", "0.3")


def test_a_blank_heat_map_is_said_to_be_blank(service: Service, make_visit: MakeVisit):
    page = make_visit().open(service.url)
    choose(page, upload("table.png", drawn()))  # Grey answers to no fruit's channel.
    expect(page.locator("#pictures-note")).to_contain_text("The heat-map is blank")
    expect(page.locator("#heat-controls")).to_be_hidden()
    assert service.predict(drawn())["message"].startswith("The heat-map is blank")


def test_everything_can_be_done_with_the_keyboard_alone(service: Service, make_visit: MakeVisit):
    page = make_visit(reduced_motion="reduce").open(service.url)
    # Playwright catches choosers from the first listener on, but does not wait until the browser has been told.
    page.on("filechooser", lambda _: None)

    def tab_to(wanted: Locator) -> None:
        for _ in range(30):
            page.keyboard.press("Tab")
            focused = page.locator(":focus")
            # The chooser itself is out of sight; its label shows the focus.
            outline = "(n) => getComputedStyle(n.matches('#file') ? n.nextElementSibling : n).outlineStyle"
            assert focused.evaluate(outline) == "solid", focused.evaluate("(n) => n.outerHTML")
            if wanted.evaluate("(n) => n === document.activeElement"):
                return
        pytest.fail(f"Expected Tab to reach {wanted}.")

    tab_to(page.get_by_role("link", name="Skip to the result"))
    tab_to(page.get_by_role("button", name="Choose images"))
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    assert chooser.value.is_multiple()
    chooser.value.set_files([upload(f"{fruit}.png", drawn(fruit)) for fruit in ("plum", "ice")])
    expect_verdict(page, "plum")
    tab_to(page.get_by_role("button", name="Show all 6 classes"))
    page.keyboard.press("Enter")
    expect(page.locator("#bars li")).to_have_count(6)
    tab_to(page.get_by_role("checkbox", name="Heat-map"))
    tab_to(page.get_by_role("slider", name="Strength"))
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#opacity-text")).to_have_text("74 %")
    tab_to(page.get_by_role("button", name="No, this is wrong"))
    page.keyboard.press("Space")
    expect(page.get_by_role("combobox", name="It is:")).to_be_focused()
    page.keyboard.press("l")
    tab_to(page.get_by_role("button", name="Send"))
    page.keyboard.press("Enter")
    expect(page.locator("#thanks")).to_have_text("Thank you. Kept with the result: lemon.")
    entry = page.get_by_role("button", name="ice ice.png")
    expect(entry).to_be_visible()
    tab_to(entry)
    page.keyboard.press("Enter")
    expect_verdict(page, "ice")


def test_a_permalink_shows_the_same_result_in_a_new_tab(service: Service, make_visit: MakeVisit):
    visit = make_visit(permissions=["clipboard-read", "clipboard-write"])
    page = visit.open(service.url)
    choose(page, upload("a.png", drawn("ice")))
    expect_verdict(page, "ice")
    bars = shown_bars(page)
    page.get_by_text("Where this answer comes from").click()
    expect(page.locator("#passport")).to_contain_text("tiny v1.0.0 (d41d8cd9)")
    page.get_by_role("button", name="Copy the link to this result").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    link = page.evaluate("navigator.clipboard.readText()")
    assert link == page.url
    # Somebody else's browser: nothing of this session is there.
    other = make_visit().open(link)
    expect_verdict(other, "ice")
    assert shown_bars(other) == bars
    for picture in ("#original", "#under", "#heat"):
        expect(other.locator(picture)).to_be_visible()
    missing = make_visit().open(f"{service.url}/#{uuid4()}")
    # The log's database is not configured here, so nobody can know that there is no such result.
    expect(missing.get_by_role("alert")).to_contain_text("The service cannot answer at the moment.")
    expect(missing.locator("#result")).to_be_hidden()


def test_what_visitors_say_of_a_result_is_stored(service: Service, make_visit: MakeVisit):
    page = make_visit().open(service.url)
    choose(page, upload("a.png", drawn("lemon")))
    expect_verdict(page, "lemon")
    first = page.url.partition("#")[2]
    page.get_by_role("button", name="Yes").click()
    expect(page.locator("#thanks")).to_contain_text("Kept with the result: lemon.")
    page.get_by_role("button", name="No, this is wrong").click()
    options = page.get_by_role("combobox", name="It is:")
    assert options.locator("option").all_text_contents() == ["blueberry", "cherry", "ice", "lime", "plum"]
    options.select_option("cherry")
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#thanks")).to_contain_text("Kept with the result: cherry.")
    page.get_by_role("button", name="No, this is wrong").click()
    page.get_by_role("button", name="None of these").click()
    expect(page.locator("#thanks")).to_contain_text("Kept with the result: none of these.")
    said = [
        (entry["true_class"], entry["source"])
        for entry in spooled(service.worker)
        if entry.get("prediction_id") == first and "true_class" in entry
    ]
    assert said == [("lemon", "page"), ("cherry", "page"), ("", "page")]


def test_a_closed_service_asks_for_its_key_and_keeps_it_in_this_tab_only(serve: Serve, make_visit: MakeVisit):
    closed = serve(CV_API_KEYS=KEY)
    page = make_visit().open(closed.url)
    choose(page, *[upload(f"{fruit}.png", drawn(fruit)) for fruit in COLOURS])
    dialog = page.get_by_role("dialog", name="This service needs a key")
    expect(dialog).to_be_visible()
    assert nameless_controls(page) == []
    keep_screenshot(page, "desktop-key")
    dialog.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("button", name="Try again")).to_have_count(6)
    expect(page.get_by_role("alert")).to_contain_text("6 of 6 images could not be classified.")
    page.get_by_role("button", name="Try again: plum.png").click()
    dialog.get_by_label("Key").fill("not-the-key")
    dialog.get_by_role("button", name="Use this key").click()
    refused = page.get_by_role("dialog", name="That key was not accepted")
    refused.get_by_label("Key").fill(KEY)
    page.keyboard.press("Enter")
    expect_verdict(page, "plum")
    choose(page, upload("a.png", drawn("lime")))
    expect_verdict(page, "lime")
    kept = page.evaluate("[sessionStorage['api-key'], localStorage.length, document.cookie]")
    assert kept == [KEY, 0, ""]
    other = page.context.new_page()
    other.goto(page.url)
    expect(other.get_by_role("dialog")).to_be_visible()
    other.keyboard.press("Escape")
    expect(other.get_by_role("alert")).to_contain_text("This service needs a key.")


def test_a_refusal_that_comes_after_the_new_key_asks_for_none(serve: Serve, make_visit: MakeVisit):
    page = make_visit().open(serve(CV_API_KEYS=KEY).url)
    held: list[Route] = []

    def hold_the_first(route: Route) -> None:
        if held:
            route.continue_()
        else:
            held.append(route)

    page.route("**/predict", hold_the_first)
    choose(page, *[upload(f"{fruit}.png", drawn(fruit)) for fruit in ("ice", "plum")])
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Key").fill(KEY)
    page.keyboard.press("Enter")
    entries = page.locator("#history-list button.entry")
    expect(entries).to_have_count(1)
    # It was sent without a key, and only now the service says so.
    (late,) = held
    with page.expect_response(lambda response: response.status == 401):
        late.continue_()
    expect(entries).to_have_count(2)
    expect(dialog).to_have_count(0)
    expect(page.get_by_role("alert")).to_have_count(0)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"this is no image", "This file is not an image that can be read."),
        (b"", "This file is empty or incomplete."),
        (drawn("lime")[:2000], "This file is empty or incomplete."),
        (bytes(400_001), "This image is too large: at most 400 kB are allowed."),
    ],
    ids=["not an image", "empty", "cut off", "too large"],
)
def test_an_unusable_file_is_refused_in_plain_words(data: bytes, words: str, service: Service, make_visit: MakeVisit):
    page = make_visit().open(service.url)
    choose(page, upload("good.png", drawn("ice")))
    expect_verdict(page, "ice")
    choose(page, upload("bad.png", data))
    expect(page.get_by_role("alert")).to_contain_text(words)
    # The earlier answer would look like the answer to this file.
    expect(page.locator("#result")).to_be_hidden()
    expect(page.get_by_role("listitem").filter(has_text="bad.png")).to_contain_text(words)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (413, "This image has too many pixels."),
        (422, "The service did not understand this."),
        (500, "Something went wrong in the service."),
        (503, "The service cannot answer at the moment."),
        (504, "That took too long."),
        (None, "The service does not answer."),
    ],
)
def test_trouble_is_told_in_plain_words_and_can_be_tried_again(
    status: int | None, words: str, service: Service, make_visit: MakeVisit
):
    visit = make_visit()
    page = visit.open(service.url)

    def trouble(route: Route) -> None:
        if status is None:
            route.abort("internetdisconnected")
        else:
            route.fulfill(status=status, json={"message": "Expected X. Received: Y."})

    page.route("**/predict", trouble)
    choose(page, upload("a.png", drawn("ice")))
    expect(page.get_by_role("alert")).to_contain_text(words)
    again = page.get_by_role("button", name="Try again: a.png")
    if status in {413, 422}:
        expect(again).to_have_count(0)
        return
    page.unroute("**/predict")
    again.click()
    expect_verdict(page, "ice")
    expect(page.get_by_role("alert")).to_have_count(0)


def test_a_busy_service_is_given_the_time_it_asks_for(service: Service, make_visit: MakeVisit):
    visit = make_visit()
    clock = visit.context.clock
    clock.install(time=datetime(2026, 1, 31, 6, tzinfo=UTC))
    page = visit.open(service.url)
    clock.pause_at(datetime(2026, 1, 31, 7, tzinfo=UTC))
    refusals = iter(range(3))

    def busy(route: Route) -> None:
        if next(refusals, None) is None:
            route.fallback()
        else:
            route.fulfill(status=429, headers={"Retry-After": "30"}, json={"message": "busy"})

    page.route("**/predict", busy)
    choose(page, *[upload(f"{fruit}.png", drawn(fruit)) for fruit in COLOURS])
    expect(page.get_by_role("listitem").filter(has_text="Waiting")).to_have_count(6)
    expect(page.locator("#pause")).to_have_text("The service is busy. Going on in 30 s…")
    expect(page.locator("#status")).to_have_text("The service is busy. It asks to wait 30 seconds.")
    clock.run_for(18_000)
    expect(page.locator("#pause")).to_have_text("The service is busy. Going on in 12 s…")
    keep_screenshot(page, "desktop-busy")
    clock.run_for(12_000)
    expect(page.locator("#history-list button.entry")).to_have_count(6)
    expect(page.locator("#pause")).to_be_hidden()
    assert page.locator("#history-list b").all_text_contents() == list(COLOURS)


def test_an_unreachable_service_is_said_at_the_top(service: Service, make_visit: MakeVisit):
    visit = make_visit()
    page = visit.open(service.url)
    expect(page.locator("#model")).to_contain_text("tiny, version of")
    visit.context.set_offline(True)
    expect(page.locator("#model")).to_have_text("You are offline")
    visit.context.set_offline(False)
    expect(page.locator("#model")).to_contain_text("tiny, version of")


def test_several_labels_and_hostile_names_are_shown_as_they_are(serve: Serve, make_visit: MakeVisit):
    hostile = {"class_names": HOSTILE_CLASSES, "classifier_type": "multi-label", "threshold": 0.1}
    service = serve(metadata=hostile)
    page = make_visit(**PHONE).open(service.url)
    elements = "document.querySelectorAll('script, b, img').length"
    image = drawn("blueberry", "cherry")
    before = page.evaluate(elements)
    choose(page, upload(HOSTILE_FILE, image))
    expect_verdict(page, f"{HOSTILE_CLASSES[0]}, {HOSTILE_CLASSES[2]}")
    expect(page.locator("#over")).to_have_text("This shows")
    expect(page.locator("#file-name")).to_have_text(HOSTILE_FILE)
    assert page.evaluate(elements) == before + 2, "The list's own <img> and <b>, nothing that a name brought."
    assert service.predict(image)["predicted_classes"] == [HOSTILE_CLASSES[0], HOSTILE_CLASSES[2]]
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    page.get_by_role("button", name="No, this is wrong").click()
    boxes = page.get_by_role("group", name="It shows:").get_by_role("checkbox")
    expect(boxes).to_have_count(6)
    for box in boxes.all():
        box.uncheck()
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#thanks")).to_contain_text("Choose at least one class")
    page.get_by_role("checkbox", name=HOSTILE_CLASSES[1]).check()
    page.get_by_role("checkbox", name=HOSTILE_CLASSES[5]).check()
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#thanks")).to_contain_text("Thank you.")
    said = [entry["true_class"] for entry in spooled(service.worker) if "true_class" in entry]
    assert [set(text.split("|")) for text in said] == [{HOSTILE_CLASSES[1], HOSTILE_CLASSES[5]}]
    page.get_by_role("button", name="No, this is wrong").click()
    page.get_by_role("button", name="None of these").click()
    expect(page.locator("#thanks")).to_contain_text("Kept with the result: none of these.")
    assert [entry["true_class"] for entry in spooled(service.worker) if "true_class" in entry][1:] == [""]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_readable_on_a_phone(scheme: str, service: Service, make_visit: MakeVisit):
    page = make_visit(**PHONE, color_scheme=scheme).open(service.url)
    for name in ("start", "result"):
        if name == "result":
            files = [upload(f"{fruit}.png", drawn(fruit)) for fruit in ("lime", "plum")]
            choose(page, *files, upload("b" * 80 + ".png", b"no image"))
            expect(page.locator("#history-list button.entry")).to_have_count(2)
            expect(page.get_by_role("alert")).to_be_visible()
            page.get_by_text("Where this answer comes from").click()
            expect(page.locator("#passport")).to_contain_text("Data")
            page.get_by_role("button", name="No, this is wrong").click()
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        assert low_contrast(page) == []
        assert nameless_controls(page) == []
        keep_screenshot(page, f"phone-{scheme}-{name}")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    red, green, blue = (int(part) for part in re.findall(r"\d+", ground))
    assert max(red, green, blue) < 50 if scheme == "dark" else min(red, green, blue) > 200
    # Large enough for a thumb: https://www.w3.org/TR/WCAG22/#target-size-minimum
    sizes = [box for b in page.locator("button:visible, .button:visible").all() if (box := b.bounding_box())]
    assert min(min(box["width"], box["height"]) for box in sizes) >= 24


def test_the_description_of_the_api_is_rendered_readably(service: Service, make_visit: MakeVisit):
    visit = make_visit()
    page = visit.context.new_page()
    page.goto(f"{service.url}/docs")
    route = page.locator("details.route").filter(has_text="Classify an image").first
    route.locator("summary").click()
    expect(route).to_contain_text("curl -X POST -F file=@image.jpg")
    assert route.locator("h3").all_text_contents()[-2:] == ["Example of 200", "Example of 400"]
    assert low_contrast(page) == []
    assert nameless_controls(page) == []
    keep_screenshot(page, "desktop-docs")
