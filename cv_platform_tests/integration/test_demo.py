"""The whole system once, as `make demo` runs it: every promise is then read from what it left."""

from __future__ import annotations

import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import cv2
import httpx
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from sqlalchemy import Engine, text

from cv_platform.config import load_experiment
from cv_platform.database.connection import make_engine
from cv_platform.database.embedded import embedded_database
from cv_platform.images import preprocess
from cv_platform.local.environment import platform_environment
from cv_platform.local.http import free_port, wait_for_http
from cv_platform.local.programs import service_command
from cv_platform.predictions import BBSD_FEATS, FEATURES, PROPERTIES, UAE_FEATS
from cv_platform.properties import image_properties
from cv_platform.record_store import RecordStore
from cv_platform.records import RECORDS, DatasetVersion, Deployment, Evaluation, ReferenceData, TrainedModel
from cv_platform.storage import CentralStorage, new_version
from cv_platform_tests.support.demo_run import REPOSITORY, Demo
from cv_platform_tests.support.waiting import wait_until

ADMIN_TOKEN = "a-token-of-this-test-only"
pytestmark = [pytest.mark.whole, pytest.mark.xdist_group("demo"), pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def engine(demo: Demo) -> Iterator[Engine]:
    with embedded_database(demo.home) as url:
        engine = make_engine(url)
        yield engine
        engine.dispose()


def test_the_demo_ends_with_zero_and_says_why(demo: Demo) -> None:
    assert demo.status == 0, demo.output
    assert "demo: everything held." in demo.output
    finished = re.findall(r"^    digits/(\w+): [0-9]", demo.output, re.MULTILINE)
    assert finished[:3] == ["dataset", "embeddings", "validation_report"]
    assert len(finished) == 15 + 2, "fifteen assets, and a drift report for each window"
    assert "unshifted window (359 requests): no drift" in demo.output
    assert demo.record(Evaluation).metrics["accuracy"] >= 0.985
    assert re.search(r"shifted window \(359 requests\): drift, .*classes that moved: ", demo.output)


def test_the_demo_asks_nobody_elsewhere(demo: Demo) -> None:
    assert demo.proxied == []


def test_the_runs_log_has_a_progress_line_per_epoch(demo: Demo) -> None:
    log = (demo.home / "logs" / "demo-graph.log").read_text()
    epochs = load_experiment(demo.config).train.epochs
    assert len(re.findall(rf"epoch \d+/{epochs}\b", log)) == epochs


def test_every_200_has_a_prediction_joined_to_its_log_entry(engine: Engine) -> None:
    with engine.connect() as connection:
        answered = connection.execute(
            text("SELECT count(*) FROM api_log WHERE response_status_code = 200 AND request_method = 'POST'")
        ).scalar_one()
        joined = connection.execute(
            text("SELECT count(*) FROM api_log JOIN predictions USING (prediction_id) WHERE response_status_code = 200")
        ).scalar_one()
        images = connection.execute(
            text("SELECT count(*) FROM predictions JOIN images ON sha256 = image_sha256")
        ).scalar_one()
    assert answered == joined == images == 2 * 359


def test_served_probabilities_equal_the_offline_evaluation(demo: Demo, engine: Engine) -> None:
    offline = pd.read_parquet(demo.record(Evaluation).predictions_path).set_index("sha256")
    class_names = load_experiment(demo.config).model.classes
    with engine.connect() as connection:
        logged = connection.execute(
            text("SELECT image_sha256, prediction_json, predicted_class FROM predictions")
        ).all()
    served = {row.image_sha256: row for row in logged if row.image_sha256 in offline.index}
    assert set(served) == set(offline.index)
    for sha256, row in served.items():
        probabilities = [row.prediction_json[name] for name in class_names]
        assert np.abs(np.asarray(probabilities) - offline.loc[sha256, "probabilities"]).max() <= 1e-5
        assert row.predicted_class == offline.loc[sha256, "predicted_class"]


def test_the_reference_has_exactly_the_readable_rows_of_its_split(demo: Demo) -> None:
    manifest = pd.read_parquet(demo.record(DatasetVersion).manifest_path)
    split = manifest[(manifest["split"] == "reference") & manifest["is_readable"]]
    reference = pq.read_table(demo.record(ReferenceData).path).to_pandas()
    assert list(reference["path"]) == sorted(split["path"])
    labels = {path: "|".join(names) for path, names in zip(split["path"], split["labels"], strict=True)}
    assert list(reference["label"]) == [labels[path] for path in reference["path"]]


def test_each_reference_row_is_recomputed_from_its_own_image(demo: Demo, tmp_path: Path) -> None:
    dataset, reference = demo.record(DatasetVersion), pq.read_table(demo.record(ReferenceData).path).to_pandas()
    version = demo.record(TrainedModel).model.version
    config = load_experiment(demo.config)
    images = np.stack(
        [preprocess((dataset.directory / path).read_bytes(), config.model.image_size) for path in reference["path"]]
    )
    np.save(tmp_path / "images.npy", images)
    # A process of its own: TensorFlow stays out of the test runner, and one image at a time leaves no room for a shift.
    program = (
        "import sys, numpy as np\n"
        "from pathlib import Path\n"
        "from cv_platform.serving.model.runtime import load_bundle\n"
        "from cv_platform.storage import CentralStorage\n"
        "storage, version, folder = CentralStorage(sys.argv[1]), sys.argv[2], Path(sys.argv[3])\n"
        "model = load_bundle(storage, 'digits_classifier', version, cache=folder / 'cache')\n"
        "rows = [model.predict(image) for image in np.load(folder / 'images.npy')]\n"
        "np.savez(folder / 'rows.npz', **{n: np.stack([getattr(r, n) for r in rows])\n"
        "                                for n in ('probabilities', 'features', 'uae')})\n"
    )
    subprocess.run(
        [sys.executable, "-c", program, demo.settings.storage_url, version, str(tmp_path)],
        cwd=REPOSITORY,
        check=True,
        timeout=300,
    )
    rows = np.load(tmp_path / "rows.npz")
    for column, name in ((BBSD_FEATS, "probabilities"), (FEATURES, "features"), (UAE_FEATS, "uae")):
        np.testing.assert_allclose(np.stack(list(reference[column])), rows[name], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        np.stack(list(reference[PROPERTIES])), np.stack([image_properties(image) for image in images]), rtol=1e-6
    )


def test_both_windows_are_in_the_database_with_their_verdicts(engine: Engine) -> None:
    with engine.connect() as connection:
        rows = connection.execute(
            text("SELECT verdict, rows, window_start_utc, window_end_utc FROM drift_reports ORDER BY created_on")
        ).all()
    assert [(row.verdict, row.rows) for row in rows] == [("insufficient data", 0), ("no drift", 359), ("drift", 359)]
    assert rows[1].window_end_utc <= rows[2].window_start_utc


def test_the_production_pointer_names_the_model_of_the_graph(demo: Demo) -> None:
    storage = CentralStorage(demo.settings.storage_url)
    production = storage.production("image_classifier", "digits_classifier")
    assert production is not None
    assert production.version == demo.record(TrainedModel).model.version
    assert production.dvc_md5 == demo.record(DatasetVersion).provenance.dvc_md5
    assert production.effective_config["train"] == load_experiment(demo.config).train.model_dump(mode="json")


def test_mlflow_has_a_run_per_stage_with_the_config_and_the_report(demo: Demo) -> None:
    with sqlite3.connect(demo.home / "mlflow" / "mlflow.db") as connection:
        stages = dict(connection.execute("SELECT value, run_uuid FROM tags WHERE key = 'stage'").fetchall())
        epochs = connection.execute("SELECT value FROM params WHERE key = 'train.epochs'").fetchall()
        tagged = connection.execute("SELECT count(*) FROM tags WHERE key = 'dagster_run_id'").fetchone()
        open_runs = connection.execute("SELECT count(*) FROM runs WHERE status = 'RUNNING'").fetchone()
    assert set(stages) == {"model", "evaluation"}
    assert epochs[0] == (str(load_experiment(demo.config).train.epochs),)
    assert tagged == (2,)
    assert open_runs == (0,)
    names = {path.name for path in (demo.home / "mlflow" / "artifacts").rglob("*")}
    assert {"report.html", "digits_classifier.keras"} <= names


def materialize(demo: Demo, selection: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "dagster",
            *shlex.split(f"asset materialize -m cv_platform.definitions --select {selection}"),
        ],
        cwd=REPOSITORY,
        env=platform_environment(demo.settings),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@contextmanager
def changed_record(demo: Demo, asset: str, **changes: object) -> Iterator[None]:
    """Makes a changed record the latest of its asset."""
    store, before = RecordStore(demo.home, "digits"), demo.record(RECORDS[asset])
    store.write(asset, before.model_copy(update=changes), run_id="changed")
    try:
        yield
    finally:
        store.write(asset, before, run_id="as-before")


def test_training_refuses_a_dataset_version_whose_latest_verdict_failed(demo: Demo) -> None:
    with changed_record(demo, "validation_report", passed=False):
        result = materialize(demo, "key:digits/model")
    assert result.returncode != 0
    assert "Expected a dataset version that passes its blocking checks" in result.stdout + result.stderr


def test_deployment_refuses_a_model_whose_latest_evaluation_failed(demo: Demo) -> None:
    pointer = CentralStorage(demo.settings.storage_url).read_pointer("image_classifier")
    with changed_record(demo, "evaluation", passed=False, reasons=("accuracy 0.5 is below min_accuracy 0.9",)):
        result = materialize(demo, "key:digits/deployment")
    assert result.returncode != 0
    assert "accuracy 0.5 is below min_accuracy 0.9" in result.stdout + result.stderr
    assert CentralStorage(demo.settings.storage_url).read_pointer("image_classifier") == pointer


def test_the_deployment_names_the_records_that_it_was_made_from(demo: Demo) -> None:
    made_from = demo.record(Deployment).made_from
    assert set(made_from) == RECORDS.keys() - {
        *("deployment", "drift_report", "production_metrics", "labeling_queue", "labelled_version"),
        *("batch_scores", "batch_drift_report"),
    }
    used = RecordStore(demo.home, "digits").read("model", TrainedModel, made_from["model"])
    assert used.model == demo.record(Deployment).model
    kept = [path for path in (demo.home / "records").rglob("*.json") if str(demo.home) in path.read_text()]
    assert kept == [], "no record names the folder that it lies in"


def test_the_shift_of_the_demo_is_seeded() -> None:
    from cv_platform.demo import shifted

    image = cv2.imencode(".png", np.full((8, 8, 3), 128, np.uint8))[1].tobytes()
    assert shifted(image, 1) == shifted(image, 1)
    assert shifted(image, 1) != shifted(image, 2)


@pytest.fixture(scope="module")
def service(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """The demo's model served by two workers, with an open admin door, after the demo itself has ended."""
    port = free_port()
    bento_home = tmp_path_factory.mktemp("bentoml")
    log = (bento_home / "service.log").open("w")
    process = subprocess.Popen(
        service_command(port),
        env={
            **platform_environment(demo.settings),
            "BENTOML_HOME": str(bento_home),
            "CV_ADMIN_TOKEN": ADMIN_TOKEN,
            "CV_SERVICE_WORKERS": "2",
        },
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        base_url = f"http://127.0.0.1:{port}"
        wait_for_http(f"{base_url}/health_check", seconds=180, alive=lambda: process.poll() is None)
        with httpx.Client(base_url=base_url, timeout=60) as client:
            yield client
    finally:
        process.terminate()
        process.wait(timeout=60)
        log.close()


def admin() -> dict[str, str]:
    return {"Authorization": f"Bearer {ADMIN_TOKEN}"}


def publish_copy(demo: Demo, tmp_path: Path) -> str:
    """Publishes the production bundle again under a version of its own."""
    storage = CentralStorage(demo.settings.storage_url)
    folder, metadata = storage.fetch_bundle("digits_classifier", demo.record(TrainedModel).model.version, tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    version = new_version()
    storage.publish_bundle(copy, metadata.model_copy(update={"version": version}))
    return version


def test_a_swap_under_load_fails_no_request_and_a_rollback_returns(
    demo: Demo, service: httpx.Client, tmp_path: Path
) -> None:
    first, second = demo.record(TrainedModel).model.version, publish_copy(demo, tmp_path)
    image = cv2.imencode(".png", np.full((16, 16, 3), 90, np.uint8))[1].tobytes()
    seen: list[tuple[int, str]] = []
    stop = threading.Event()

    def send() -> None:
        while not stop.is_set():
            answer = service.post("/predict", params={"explain": "none"}, files={"file": ("x.png", image)})
            seen.append((answer.status_code, answer.json().get("model_version", "")))

    def served_by_both_workers(version: str) -> bool:
        workers = service.get("/models/current").json()["workers"]
        return [w["version"] for w in workers if w["is_live"]] == [version, version]

    with ThreadPoolExecutor(2) as pool:
        senders = [pool.submit(send) for _ in range(2)]
        try:
            moved = service.put("/update_model/digits_classifier.yaml", headers=admin())
            assert moved.status_code == 200, moved.text
            wait_until(lambda: served_by_both_workers(second))
            returned = service.post("/rollback", headers=admin())
            assert returned.status_code == 200, returned.text
            wait_until(lambda: served_by_both_workers(first))
        finally:
            stop.set()
        for sender in senders:
            sender.result()
    assert {status for status, _ in seen} == {200}
    assert {version for _, version in seen} == {first, second}


def test_a_corrupt_bundle_is_refused_and_the_service_goes_on(demo: Demo, service: httpx.Client, tmp_path: Path) -> None:
    version = publish_copy(demo, tmp_path)
    victim = Path(demo.settings.storage_url) / "models" / "digits_classifier" / version / "digits_classifier.keras"
    victim.write_bytes(b"not this")
    answer = service.put(f"/update_model/digits_classifier.yaml?version={version}", headers=admin())
    assert answer.status_code == 409, answer.text
    assert "digits_classifier.keras" in answer.text
    assert service.get("/health_check").json()["model_version"] == demo.record(TrainedModel).model.version


def test_with_the_database_away_answers_wait_in_the_spool_and_arrive_later(demo: Demo, service: httpx.Client) -> None:
    image = cv2.imencode(".png", np.full((16, 16, 3), 120, np.uint8))[1].tobytes()
    answer = service.post("/predict", files={"file": ("x.png", image)})
    assert answer.status_code == 200
    identifier = answer.json()["prediction_id"]
    with embedded_database(demo.home) as url:
        engine = make_engine(url)

        def arrived() -> bool:
            with engine.connect() as connection:
                query = text("SELECT count(*) FROM predictions WHERE prediction_id = CAST(:id AS uuid)")
                return connection.execute(query, {"id": identifier}).scalar_one() == 1

        wait_until(arrived)
        with engine.connect() as connection:
            query = text("SELECT response_status_code FROM api_log WHERE prediction_id = CAST(:id AS uuid)")
            assert connection.execute(query, {"id": identifier}).scalars().all() == [200]
        engine.dispose()
