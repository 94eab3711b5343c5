"""Drift reports end to end: rows in a real PostgreSQL, reference parquet, central storage, Evidently's folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import cv2
import numpy as np
import pytest
from sqlalchemy import Engine, insert, select

from cv_platform.audit import AuditLog, Note, this_user
from cv_platform.cli import main
from cv_platform.config import ExperimentConfig, MonitorConfig, parse_experiment
from cv_platform.database.schema import deletions, drift_reports, feedback, images, predictions, upload_vectors
from cv_platform.datasets.packing import open_split
from cv_platform.defs.monitoring import drift_metadata
from cv_platform.drift.reference import (
    ReferenceIdentity,
    read_identity,
    read_reference,
    read_reference_labels,
    write_reference,
)
from cv_platform.drift.sample import DriftSample
from cv_platform.encoders.embeddings import embed_files
from cv_platform.encoders.encoder import open_encoder
from cv_platform.errors import DriftError, InvalidSampleError, ReferenceMismatchError, StorageError
from cv_platform.images import preprocessing_hash
from cv_platform.monitoring.accept import accept_window, current_normal, find_report, forget_deleted
from cv_platform.monitoring.episodes import open_episode, what_changed
from cv_platform.monitoring.report import ReportPlace, make_drift_report
from cv_platform.monitoring.sentences import drift_summary
from cv_platform.monitoring.top_images import contact_sheet
from cv_platform.records import DriftDetectors, DriftReport, ModelIdentity
from cv_platform.serving.log.deletion import delete_from_database
from cv_platform.storage import CentralStorage
from cv_platform_tests.support.drift_samples import CLASSES, draw_sample
from cv_platform_tests.support.tiny_training import pack_tiny

START = datetime(2026, 2, 1, tzinfo=UTC)
NOW = datetime(2026, 2, 8, tzinfo=UTC)
VERSION = "20260131T060000Z-1f3c9a2e"
MONITOR = MonitorConfig(min_samples=100)


@pytest.fixture(autouse=True)
def _no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DO_NOT_TRACK", "1")


@dataclass
class Installation:
    """Everything that a report needs, below one folder."""

    home: Path
    engine: Engine
    config: ExperimentConfig
    storage: CentralStorage
    reference_path: Path

    def report(self, *, version: str = VERSION, accepted: Path | None = None, **changes: Any) -> DriftReport:
        place = ReportPlace(self.storage, self.home / "evidently", self.home)
        return make_drift_report(
            self.config,
            ModelIdentity(model_name="insects", version=version),
            self.reference_path,
            engine=self.engine,
            place=dataclasses.replace(place, **changes),
            now=NOW,
            accepted=accepted,
        )

    def log(
        self,
        sample: DriftSample,
        *,
        upload: bool = False,
        minutes: int = 0,
        version: str = VERSION,
        origin: Mapping[str, str | None] | None = None,
    ) -> list[UUID]:
        """Logs a sample as requests, a minute apart; with uploads of its own for each if asked for."""
        ids, rows = [uuid4() for _ in range(len(sample))], []
        with self.engine.begin() as connection:
            for i, prediction_id in enumerate(ids):
                sha256 = f"{i:064x}" if upload else None
                if upload:
                    picture = np.full((20, 20, 3), i % 256, dtype=np.uint8)
                    content = cv2.imencode(".png", picture)[1].tobytes() if i else b"broken"
                    values = {"content": content, "bytes": len(content), "media_type": "image/png"}
                    connection.execute(insert(images).values(sha256=sha256, **values))
                rows.append(
                    {
                        "prediction_id": prediction_id,
                        "model_name": "insects",
                        "model_version": version,
                        "predicted_class": CLASSES[int(sample.bbsd[i].argmax())],
                        "prediction_json": {},
                        "uae_feats": sample.uae[i].tolist(),
                        "bbsd_feats": sample.bbsd[i].tolist(),
                        "features": sample.features[i].tolist(),
                        "properties": sample.properties[i].tolist(),
                        "image_sha256": sha256,
                        "created_on": START + timedelta(minutes=minutes + i),
                        **(origin or {}),
                    }
                )
            connection.execute(insert(predictions), rows)
        return ids

    def stored(self) -> list[Any]:
        with self.engine.connect() as connection:
            return list(connection.execute(select(drift_reports)))


@pytest.fixture
def installation(tmp_path: Path, engine: Engine) -> Installation:
    config = parse_experiment(
        {
            "name": "insects",
            "model": {"model_name": "insects", "classes": CLASSES, "input_size": {"h": 16, "w": 16}},
            "dataset": {"ds_name": "insects", "dvc_tag": "v1"},
            "monitor": {"permutations": 99, "min_samples": 100},
        },
        origin="test",
    )
    reference = draw_sample(np.random.default_rng(0), 250)
    path = tmp_path / "insects_ref_data.parquet"
    identity = ReferenceIdentity(
        model_name="insects",
        model_version=VERSION,
        preprocessing_hash=preprocessing_hash((16, 16)),
        encoder_hash="0" * 16,
        class_names=CLASSES,
    )
    predicted = [CLASSES[i] for i in reference.bbsd.argmax(axis=1)]
    names = [f"{i}.png" for i in range(250)]
    write_reference(path, identity, reference, paths=names, sha256=names, labels=predicted, predicted=predicted)
    return Installation(tmp_path, engine, config, CentralStorage(tmp_path / "storage"), path)


def test_unshifted_requests_are_no_drift(installation: Installation) -> None:
    installation.log(draw_sample(np.random.default_rng(4), 150))
    report = installation.report()
    assert (report.verdict, report.rows, report.requests, report.problems) == ("no drift", 150, 150, ())
    assert (report.moved_classes, report.drifted_detectors) == ((), ())
    assert report.order_p_value is not None
    assert report.order_p_value > 0.01
    assert report.accuracy_estimate is not None
    assert report.accuracy_estimate.is_reliable
    assert report.accuracy_estimate.reference_accuracy == 1.0


def test_shifted_requests_are_drift_explained_and_kept_everywhere(installation: Installation) -> None:
    rng = np.random.default_rng(2)
    ids = installation.log(draw_sample(rng, 150, shift=2.0), upload=True)
    with installation.engine.begin() as connection:
        entry = {"entry_id": uuid4(), "source": "page", "true_class": "no such insect"}
        connection.execute(insert(feedback).values(prediction_id=ids[0], **entry))
    report = installation.report()

    assert report.verdict == "drift"
    assert report.effects is not None
    assert len(report.classes) == len(CLASSES)
    assert report.accuracy_estimate is not None
    assert not report.accuracy_estimate.is_reliable
    assert (report.feedback_rows, report.feedback_accuracy) == (1, 0.0)
    assert len(report.top_images) == 12
    scores = [row["score"] for row in report.top_images]
    assert scores == sorted(scores, reverse=True)

    (row,) = installation.stored()
    assert (row.verdict, row.rows, row.experiment) == ("drift", 150, "insects")
    assert (row.window_start_utc, row.window_end_utc) == (START, NOW)
    assert row.details["adjusted_p_values"] == report.adjusted_p_values
    assert row.report_url == report.report_url

    page = Path(report.report_url.removeprefix("file://"))
    assert page.read_text().count("<img") >= 11
    assert json.loads(page.with_name("report.json").read_text())["report_id"] == report.report_id
    runs = list((installation.home / "evidently").glob("*/snapshots/*.json"))
    assert [path.stem for path in runs] == [report.evidently_run_id]
    assert list((installation.home / "cache" / "drift_reports").iterdir()) == []


def test_images_that_drive_it_stand_beside_the_most_similar_of_the_reference(
    installation: Installation, tmp_path: Path
) -> None:
    packed, path = pack_tiny(tmp_path), installation.reference_path
    kept = open_split(packed, "reference").sha256
    names = [kept[at % len(kept)] for at in range(250)]
    labels = [f"of {name[:4]}" for name in names]
    write_reference(
        path, read_identity(path), read_reference(path), paths=names, sha256=names, labels=labels, predicted=labels
    )
    installation.log(draw_sample(np.random.default_rng(2), 150, shift=2.0), upload=True)
    detectors = DriftDetectors(
        model=ModelIdentity(model_name="insects", version=VERSION),
        directory=tmp_path / "insects",
        encoder_hash="0" * 16,
        uae_dims=6,
        feature_dims=12,
    )
    detectors.plot_path.parent.mkdir()
    detectors.plot_path.write_text("<svg/>")
    report = installation.report(packed=packed, detectors=detectors)
    uploads = {row["image_sha256"] for row in report.top_images}
    for row in report.top_images:
        assert [one["label"] for one in row["nearest"]] == [f"of {one['image_sha256'][:4]}" for one in row["nearest"]]
        assert len(row["nearest"]) == 3
    page = Path(report.report_url.removeprefix("file://")).read_text()
    assert page.count("<img") == len(uploads - {f"{0:064x}"}) + 36 + 1 + 1, "all but the upload that does not decode"
    assert "Where they lie" in page
    assert "by the images in a window (here 150)" in page
    assert "not here" not in page
    sheet = contact_sheet(report, installation.engine)
    assert sheet is not None
    shape = cv2.imdecode(np.frombuffer(sheet, np.uint8), cv2.IMREAD_COLOR).shape
    assert shape == (2 * 160, 4 * 160, 3), "eight of them, for an alert"
    (packed.directory / "packed.json").unlink()
    other = detectors.model_copy(update={"model": ModelIdentity(model_name="insects", version="another")})
    report = installation.report(packed=packed, detectors=other)
    page = Path(report.report_url.removeprefix("file://")).read_text()
    assert "images in a window" not in page, "what another version's detectors notice"
    assert page.count("not here") == 36
    assert "Images of the reference cannot be shown: Expected a pack" in page


def test_requests_class_by_class_are_no_drift_and_the_report_says_so(installation: Installation) -> None:
    sample = draw_sample(np.random.default_rng(4), 150)
    installation.log(sample.take(np.argsort(sample.bbsd.argmax(axis=1), kind="stable")))
    report = installation.report()
    assert report.verdict == "no drift"
    page = Path(report.report_url.removeprefix("file://")).read_text()
    assert "Requests come in blocks of one predicted class (runs test, p 0.001)." in page


@pytest.mark.parametrize("column", ["tag", "network"])
def test_a_part_of_the_traffic_that_moved_is_named(installation: Installation, column: str) -> None:
    rng = np.random.default_rng(4)
    for at, (tag, shift) in enumerate([("line-1", 0.0), ("line-2", 2.0), (None, 0.0)]):
        installation.log(draw_sample(rng, 50, shift=shift), minutes=at * 60, origin={column: tag})
    report = installation.report()
    assert [one.value for one in report.slices] == ["line-2", "line-1"]
    worst = report.worst_slice
    assert worst
    assert (worst.column, worst.rows, worst.adjusted_p_value < 0.01) == (column, 50, True)
    assert f"Clearest in the 50 requests of {column} line-2" in drift_summary(report)
    assert "<code>line-2</code>" in Path(report.report_url.removeprefix("file://")).read_text()


def test_an_accepted_window_is_what_later_requests_are_compared_with_and_ends_the_episode(
    installation: Installation,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = ModelIdentity(model_name="insects", version=VERSION)
    storage, engine, cache = installation.storage, installation.engine, installation.home / "cache"
    storage.publish_reference_data(installation.reference_path, "insects", VERSION)
    rng = np.random.default_rng(2)
    ids = installation.log(draw_sample(rng, 150, shift=2.0))
    first = installation.report()
    assert (first.verdict, what_changed(engine, first)) == ("drift", "drift")
    assert open_episode(engine, experiment="insects", model=model)
    with pytest.raises(DriftError, match="Expected a reason"):
        accept_window(first.report_id, MONITOR, engine=engine, storage=storage, cache=cache, note=Note("ada", " "))
    few = MonitorConfig(min_samples=1000)
    with pytest.raises(DriftError, match="Expected at least 1000 usable requests"):
        accept_window(first.report_id, few, engine=engine, storage=storage, cache=cache, note=Note("ada", "new lamp"))
    with pytest.raises(DriftError, match="of which the log has none"):
        find_report(engine, str(uuid4()))
    with pytest.raises(DriftError, match="a UUID"):
        find_report(engine, "latest")
    assert storage.read_accepted("insects", VERSION) is None

    for name, value in {
        "DATABASE_URL": database_url,
        "CV_HOME": str(installation.home),
        "CV_STORAGE": str(installation.home / "storage"),
        "CV_CONFIGS": str(installation.home / "configs"),
    }.items():
        monkeypatch.setenv(name, value)
    (installation.home / "configs").mkdir()
    assert main(["drift", "accept", first.report_id, "--because", "new lamps"]) == 0
    accepted = storage.read_accepted("insects", VERSION)
    assert accepted
    assert f"insects {VERSION}: the next report compares with {accepted.told()}" in capsys.readouterr().out
    assert accepted.told().endswith(f"taken as normal by {this_user()}: new lamps")
    (entry,) = AuditLog(storage.url).entries()
    assert (entry.action, entry.by, entry.because) == ("accept", this_user(), "new lamps")
    assert first.report_id in entry.subject
    assert open_episode(engine, experiment="insects", model=model, reference=accepted.report_id) is None

    installation.log(draw_sample(rng, 150, shift=2.0), minutes=3000)
    installation.config = installation.config.with_fields({"monitor.window_start_utc": "2026-02-02T20:00:00+00:00"})
    path = storage.fetch_accepted("insects", VERSION, accepted, cache)
    second = installation.report(accepted=path)
    assert (second.rows, second.verdict, second.reference) == (150, "no drift", first.report_id)
    assert second.accuracy_estimate
    assert second.accuracy_estimate.reference_accuracy == 1.0, "by the labelled reference split"
    assert what_changed(engine, second) is None, "the episode ended when the window was accepted"
    assert installation.report().verdict == "drift", "against the reference split it would go on"

    delete_from_database(engine, ids[3])
    left = current_normal(engine, storage, model, cache)
    assert left
    assert not path.exists()
    assert str(ids[3]) not in read_reference_labels(left)["path"].tolist()
    assert installation.report(accepted=left).reference_rows == 149
    assert current_normal(engine, storage, model, cache) == left, "nothing else was deleted"
    with engine.begin() as connection:
        connection.execute(insert(deletions), [{"prediction_id": one} for one in ids[4:140]])
    forget_deleted(engine, storage, ["insects"], cache)
    assert storage.read_accepted("insects", VERSION) is None, "13 rows are too few to compare with"
    assert not left.exists()


def encode_reference(installation: Installation, config: ExperimentConfig) -> None:
    """Keeps vectors of grey pictures as those of the reference's images, as the asset `embeddings` does."""
    encoder = open_encoder(config.encoder, installation.home)
    greys = [np.full((32, 32, 3), at % 256, dtype=np.uint8) for at in range(250)]
    embed_files([f"{at}.png" for at in range(250)], lambda part: [greys[at] for at in part], encoder, installation.home)


