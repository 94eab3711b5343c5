"""The assets `batch_scores` and `batch_drift_report`, which a config has to ask for."""

from __future__ import annotations

from pathlib import Path

import dagster as dg
import pyarrow.parquet as pq
import pytest

from cv_platform.config import MonitorConfig
from cv_platform.definitions import build_defs
from cv_platform.drift.reference import ReferenceIdentity, write_reference
from cv_platform.monitoring.scored import read_scores
from cv_platform.record_store import RecordStore
from cv_platform.records import BatchDriftReport, BatchScores
from cv_platform.storage import CentralStorage
from cv_platform_tests.support.hand_made import hand_made_export
from cv_platform_tests.support.pictures import write_pictures
from cv_platform_tests.support.record_samples import VERSION, deployment, identity
from cv_platform_tests.support.tiny_models import publish_tiny

DIGITS = Path(__file__).parents[2] / "configs" / "digits.yaml"
KEY = dg.AssetKey(["digits", "batch_scores"])


def test_the_images_of_a_folder_are_scored_by_the_model_in_production(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CV_HOME", str(tmp_path / "home"))
    images = write_pictures(tmp_path / "images", ["a.png", "b.png"])
    config = tmp_path / "digits.yaml"
    config.write_text(f"{DIGITS.read_text()}\nscore: {{source: {images}}}\n")
    storage = CentralStorage(tmp_path / "home" / "storage")
    metadata = publish_tiny(storage, hand_made_export(tmp_path / "export"), VERSION)
    records = RecordStore(tmp_path / "home", "digits")
    records.write("deployment", deployment(), run_id="0")
    assert KEY not in build_defs(DIGITS).resolve_asset_graph().get_all_asset_keys()
    job = build_defs(config).resolve_job_def("digits_experiment")
    materialized = job.execute_in_process(asset_selection=[KEY])
    (event,) = materialized.asset_materializations_for_node("digits__batch_scores")
    assert (event.metadata["dagster/row_count"].value, event.metadata["without_an_answer"].value) == (2, 0)
    record = records.latest(BatchScores)
    assert record is not None
    assert (record.model, record.source) == (identity(), str(images))
    assert pq.read_table(record.directory / BatchScores.FILE)["path"].to_pylist() == ["a.png", "b.png"]

    window, _ = read_scores(record.directory / BatchScores.FILE, MonitorConfig())
    assert window.sample is not None
    origin = ReferenceIdentity(
        model_name=metadata.model_name,
        model_version=VERSION,
        preprocessing_hash=metadata.preprocessing_hash,
        encoder_hash=metadata.encoder_hash,
        class_names=metadata.class_names,
    )
    said, path = window.rows["predicted_class"].tolist(), tmp_path / "reference.parquet"
    write_reference(path, origin, window.sample, paths=said, sha256=said, labels=said, predicted=said)
    storage.publish_reference_data(path, metadata.model_name, VERSION)
    judged = job.execute_in_process(asset_selection=[dg.AssetKey(["digits", "batch_drift_report"])])
    (check,) = judged.get_asset_check_evaluations()
    assert (check.check_name, check.passed) == ("no_drift", True)
    report = records.latest(BatchDriftReport)
    assert report is not None
    assert (report.verdict, report.rows, report.source) == ("insufficient data", 2, str(images))
    assert (report.directory / BatchDriftReport.FILE).exists()
