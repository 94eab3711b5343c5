"""The routes with a real exported model behind the real holder."""

from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from cv_platform.images import preprocess
from cv_platform.serving.app import create_app
from cv_platform.serving.model.holder import ModelHolder
from cv_platform.serving.model.runtime import load_folder
from cv_platform.serving.model.worker_watch import WorkerWatch
from cv_platform.storage import CentralStorage, ProductionPointer
from cv_platform_tests.support.app_fixtures import MakeWorker
from cv_platform_tests.support.http_client import Client, png
from cv_platform_tests.support.tiny_models import TinyExport, publish_tiny, tiny_metadata


def test_serves_the_probabilities_and_the_passport_of_the_model_in_production(
    make_worker: MakeWorker, hand_made: TinyExport, tmp_path: Path
):
    storage = CentralStorage(tmp_path / "storage")
    config = {"model": {"model_name": "tiny"}}
    metadata = publish_tiny(storage, hand_made, mlflow_run_id="0a1b2c", effective_config=config)
    storage.write_pointer(
        "image_classifier",
        ProductionPointer(model_name="tiny", version=metadata.version, since_utc=datetime.now(UTC)),
    )
    holder = ModelHolder(WorkerWatch(storage, "image_classifier"), worker_id="here", cache=tmp_path / "cache")
    client = Client(create_app(make_worker(models=holder)))
    data = png(np.random.default_rng(5).integers(0, 256, (50, 40, 3), dtype=np.uint8))
    body = client.predict(data, params={"explain": "cam"}).json()

    expected = load_folder(hand_made.folder, tiny_metadata()).predict(preprocess(data, (16, 16)))
    np.testing.assert_allclose(list(body["prediction"].values()), expected.probabilities, atol=1e-6)
    np.testing.assert_allclose(body["cam"], expected.cam, atol=1e-4)
    assert body["predicted_class"] == metadata.class_names[int(expected.probabilities.argmax())]

    passport = client.get(f"/predictions/{body['prediction_id']}/passport").json()
    assert passport["prediction"]["prediction_id"] == body["prediction_id"]
    assert passport["model"]["version"] == body["model_version"] == metadata.version
    assert passport["model"]["dvc_md5"] == metadata.dvc_md5
    assert passport["config"] == config
    assert passport["training_run"] == "http://mlflow:5050/#/runs/0a1b2c"  # Without the credentials of its address.

    current = client.get("/models/current").json()
    assert [(w["worker_id"], w["is_live"], w["is_current"]) for w in current["workers"]] == [
        (holder.public_id, True, True)
    ]