def kept(engine: Engine) -> dict[str, int]:
    with engine.connect() as connection:
        return {row.sha256: len(row.vector) for row in connection.execute(select(upload_vectors))}


def test_the_encoder_s_tests_look_at_stored_images_once_and_forget_those_that_are_deleted(
    installation: Installation,
) -> None:
    detectors = ["bbsd_ks", "encoder_mmd", "encoder_classifier"]
    installation.config = installation.config.with_fields({"monitor.detectors": detectors, "encoder.input_px": 32})
    ids = installation.log(draw_sample(np.random.default_rng(4), 120), upload=True)
    with installation.engine.begin() as connection:
        connection.execute(
            predictions.update().where(predictions.c.prediction_id.in_(ids[100:])).values(image_sha256=None)
        )
    without = installation.report()
    assert (set(without.p_values), without.encoded_rows) == ({"bbsd_ks"}, 99)
    assert any("took no part: they have 0 images of the reference" in problem for problem in without.problems)

    encode_reference(installation, installation.config)
    sizes = kept(installation.engine)
    assert (len(sizes), sizes.pop(f"{0:064x}")) == (100, 0), "the first does not decode, and is not asked again"
    with installation.engine.begin() as connection:
        connection.execute(images.update().values(content=b"what is kept is not computed again"))
    report = installation.report()
    assert (set(report.p_values), report.encoded_rows) == (set(detectors), 99)
    assert any("looked at 99 of 120 images of the window" in problem for problem in report.problems)
    assert report.verdict == "drift", "the darkest hundred greys of 250"
    page = Path(report.report_url.removeprefix("file://")).read_text()
    assert "Pretrained encoder (classifier)" in page

    delete_from_database(installation.engine, ids[7])
    assert f"{7:064x}" not in kept(installation.engine)
    few = installation.config.with_fields({"monitor.max_encoded": 20, "monitor.min_samples": 50})
    installation.config = few
    assert 10 <= installation.report().encoded_rows <= 20


