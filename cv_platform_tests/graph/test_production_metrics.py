"""The asset `production_metrics`, materialised by Dagster on a real request log."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import dagster as dg
import pytest
from sqlalchemy import Engine, insert

from cv_platform.database.schema import feedback, predictions
from cv_platform.definitions import build_defs
from cv_platform.record_store import RecordStore
from cv_platform.records import ProductionMetrics

DIGITS = Path(__file__).parents[2] / "configs" / "digits.yaml"
KEY = dg.AssetKey(["digits", "production_metrics"])


@pytest.mark.xdist_group("tracking")
def test_says_that_there_is_no_feedback_then_measures_it_and_notes_what_was_overridden(
    engine: Engine, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setenv("CV_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    job = build_defs(DIGITS).resolve_job_def("digits_drift_report")

    empty = job.execute_in_process(asset_selection=[KEY])
    empty_tags = empty.asset_materializations_for_node("digits__production_metrics")[0].tags
    (check,) = empty.get_asset_check_evaluations()
    assert check.passed
    assert check.description.startswith("Insufficient feedback: 0 of 0 predictions")
    assert not (tmp_path / "home" / "mlflow").exists()

    yesterday = datetime.now(UTC) - timedelta(days=1)
    row = {"prediction_id": uuid4(), "model_name": "digits_classifier", "model_version": "v1", "predicted_class": "3"}
    vectors = {name: [] for name in ("uae_feats", "bbsd_feats", "features", "properties")}
    said = {"entry_id": uuid4(), "prediction_id": row["prediction_id"], "true_class": "5", "source": "page"}
    with engine.begin() as connection:
        connection.execute(insert(predictions), {**row, **vectors, "prediction_json": {}, "created_on": yesterday})
        connection.execute(insert(feedback), {**said, "created_on": yesterday})
    override = {"resources": {"digits_config": {"config": {"monitor": {"min_feedback": 11}}}}}
    measured = job.execute_in_process(override, asset_selection=[KEY])

    (materialization,) = measured.asset_materializations_for_node("digits__production_metrics")
    assert materialization.metadata["with_feedback"].value == 1
    assert Path(materialization.metadata["accuracy"].value).read_bytes().startswith(b"\x89PNG")
    as_the_yaml = build_defs(DIGITS).resolve_asset_graph().get(KEY).code_version
    assert empty_tags["dagster/code_version"] == as_the_yaml
    assert materialization.tags["dagster/code_version"] not in {None, as_the_yaml}
    assert materialization.tags["dagster/data_version"] != empty_tags["dagster/data_version"]
    record = RecordStore(tmp_path / "home", "digits").latest(ProductionMetrics)
    assert record is not None
    assert (record.versions[0].right_share, record.versions[0].verdict) == (0.0, "insufficient feedback")
