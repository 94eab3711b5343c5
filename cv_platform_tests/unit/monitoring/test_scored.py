"""Drift reports of images that were scored in one go."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path

import cv2
import numpy as np
import pytest

from cv_platform.cli import main
from cv_platform.config import MonitorConfig
from cv_platform.drift.reference import ReferenceIdentity, write_reference
from cv_platform.errors import BundleNotFoundError
from cv_platform.monitoring.scored import ScoredImages, read_scores, report_on_scores
from cv_platform.monitoring.sentences import drift_summary
from cv_platform.records import BatchDriftReport, ModelIdentity
from cv_platform.scoring.score import score_images
from cv_platform.scoring.sources import reader_of
from cv_platform.settings import Settings
from cv_platform.storage import CentralStorage
from cv_platform_tests.support.hand_made import hand_made_export
from cv_platform_tests.support.pictures import picture, write_pictures
from cv_platform_tests.support.tiny_models import MODEL_NAME, publish_tiny

VERSION = "20260101T000000Z-00000001"
NOW = datetime(2026, 2, 1, tzinfo=UTC)
MONITOR = MonitorConfig()


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("CV_HOME", str(tmp_path / "home"))
    return with_reference(tmp_path)


def with_reference(tmp_path: Path) -> Settings:
    """Returns an installation with a published model, and reference data of 300 pictures that it has answered."""
    made = Settings.from_environment()
    storage = CentralStorage(made.storage_url)
    metadata = publish_tiny(storage, hand_made_export(tmp_path / "export"), VERSION)
    window, _ = read_scores(scores_of(folder(tmp_path / "held-out", 300), made), MONITOR)
    assert window.sample is not None
    identity = ReferenceIdentity(
        model_name=MODEL_NAME,
        model_version=VERSION,
        preprocessing_hash=metadata.preprocessing_hash,
        encoder_hash=metadata.encoder_hash,
        class_names=metadata.class_names,
    )
    names, said = window.rows["image_sha256"].tolist(), window.rows["predicted_class"].tolist()
    path = tmp_path / "reference.parquet"
    write_reference(path, identity, window.sample, paths=names, sha256=names, labels=said, predicted=said)
    storage.publish_reference_data(path, MODEL_NAME, VERSION)
    return made


def folder(root: Path, count: int, first_seed: int = 0) -> Path:
    return write_pictures(root, [f"{number:04}.png" for number in range(count)], first_seed=first_seed)


def scores_of(images: Path, settings: Settings) -> Path:
    output = images.with_suffix(".parquet")
    score_images(str(images), VERSION, output, settings=settings)
    return output


def report_on(
    images: Path,
    settings: Settings,
    monitor: MonitorConfig = MONITOR,
    *,
    scores: Path | None = None,
    source: str | None = None,
) -> BatchDriftReport:
    model, source = ModelIdentity(model_name=MODEL_NAME, version=VERSION), source or str(images)
    return report_on_scores(
        ScoredImages(model, source, scores or scores_of(images, settings), reader_of(source)),
        monitor,
        images.with_suffix(".html"),
        experiment="tiny",
        storage=CentralStorage(settings.storage_url),
        cache=settings.home / "cache",
        now=NOW,
    )


def test_a_folder_like_the_held_out_images_has_not_drifted_and_a_darker_one_has(
    settings: Settings, tmp_path: Path
) -> None:
    images = folder(tmp_path / "same", 150, first_seed=1000)
    shutil.copy(images / "0000.png", images / "again.png")
    (images / "cut.png").write_bytes(picture(1)[:40])
    same = report_on(images, settings)
    assert (same.verdict, same.rows, same.requests, same.repeated_rows) == ("no drift", 150, 151, 1)
    assert [problem.partition(",")[0] for problem in same.problems] == ["1 images have no answer"]
    dark = folder(tmp_path / "dark", 150, first_seed=2000)
    for path in dark.iterdir():
        cv2.imwrite(str(path), np.asarray(cv2.imread(str(path))) // 2)
    drifted = report_on(dark, settings)
    assert drifted.verdict == "drift"
    assert drifted.effects is not None
    luma = drifted.effects.property_shifts[0]
    assert luma.name == "luma_mean"
    assert luma.current_mean == pytest.approx(luma.reference_mean / 2, rel=0.05)
    assert f"Drift in 150 images of {dark}, scored by {MODEL_NAME}" in drift_summary(drifted)
    page = dark.with_suffix(".html").read_text()
    assert page.count("data:image/jpeg") == 12  # The top images, by their files; no packed reference is here.
    assert all(row["prediction_id"] in page for row in drifted.top_images)


def test_few_images_have_no_verdict_and_many_are_drawn_from(settings: Settings, tmp_path: Path) -> None:
    few = report_on(folder(tmp_path / "few", 20), settings)
    assert (few.verdict, few.rows, few.p_values) == ("insufficient data", 20, {})
    assert "At least 100 usable images are needed; there are 20." in drift_summary(few)
    scores = scores_of(folder(tmp_path / "many", 250), settings)
    limited = MonitorConfig(max_samples=200)
    (drawn, unanswered), (again, _) = read_scores(scores, limited), read_scores(scores, limited)
    assert (len(drawn.rows), drawn.requests, drawn.is_sampled, unanswered) == (200, 250, True, 0)
    assert drawn.rows["prediction_id"].is_monotonic_increasing
    assert drawn.rows.equals(again.rows)


def test_what_was_scored_again_is_the_same_report_and_a_file_that_has_changed_is_not_shown(
    settings: Settings, tmp_path: Path
) -> None:
    images = folder(tmp_path / "images", 120, first_seed=4000)
    scores = scores_of(images, settings)
    first = report_on(images, settings, scores=scores)
    assert first.problems == ()
    later = first.model_copy(update={"window_start_utc": datetime(2027, 1, 1, tzinfo=UTC)})
    assert later.content_version() == first.content_version()
    gone, changed = (row["prediction_id"] for row in first.top_images[:2])
    (images / gone).unlink()
    (images / changed).write_bytes(picture(99_999))
    then = report_on(images, settings, scores=scores)
    assert (then.verdict, then.report_id) == (first.verdict, first.report_id)
    assert [problem.split(" is not shown")[0] for problem in then.problems] == [gone, changed]
    assert images.with_suffix(".html").read_text().count("data:image/jpeg") == 10


def test_many_copies_are_named_and_an_archive_shows_no_pictures(settings: Settings, tmp_path: Path) -> None:
    images = folder(tmp_path / "images", 110, first_seed=5000)
    for number in range(20):
        shutil.copy(images / "0000.png", images / f"copy-{number}.png")
    archive = Path(shutil.make_archive(str(tmp_path / "images"), "zip", images))
    report = report_on(archive, settings)
    assert (report.verdict, report.rows, report.repeated_rows) == ("no drift", 110, 20)
    assert [problem.partition(".")[0] for problem in report.problems] == [
        "20 of 130 images repeat a picture of the window"
    ]
    assert "data:image/jpeg" not in archive.with_suffix(".html").read_text()


def test_detectors_of_the_encoder_alone_have_no_verdict(settings: Settings, tmp_path: Path) -> None:
    monitor = MonitorConfig(detectors=("encoder_classifier",))
    report = report_on(folder(tmp_path / "images", 120, first_seed=6000), settings, monitor)
    assert report.verdict == "insufficient data"
    assert "Name another one for a verdict." in report.problems[0]


def test_a_folder_of_nothing_that_a_model_can_answer_has_no_verdict(settings: Settings, tmp_path: Path) -> None:
    images = folder(tmp_path / "cut", 3)
    for path in images.iterdir():
        path.write_bytes(path.read_bytes()[:40])
    report = report_on(images, settings)
    assert (report.verdict, report.rows, report.requests, report.unusable_rows) == ("insufficient data", 0, 0, 0)
    assert images.with_suffix(".html").exists()


def test_the_command_writes_the_page_and_says_the_verdict(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, page = folder(tmp_path / "images", 120, first_seed=3000), tmp_path / "drift.html"
    options = ["--model", VERSION, "--output", str(tmp_path / "scores.parquet"), "--report", str(page)]
    assert main(["score", str(images), *options]) == 0
    assert f"No drift in 120 images of {images}" in capsys.readouterr().out
    assert "<h2>Tests</h2>" in page.read_text()


@pytest.mark.parametrize("option", ["--output", "--report"])
def test_a_folder_in_place_of_a_file_is_named_before_anything_is_scored(
    tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {"--output": tmp_path / "scores.parquet", "--report": tmp_path / "page.html"} | {option: tmp_path}
    options = [str(one) for pair in paths.items() for one in pair]
    assert main(["score", str(tmp_path), "--model", VERSION, *options]) == 1
    assert f"Received: {tmp_path}, which is a folder" in capsys.readouterr().err


def test_a_version_without_reference_data_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CV_HOME", str(tmp_path / "home"))
    bare = Settings.from_environment()
    publish_tiny(CentralStorage(bare.storage_url), hand_made_export(tmp_path / "export"), VERSION)
    with pytest.raises(BundleNotFoundError, match=f"Expected reference data of {MODEL_NAME} {VERSION}"):
        report_on(folder(tmp_path / "images", 3), bare)
    output = tmp_path / "never.parquet"
    options = ["--model", VERSION, "--output", str(output), "--report", str(tmp_path / "page.html")]
    assert main(["score", str(tmp_path / "images"), *options]) == 1
    assert not output.exists(), "it is named before anything is scored"
