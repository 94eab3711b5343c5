"""A prediction's passport: the link to its training run leads where people open MLflow, or is left out."""

from __future__ import annotations

from datetime import UTC, datetime
from uuid import UUID

import numpy as np
import pytest

from cv_platform.serving.log.entry import StoredPrediction
from cv_platform.serving.log.passport import make_passport
from cv_platform.storage import BundleMetadata

NOTHING = np.zeros(0, np.float32)
STORED = StoredPrediction(
    prediction_id=UUID("12345678-1234-4678-8234-567812345678"),
    model_name="digits",
    model_version="2026-01-01T00-00-00Z-abcdef",
    predicted_class="3",
    prediction_json={"3": 1.0},
    uae_feats=NOTHING,
    bbsd_feats=NOTHING,
    features=NOTHING,
    properties=NOTHING,
    raw_hm=None,
    image_sha256=None,
    image=None,
    media_type=None,
    created_on=datetime(2026, 1, 2, tzinfo=UTC),
)


def metadata(run_id: str | None) -> BundleMetadata:
    return BundleMetadata.model_construct(mlflow_run_id=run_id, git_commit="b40259d", checksums={"a": "1"})


@pytest.mark.parametrize(
    ("mlflow_url", "run_id", "expected"),
    [
        ("https://vision.example.org:5050", "0a1b", "https://vision.example.org:5050/#/runs/0a1b"),
        ("http://localhost:5050/base/", "0a1b", "http://localhost:5050/base/#/runs/0a1b"),
        (None, "0a1b", None),
        ("https://vision.example.org:5050", None, None),
    ],
)
def test_names_the_page_of_the_training_run(mlflow_url: str | None, run_id: str | None, expected: str | None) -> None:
    passport = make_passport(STORED, metadata(run_id), mlflow_url=mlflow_url)
    assert passport["training_run"] == expected
    assert passport["model"]["git_commit"] == "b40259d"
