from __future__ import annotations

import sys

import cv2
import numpy as np
import pytest

from cv_platform.evaluation.metrics import reliability
from cv_platform.evaluation.plots import (
    caption,
    save_confusion_matrix,
    save_per_class,
    save_reliability,
    save_worst_errors,
)
from cv_platform.evaluation.report import render_report
from cv_platform_tests.support.record_samples import evaluation, provenance, task


def _is_picture(path) -> bool:
    image = cv2.imread(str(path))
    return image is not None and image.std() > 0


@pytest.mark.parametrize("names", [("a", "b"), ("$x", "y_{"), ("猫", "犬"), ("n" * 100, "m" * 100)])
def test_any_class_name_can_be_drawn(names, tmp_path):
    save_confusion_matrix(tmp_path / "matrix.png", np.array([[3, 1], [0, 4]]), names)
    rows = [{"precision": 0.5, "recall": None, "f1": None}, {"precision": 1.0, "recall": 1.0, "f1": 1.0}]
    save_per_class(tmp_path / "classes.png", rows, names)
    image = np.full((4, 4, 3), 90, np.uint8)
    save_worst_errors(tmp_path / "errors.png", [image], [caption(names[0], names[1], 0.9)])
    assert all(_is_picture(path) for path in tmp_path.glob("*.png"))
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_many_classes_without_any_image_can_be_drawn(tmp_path):
    save_confusion_matrix(tmp_path / "matrix.png", np.zeros((120, 120), int), [str(i) for i in range(120)])
    assert _is_picture(tmp_path / "matrix.png")


def test_a_model_without_mistakes_gets_a_sheet_that_says_so(tmp_path):
    save_worst_errors(tmp_path / "errors.png", [], [])
    assert _is_picture(tmp_path / "errors.png")


def test_reliability_can_be_drawn_with_empty_bins(tmp_path):
    table = reliability(np.array([0]), np.array([[0.9, 0.1]]), "multi-class")
    save_reliability(tmp_path / "reliability.png", table, 0.1)
    assert _is_picture(tmp_path / "reliability.png")


def test_drawing_does_not_touch_the_state_that_threads_share(tmp_path):
    save_worst_errors(tmp_path / "errors.png", [], [])
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or pyplot.get_fignums() == []


def test_the_report_escapes_class_names(tmp_path):
    row = {"class": "<b>x</b>", "precision": 0.5, "recall": None, "f1": 0.1, "auc": None, "support": 3.0}
    judged = evaluation(tmp_path, passed=False, reasons=("<s>",), metrics={"images": 3.0}, per_class=[row])
    page = render_report(judged, provenance(ds_name="<u>", dvc_tag="<i>"), task())
    assert "&lt;b&gt;x&lt;/b&gt;" in page
    assert not any(tag in page for tag in ("<b>", "<i>", "<u>", "<s>"))
