"""The page of likely wrong labels in a real browser: decided by keyboard, downloaded, and read by `relabel`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from playwright.sync_api import Browser, Page, expect

from cv_platform.config import ClassifierType, ValidateConfig
from cv_platform.datasets.relabelling import read_review
from cv_platform.validation.checks import Subject
from cv_platform.validation.checks.label_issues import LabelIssues
from cv_platform.validation.label_review import PAGE
from cv_platform.validation.sample import ImageSample
from cv_platform_tests.support.page_fixtures import browser

__all__ = ["browser"]

pytestmark = [pytest.mark.xdist_group("page"), pytest.mark.timeout(120)]
HOSTILE = '<script>alert(1)</script>, "dog"'
CLASSES = ("cat", HOSTILE, "horse")
PER_CLASS = 30

OpenReview = Callable[..., Page]


def review_page(folder: Path, labels: list[list[str]], kind: ClassifierType) -> Path:
    """Writes the page about three clusters of images, of `PER_CLASS` each, with these labels."""
    generator = np.random.default_rng(0)
    points = np.concatenate([generator.normal(10 * np.eye(4)[k], 1.0, (PER_CLASS, 4)) for k in range(3)])
    paths = [f"images/{at:03d}.png" for at in range(3 * PER_CLASS)]
    (folder / "images").mkdir(parents=True)
    for at, path in enumerate(paths):
        cv2.imwrite(str(folder / path), np.full((24, 32, 3), (at, 40 * (at // PER_CLASS), 200), np.uint8))
    rows = pd.DataFrame(
        {
            "path": paths,
            "split": "train",
            "labels": labels,
            "unknown_labels": [[] for _ in labels],
            "sha256": [hashlib.sha256((folder / path).read_bytes()).hexdigest() for path in paths],
        }
    )
    empty = np.zeros((len(paths), 32, 32, 3), np.uint8)
    sample = ImageSample(rows, empty, np.zeros((len(paths), 7)), points.astype(np.float32), {}, len(paths))
    beside = np.zeros((len(paths), 32, 32), np.uint8), np.zeros((len(paths), 1), np.float16)
    subject = Subject(
        rows, rows.iloc[:0], sample, CLASSES, kind, ValidateConfig(), folder, folder, "pets v1.0.0", *beside
    )
    assert LabelIssues().run(subject).value
    return folder / PAGE


@pytest.fixture
def open_review(browser: Browser, tmp_path: Path) -> Iterator[OpenReview]:
    context = browser.new_context(accept_downloads=True)
    complaints: list[str] = []
    context.on("console", lambda message: complaints.append(message.text))
    context.on("weberror", lambda error: complaints.append(str(error.error)))
    context.on("dialog", lambda dialog: dialog.accept())

    def open_page(labels: list[list[str]], kind: ClassifierType = "multi-class") -> Page:
        page = context.new_page()
        page.goto(review_page(tmp_path / "report", labels, kind).as_uri())
        return page

    yield open_page
    context.close()
    assert complaints == []


def with_wrong(*wrong: tuple[int, list[str]]) -> list[list[str]]:
    labels = [[name] for name in CLASSES for _ in range(PER_CLASS)]
    for at, given in wrong:
        labels[at] = given
    return labels


def downloaded(page: Page) -> bytes:
    with page.expect_download() as download:
        page.keyboard.press("d")
    return Path(download.value.path()).read_bytes()


def test_a_review_by_keyboard_becomes_the_csv_that_relabel_reads(open_review: OpenReview) -> None:
    page = open_review(with_wrong((3, ["horse"]), (40, ["cat"]), (41, ["cat"]), (70, [HOSTILE])))
    cards = page.locator(".card")
    expect(cards).to_have_count(4)
    paths = [text.split("· ")[1] for text in page.locator(".path").all_inner_texts()]
    page.keyboard.press("t")
    page.keyboard.press("k")
    page.keyboard.press("x")
    page.keyboard.press("u")
    expect(page.locator("#progress")).to_have_text("2 of 4 decided")
    page.keyboard.press("c")
    page.keyboard.press("Home")  # The first of the classes.
    page.keyboard.press("Enter")
    page.keyboard.press("x")
    expect(page.locator("#progress")).to_have_text("4 of 4 decided")
    decided = {d.path: d for d in read_review(downloaded(page), CLASSES, "multi-class")}
    right = {"images/003.png": "cat", "images/040.png": HOSTILE, "images/041.png": HOSTILE, "images/070.png": "horse"}
    assert list(decided) == paths
    assert decided[paths[0]].labels == (right[paths[0]],)
    assert decided[paths[1]].labels == decided[paths[1]].given
    assert decided[paths[2]].labels == ("cat",)
    assert decided[paths[3]].labels is None


def test_decisions_are_still_there_when_the_page_is_opened_again(open_review: OpenReview) -> None:
    page = open_review(with_wrong((3, ["horse"]), (70, ["cat"])))
    page.keyboard.press("x")
    page.reload()
    expect(page.locator("#progress")).to_have_text("1 of 2 decided")
    expect(page.locator(".card").nth(0).locator(".state")).to_have_text("✗ left out")
    expect(page.locator(".card").nth(1)).to_have_attribute("aria-current", "true")


def test_arrows_and_the_mouse_mark_images_and_the_filter_hides_others(open_review: OpenReview) -> None:
    page = open_review(with_wrong((3, ["horse"]), (40, ["horse"]), (70, ["cat"])))
    cards = page.locator(".card")
    page.keyboard.press("ArrowRight")
    expect(cards.nth(1)).to_have_attribute("aria-current", "true")
    cards.nth(0).click()
    expect(cards.nth(0)).to_have_attribute("aria-current", "true")
    page.locator("#filter").select_option("cat → horse")
    expect(page.locator(".card:visible")).to_have_count(1)
    page.get_by_role("button", name="Take what is likely").click()
    assert [d.labels for d in read_review(downloaded(page), CLASSES, "multi-class")] == [("horse",)]


def test_an_image_with_several_labels_is_one_card_with_all_that_are_likely(open_review: OpenReview) -> None:
    labels = [["cat"]] * PER_CLASS + [["cat", "horse"]] * PER_CLASS + [["horse"]] * PER_CLASS
    labels[5] = ["horse"]
    page = open_review(labels, "multi-label")
    expect(page.locator(".card b")).to_have_text(["horse", "cat"])
    page.keyboard.press("t")
    (decision,) = read_review(downloaded(page), CLASSES, "multi-label")
    assert (decision.given, decision.labels) == (("horse",), ("cat",))
