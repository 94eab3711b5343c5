from __future__ import annotations

import base64
import re
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest

from cv_platform.monitoring.report_page import render_page, thumbnails
from cv_platform.monitoring.sentences import drift_summary
from cv_platform.pages import picture
from cv_platform.records import (
    DriftReport,
)
from cv_platform_tests.support.drift_reports import drift_report, make_report


class Balanced(HTMLParser):
    """Counts open elements, so that a page that is no valid tree is noticed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        if tag not in {"meta", "br", "img"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("report", [make_report(), drift_report()], ids=["insufficient", "drift"])
def test_page_is_valid_self_contained_and_without_scripts(report: DriftReport) -> None:
    page = render_page(report, {"aa": "data:image/jpeg;base64,AAAA"})
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert "script" not in parser.seen
    assert not re.search(r"(src|href)=\"(?!data:)", page)


def test_page_says_what_moved() -> None:
    page = render_page(drift_report(), {"aa": "data:image/jpeg;base64,AAAA"})
    assert "+1.25" in page
    assert "reference is constant" in page
    assert "25.0%" in page
    assert "id-1" in page
    assert 'src="data:image/jpeg;base64,AAAA"' in page
    assert "upload not kept" in page
    assert "Not reliable" in page
    assert "+1.00 to +1.50" in page
    assert "0.850 to 0.950" in page
    assert "0.250 to 0.375" in page
    assert "0.050 to 0.150" in page  # Of MMD, whose square the statistic is.
    assert "43.8 to 56.2%" in page
    assert "12 requests with feedback: 0.500 (95 % interval 0.250 to 0.750)" in page
    assert "No estimate without labels agrees" in page
    assert "&lt;b&gt;bb" in page


def test_summary_names_verdict_detectors_effect_and_classes() -> None:
    summary = drift_summary(drift_report())
    assert summary.startswith("Drift in 300 requests of digits_classifier")
    assert "Fired: bbsd_ks (p 0.002)" in summary
    assert "moved by +1.25" in summary
    assert "No longer constant as in the reference: saturation" in summary
    assert "Classes that moved: <script>" in summary


def test_summary_of_a_short_window_says_what_is_missing() -> None:
    summary = drift_summary(make_report())
    assert "At least 100 usable requests are needed; there are 30." in summary


def test_a_class_that_moved_without_drift_is_told_apart_from_the_verdict() -> None:
    explained = "The verdict, no drift, decides"
    assert explained not in render_page(drift_report(), {})
    page = render_page(drift_report(verdict="no drift", drifted_detectors=()), {})
    assert explained in page.partition("<h2>Classes</h2>")[2]


def test_record_survives_json() -> None:
    report = drift_report()
    assert DriftReport.model_validate_json(report.model_dump_json()) == report


def test_thumbnails_are_small_and_broken_uploads_are_named() -> None:
    photo = np.random.default_rng(0).integers(0, 256, (300, 600, 3), dtype=np.uint8)
    content = cv2.imencode(".png", photo)[1].tobytes()
    tiny = cv2.imencode(".png", photo[:8, :8])[1].tobytes()
    pictures, problems = thumbnails({"a" * 64: content, "b" * 64: b"no image", "c" * 64: tiny})

    def shape(url: str) -> tuple[int, ...]:
        data = base64.b64decode(url.removeprefix("data:image/jpeg;base64,"))
        return cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_COLOR).shape

    assert shape(pictures["a" * 64]) == (80, 160, 3)
    assert shape(pictures["c" * 64]) == (8, 8, 3)
    assert len(problems) == 1
    assert "bbbbbbbbbbbb" in problems[0]


def test_pictures_of_deep_images_show_the_bits_that_are_declared() -> None:
    deep = cv2.imencode(".png", np.full((9, 9), 2048, np.uint16))[1].tobytes()
    for bits, grey in ((None, 8), (12, 128)):
        for url in (thumbnails({"a": deep}, bits)[0]["a"], picture(deep, 64, bits) or ""):
            data = np.frombuffer(base64.b64decode(url.removeprefix("data:image/jpeg;base64,")), np.uint8)
            assert np.abs(cv2.imdecode(data, cv2.IMREAD_GRAYSCALE).astype(int) - grey).max() <= 2


def test_what_has_changed_is_said_with_the_shares_of_the_classes() -> None:
    page = render_page(drift_report(), {})
    assert "The classes look as before, their mix has changed: &lt;script&gt; 25% to 50% (40% to 60%)" in page
    assert "40.0 to 60.0%" in page
    assert "their mix has changed" in drift_summary(drift_report())
    assert "What has changed" not in render_page(make_report(), {})