def test_two_reports_of_a_window_at_once_are_one_in_the_end(installation: Installation) -> None:
    installation.log(draw_sample(np.random.default_rng(1), 120))
    with ThreadPoolExecutor(2) as pool:
        reports = [one.result() for one in [pool.submit(installation.report) for _ in range(2)]]
    assert reports[0].adjusted_p_values == pytest.approx(reports[1].adjusted_p_values)
    (row,) = installation.stored()
    assert row.details["evidently_run_id"] in {report.evidently_run_id for report in reports}


def test_a_second_report_of_the_same_window_replaces_the_first(installation: Installation) -> None:
    installation.log(draw_sample(np.random.default_rng(1), 120))
    first = installation.report()
    installation.log(draw_sample(np.random.default_rng(3), 30))
    second = installation.report()
    assert second.report_id == first.report_id
    assert [(row.rows, row.details["evidently_run_id"]) for row in installation.stored()] == [
        (150, second.evidently_run_id)
    ]
    runs = list((installation.home / "evidently").glob("*/snapshots/*.json"))
    assert [path.stem for path in runs] == [second.evidently_run_id]
    assert first.report_url == second.report_url


def test_a_report_that_could_not_be_kept_leaves_the_run_that_the_row_names(installation: Installation) -> None:
    installation.log(draw_sample(np.random.default_rng(1), 120))
    first = installation.report()
    blocked = installation.home / "blocked"
    blocked.mkdir()
    (blocked / "reports").touch()  # A file where the reports' folder should be.
    with pytest.raises(StorageError, match="publish the report"):
        installation.report(storage=CentralStorage(blocked))
    (row,) = installation.stored()
    assert row.details["evidently_run_id"] == first.evidently_run_id
    runs = {path.stem for path in (installation.home / "evidently").glob("*/snapshots/*.json")}
    assert runs == {first.evidently_run_id}

    third = installation.report()
    runs = {path.stem for path in (installation.home / "evidently").glob("*/snapshots/*.json")}
    assert runs == {third.evidently_run_id}


