"""`validate_dataset` on real image files, Deepchecks included."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cv_platform.config import EncoderConfig, ValidateConfig
from cv_platform.datasets.embeddings import embed_dataset
from cv_platform.records import ValidationVerdict
from cv_platform.validation.checks.deepchecks_suites import LEFT_OUT, REPORT_NAMES, image_table
from cv_platform.validation.sample import ImageSample
from cv_platform.validation.validate import validate_dataset
from cv_platform.validation.verdict import CHECK_NAMES, DEEPCHECKS

CLASSES = ("left", "right")
WITHOUT_DEEPCHECKS = ValidateConfig(deepchecks_suites="off")


def _validate(checkout, home: Path, config: ValidateConfig = WITHOUT_DEEPCHECKS, **options) -> ValidationVerdict:
    settings = {"class_names": CLASSES, "classifier_type": "multi-class", **options}
    version = checkout.version(settings["class_names"])
    shutil.rmtree(home / "embeddings", ignore_errors=True)  # These checkouts change and keep their md5.
    embeddings = embed_dataset(version, EncoderConfig(input_px=32), home=home)
    return validate_dataset(version, config, home=home, embeddings=embeddings, **settings)


def _outcome(verdict: ValidationVerdict, name: str):
    return next(outcome for outcome in verdict.outcomes if outcome.name == name)


def test_a_clean_dataset_passes_every_check_and_gets_pages_that_need_no_network(
    clean_checkout, draw, tmp_path, monkeypatch
):
    def refuse(*_):
        raise AssertionError("nothing may connect")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    verdict = _validate(clean_checkout, tmp_path, ValidateConfig())
    assert verdict.passed
    assert [outcome.name for outcome in verdict.outcomes] == list(CHECK_NAMES)
    assert [outcome.name for outcome in verdict.failed] == []
    assert verdict.quarantined == ()
    folder = verdict.report_path.parent
    assert folder.parent == tmp_path / "validation" / "shapes"
    assert verdict.report_path == folder / "report.html"
    assert {path.name for path in folder.iterdir()} == {"report.html", "verdict.json", *REPORT_NAMES.values()}
    written = json.loads((folder / "verdict.json").read_text())
    assert ValidationVerdict(**written, directory=folder) == verdict
    for path in folder.glob("*.html"):
        loaded = re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=[\"']?([^\"' >]+)", path.read_text())
        assert not [address for address in loaded if re.match(r"(https?:)?//", address)], path.name
    integrity = (folder / REPORT_NAMES["data_integrity"]).read_text()
    assert "Feature Label Correlation" in integrity
    assert "Mixed Nulls" not in integrity
    assert "Datasets Size Comparison" in (folder / REPORT_NAMES["train_test_validation"]).read_text()
    assert _outcome(verdict, "deepchecks_multivariate_drift").summary == (
        "Not judged: it needs 200 images in train and in test, and one of them has 40."
    )
    looked_at = [_outcome(verdict, name).summary for name in DEEPCHECKS if name != "deepchecks_multivariate_drift"]
    assert all(re.match(r"0 of \d conditions failed, \d warn, over all 240 images\.", text) for text in looked_at)

    assert _validate(clean_checkout, tmp_path, ValidateConfig()) == verdict, "the same dataset gets the same verdict"
    clean_checkout.add("images/test/left/leak.png", "test", ["left"], draw("left", 1))
    changed = _validate(clean_checkout, tmp_path, ValidateConfig())
    assert changed.report_path == verdict.report_path, "the later validation replaces it"
    assert not json.loads((folder / "verdict.json").read_text())["passed"]


def test_the_same_code_judges_the_same_images_once(clean_checkout, tmp_path):
    first = _validate(clean_checkout, tmp_path, recipe="as it was")
    first.report_path.write_text("as it was left")
    assert _validate(clean_checkout, tmp_path, recipe="as it was") == first
    assert first.report_path.read_text() == "as it was left"
    (first.directory / "verdict.json").write_text("{")
    assert _validate(clean_checkout, tmp_path, recipe="as it was") == first, "a damaged verdict is made again"
    first.report_path.write_text("as it was left")
    assert _validate(clean_checkout, tmp_path, recipe="edited") == first
    assert first.report_path.read_text() != "as it was left"


def test_deepchecks_names_what_fails_and_leaves_process_and_filters_as_they_were(clean_checkout, draw, tmp_path):
    for number in range(170):
        dark = draw("right", 9000 + number) // 2
        clean_checkout.add(f"images/train/right/more{number}.png", "train", ["right"], draw("right", 8000 + number))
        clean_checkout.add(f"images/test/right/dark{number}.png", "test", ["right"], dark)
    for number in range(50):
        clean_checkout.add(f"images/test/left/copy{number}.png", "test", ["left"], draw("left", 1))

    before = list(warnings.filters)
    verdict = _validate(clean_checkout, tmp_path, ValidateConfig())
    assert warnings.filters == before
    found = _outcome(verdict, "deepchecks_multivariate_drift")
    assert not found.passed
    assert (found.severity, found.value, len(found.offenders)) == ("warn", 1.0, 1)
    assert "Drift value is less than" in found.offenders[0]
    sizes = _outcome(verdict, "deepchecks_datasets_size_comparison")
    assert sizes.passed, "what another of Deepchecks' checks finds is not said of this one"


def test_the_checks_left_out_are_checks_of_the_suites():
    from cv_platform.validation.checks.deepchecks_suites import _quiet_deepchecks

    with _quiet_deepchecks():
        from deepchecks.tabular.suites import data_integrity, train_test_validation

        names = {
            type(c).__name__ for suite in (data_integrity(), train_test_validation()) for c in suite.checks.values()
        }
    assert set(LEFT_OUT) <= names
    assert names - set(LEFT_OUT) == set(DEEPCHECKS.values())
    assert os.environ["DISABLE_DEEPCHECKS_ANONYMOUS_TELEMETRY"] == "True"


def test_names_planted_leak_conflict_wrong_label_and_unreadable_image(clean_checkout, draw, tmp_path):
    leaked = draw("left", 1)  # images/train/left/000.png
    clean_checkout.add("images/test/left/leak.png", "test", ["left"], leaked)
    clean_checkout.add("images/train/right/conflict.png", "train", ["right"], draw("left", 2))
    clean_checkout.add("images/train/right/wrong.png", "train", ["right"], draw("left", 7777))
    clean_checkout.add("images/train/left/text.png", "train", ["left"], b"no image", problem="not an image")
    clean_checkout.add("images/train/left/cut.png", "train", ["left"], b"\x89PNG\r\n\x1a\n")
    verdict = _validate(clean_checkout, tmp_path)
    assert not verdict.passed
    assert verdict.quarantined == ("images/train/left/cut.png", "images/train/left/text.png")
    assert _outcome(verdict, "unreadable_images").value == pytest.approx(2 / 245)
    assert _outcome(verdict, "unreadable_images").passed
    assert _outcome(verdict, "train_test_leakage").offenders == (
        "images/test/left/leak.png = images/train/left/000.png",
    )
    conflicts = _outcome(verdict, "conflicting_labels").offenders
    assert conflicts == ("images/train/left/001.png (left), images/train/right/conflict.png (right)",)
    suspects = " ".join(_outcome(verdict, "label_issues").offenders)
    assert "images/train/right/wrong.png: labelled right, looks like left" in suspects
    assert "images/train/right/conflict.png: labelled right, looks like left" in suspects


def test_warnings_do_not_block_and_checks_that_are_off_do_not_run(clean_checkout, draw, tmp_path):
    clean_checkout.add("images/test/left/leak.png", "test", ["left"], draw("left", 1))
    warn = ValidateConfig(deepchecks_suites="off", label_issues="off", train_test_leakage="warn")
    verdict = _validate(clean_checkout, tmp_path, warn)
    assert verdict.passed
    assert [outcome.name for outcome in verdict.failed] == ["train_test_leakage"]
    assert not {"label_issues", *DEEPCHECKS} & {outcome.name for outcome in verdict.outcomes}


def test_multi_label_data_are_judged_class_by_class_with_deepchecks(checkout, draw, tmp_path):
    seed = 0
    for split, count in (("train", 120), ("valid", 16), ("test", 100), ("reference", 16)):
        for labels in (["left"], ["right"], ["left", "right"], []):
            for number in range(count // 2):
                seed += 1
                image = draw("left", seed) if "left" in labels else np.full((16, 16, 3), 20, np.uint8)
                if "right" in labels:
                    image[:, 8:] = draw("right", seed)[:, 8:]
                image[0, 0] = (seed // 256, seed % 256, 0)
                checkout.add(f"{split}/{'-'.join(labels) or 'none'}{number}.png", split, labels, image)
    verdict = _validate(checkout, tmp_path, ValidateConfig(), classifier_type="multi-label")
    assert verdict.passed, verdict.failed
    assert _outcome(verdict, "label_drift").passed
    assert _outcome(verdict, "deepchecks_feature_label_correlation").summary.startswith("Not judged: ")
    assert _outcome(verdict, "deepchecks_multivariate_drift").summary.startswith("0 of 1 conditions failed")
    assert "Multivariate Drift" in (verdict.report_path.parent / REPORT_NAMES["train_test_validation"]).read_text()


def test_a_missing_test_split_is_a_finding_and_not_an_error(clean_checkout, tmp_path):
    clean_checkout.rows = [row for row in clean_checkout.rows if row["split"] != "test"]
    verdict = _validate(clean_checkout, tmp_path, ValidateConfig())
    assert not verdict.passed
    assert [outcome.name for outcome in verdict.failed] == ["class_coverage"]
    assert "train or test has no images" in _outcome(verdict, "deepchecks_datasets_size_comparison").summary
    assert not (verdict.report_path.parent / REPORT_NAMES["train_test_validation"]).exists()


def test_a_dataset_without_one_readable_image_is_a_finding_and_not_an_error(checkout, tmp_path):
    checkout.add("train/a.png", "train", ["left"], b"", problem="empty")
    verdict = _validate(checkout, tmp_path, ValidateConfig())
    assert not verdict.passed
    assert verdict.quarantined == ("train/a.png",)
    assert {o.name for o in verdict.failed} == {"unreadable_images", "quarantined_images", "class_coverage"}


def test_the_report_escapes_names_from_the_dataset(clean_checkout, draw, tmp_path):
    hostile = "<img src=x onerror=alert(1)>"
    for split in ("train", "valid", "test", "reference"):
        for number in range(12):
            image = draw("left", 5000 + number)
            clean_checkout.add(f"{split}/{hostile}{number}.png", split, [hostile], image)
    verdict = _validate(clean_checkout, tmp_path, ValidateConfig(), class_names=(*CLASSES, hostile))
    for page in verdict.report_path.parent.glob("*.html"):
        assert hostile not in page.read_text(), page.name


def test_large_splits_are_sampled_with_a_seed_and_it_is_said(clean_checkout):
    from cv_platform.datasets.manifest import read_manifest
    from cv_platform.validation.sample import read_sample

    version = clean_checkout.version(CLASSES)
    manifest = read_manifest(version.manifest_path)
    vectors = np.arange(240, dtype=np.float16)[:, None]
    sample = read_sample(manifest, version.directory, vectors, max_per_split=50)
    np.testing.assert_array_equal(sample.embeddings[:, 0], pd.Index(manifest["path"]).get_indexer(sample.rows["path"]))
    assert len(sample.rows) == 50 + 3 * 40
    assert sample.description == "a seeded sample of 170 of 240 images"
    assert read_sample(manifest, version.directory, vectors, max_per_split=50).rows.equals(sample.rows)
    other = read_sample(manifest, version.directory, vectors, max_per_split=50, seed=1)
    assert not other.rows["path"].equals(sample.rows["path"])


def test_experiments_with_other_limits_keep_their_reports_apart(clean_checkout, tmp_path: Path):
    one = _validate(clean_checkout, tmp_path)
    same = _validate(clean_checkout, tmp_path)
    other = _validate(clean_checkout, tmp_path, WITHOUT_DEEPCHECKS.model_copy(update={"max_duplicate_fraction": 0.5}))
    assert same.report_path == one.report_path
    assert other.report_path != one.report_path
    assert one.report_path.exists()


def test_deepchecks_sees_an_unknown_label_as_a_category_of_its_own():
    sample = ImageSample(
        pd.DataFrame(
            {"labels": [["cat"], [], ["dog"]], "unknown_labels": [[], ["cat"], []], "sha256": ["a", "b", "c"]}
        ),
        np.zeros((3, 32, 32, 3), np.uint8),
        np.zeros((3, 7), np.float32),
        np.zeros((3, 1), np.float32),
        {},
        3,
    )
    table, categorical = image_table(sample, ("cat", "dog"), "multi-label")
    assert categorical == ["has cat", "has dog"]
    assert table["has cat"].tolist() == ["1", "unknown", "0"]
    assert table["has dog"].tolist() == [0, 0, 1]