def test_the_same_window_gives_the_same_numbers(installation: Installation) -> None:
    installation.log(draw_sample(np.random.default_rng(1), 120, shift=0.2))
    first, second = (installation.report().model_dump(exclude={"evidently_run_id"}) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("rows", [0, 1, 99])
def test_too_few_requests_are_insufficient_data(installation: Installation, rows: int) -> None:
    if rows:
        installation.log(draw_sample(np.random.default_rng(1), rows))
    report = installation.report()
    assert (report.verdict, report.rows) == ("insufficient data", rows)
    assert (report.p_values, report.top_images, report.effects) == ({}, [], None)
    assert [row.verdict for row in installation.stored()] == ["insufficient data"]
    assert "insufficient data" in Path(report.report_url.removeprefix("file://")).read_text()


def test_requests_of_another_version_do_not_count(installation: Installation) -> None:
    installation.log(draw_sample(np.random.default_rng(1), 120))
    other = "20260202T060000Z-00000000"
    with pytest.raises(ReferenceMismatchError, match=f"model_version {VERSION} instead of {other}"):
        installation.report(version=other)
    assert installation.stored() == []


def test_a_window_in_which_the_pointer_moved_says_how_many_requests_it_does_not_judge(
    installation: Installation,
) -> None:
    installation.log(draw_sample(np.random.default_rng(3), 7), version="20260201T060000Z-00000000")
    installation.log(draw_sample(np.random.default_rng(4), 150), minutes=7)
    report = installation.report()
    assert (report.requests, report.rows, report.other_requests) == (150, 150, 7)
    assert drift_metadata(report)["other_requests"] == 7
    page = Path(report.report_url.removeprefix("file://")).read_text()
    assert "Other versions of the model answered 7 requests more, which this report does not judge." in page


def test_rows_of_another_width_than_the_reference_are_refused(installation: Installation) -> None:
    sample = draw_sample(np.random.default_rng(1), 120)
    installation.log(DriftSample(sample.bbsd, sample.features[:, :5], sample.uae, sample.properties))
    with pytest.raises(InvalidSampleError, match="features: 12 columns in the reference, 5 in the current sample"):
        installation.report()


def test_the_report_is_kept_when_evidently_is_away(installation: Installation) -> None:
    installation.log(draw_sample(np.random.default_rng(1), 120))
    report = installation.report(evidently="http://127.0.0.1:9")
    assert report.verdict != "insufficient data"
    assert report.evidently_run_id is None
    assert any("Not in Evidently" in problem for problem in report.problems)
    assert len(installation.stored()) == 1


def test_one_upload_sent_again_and_again_is_judged_once_and_mentioned(installation: Installation) -> None:
    rng = np.random.default_rng(1)
    sample = draw_sample(rng, 120)
    ids = installation.log(sample, upload=True)
    with installation.engine.begin() as connection:
        repeated = predictions.c.prediction_id.in_(ids[:60])
        connection.execute(predictions.update().where(repeated).values(image_sha256="1".zfill(64)))
    report = installation.report()
    shown = [row["image_sha256"] for row in report.top_images]
    assert len(shown) == len(set(shown))
    assert (report.requests, report.repeated_rows, report.rows) == (120, 59, 61)
    assert any("59 of 120 requests repeat a picture" in problem for problem in report.problems)
