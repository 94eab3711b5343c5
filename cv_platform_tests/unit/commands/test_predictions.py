"""`cv-platform passport` and `replay`, without a service: a real model, spool and PostgreSQL."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from sqlalchemy import Engine, update

from cv_platform.cli import main
from cv_platform.commands.predictions import CANNOT_TELL
from cv_platform.config import parse_experiment
from cv_platform.database.schema import predictions
from cv_platform.datasets.manifest import MANIFEST_SCHEMA, manifest_name
from cv_platform.deployment.bundle import TRAINED_ON
from cv_platform.serving.log.deletion import delete_from_database
from cv_platform.serving.log.entry import FeedbackEntry
from cv_platform.serving.log.request_log import RequestLog
from cv_platform.serving.model.runtime import load_bundle
from cv_platform.serving.routes.answer import log_entry, predict_upload
from cv_platform.serving.telemetry.observation import RequestFacts
from cv_platform.storage import BundleMetadata, CentralStorage
from cv_platform_tests.support.http_client import png
from cv_platform_tests.support.log_entries import append_to, wait_until_drained
from cv_platform_tests.support.tiny_models import CLASS_NAMES, MODEL_NAME, TinyExport, tiny_images, tiny_metadata

UPLOAD = png(tiny_images(1, seed=77)[0])
SHA256 = hashlib.sha256(UPLOAD).hexdigest()
CONFIG: dict[str, Any] = {
    "name": "pets",
    "model": {"model_name": MODEL_NAME, "classes": list(CLASS_NAMES), "input_size": {"h": 16, "w": 16}},
    "dataset": {"ds_name": "tiny", "dvc_tag": "v1.0.0"},
}
Run = Callable[..., tuple[int, str]]


@pytest.fixture
def home(tmp_path: Path, database_url: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CV_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.delenv("CV_STORAGE", raising=False)
    return tmp_path / "home"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*words: object) -> tuple[int, str]:
        capsys.readouterr()
        status = main([str(word) for word in words])
        said = capsys.readouterr()
        return status, said.out + said.err

    return run


def publish(home: Path, export: TinyExport, learned: bytes) -> BundleMetadata:
    """Publishes a model that has learned from one image, and the manifest of the version that it was trained on."""
    digests = np.frombuffer(hashlib.sha256(learned).digest(), np.uint8).reshape(1, 32)
    np.save(export.folder / TRAINED_ON, digests)
    metadata = tiny_metadata(runtime=export.runtime, effective_config=CONFIG)
    try:
        metadata = CentralStorage(home / "storage").publish_bundle(export.folder, metadata)
    finally:
        (export.folder / TRAINED_ON).unlink()  # The export is everybody's.
    config = parse_experiment(CONFIG, origin="test")
    checkout = home / "worktrees" / metadata.ds_name / metadata.dvc_md5
    checkout.mkdir(parents=True)
    row: dict[str, Any] = dict.fromkeys(MANIFEST_SCHEMA.names)
    row |= {"path": "a.png", "sha256": SHA256, "split": "test", "labels": ["cat"], "is_readable": True}
    pq.write_table(
        pa.Table.from_pylist([row], schema=MANIFEST_SCHEMA), checkout / manifest_name(config.model, config.dataset)
    )
    return metadata


def answer(home: Path, metadata: BundleMetadata, database_url: str, *, is_drained: bool = True) -> UUID:
    """Answers the upload as the service does, and lets the database have it."""
    model = load_bundle(
        CentralStorage(home / "storage"), metadata.model_name, metadata.version, cache=home / "cache", threads=1
    )
    predicted = predict_upload(model, UPLOAD, max_pixels=10_000)
    entry = log_entry(predicted, UPLOAD, RequestFacts("r"), url="http://s/predict", keep_images="all")
    with RequestLog(home / "spool", database_url if is_drained else None) as log:
        append_to(log, entry)
        if is_drained:
            append_to(log, FeedbackEntry(prediction_id=predicted.prediction_id, true_class="owl", source="ada"))
            wait_until_drained(log)
    return predicted.prediction_id


def test_a_passport_says_all_that_is_known_and_a_replay_comes_to_the_same(
    home: Path, database_url: str, engine: Engine, hand_made: TinyExport, run: Run
) -> None:
    metadata = publish(home, hand_made, UPLOAD)
    prediction_id = answer(home, metadata, database_url)
    status, text = run("passport", prediction_id, "--json")
    known = json.loads(text)
    assert status == 0
    assert yaml.safe_load(run("passport", prediction_id)[1]) == known
    assert known["prediction"]["image_sha256"] == SHA256
    assert sum(known["prediction"]["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert known["request"]["request_url"] == "http://s/predict"
    assert [(said["true_class"], said["source"]) for said in known["feedback"]] == [("owl", "ada")]
    assert known["model"]["dvc_md5"] == metadata.dvc_md5
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(metadata.checksums.items()))
    assert known["model"]["bundle_sha256"] == hashlib.sha256(lines.encode()).hexdigest()
    assert known["training_data"] == {"has_learned": True, "splits": ["test"], "reason": None}
    status, text = run("replay", prediction_id)
    assert (status, "alike" in text) == (0, True), text
    with engine.begin() as connection:  # As if another model had said it.
        connection.execute(update(predictions).values(bbsd_feats=[1.0, 0.0, 0.0]))
    status, text = run("replay", prediction_id)
    assert (status, "not alike" in text) == (1, True), text


def test_an_answer_is_found_in_a_spool_that_no_database_has_drained(
    home: Path, database_url: str, hand_made: TinyExport, run: Run
) -> None:
    prediction_id = answer(home, publish(home, hand_made, b"another"), database_url, is_drained=False)
    status, text = run("passport", prediction_id)
    assert (status, "has_learned: false" in text) == (0, True), text
    assert run("replay", prediction_id)[0] == 0


def test_what_is_gone_is_named_and_is_no_verdict(
    home: Path, database_url: str, engine: Engine, hand_made: TinyExport, run: Run
) -> None:
    metadata = publish(home, hand_made, UPLOAD)
    prediction_id = answer(home, metadata, database_url)
    CentralStorage(home / "storage").delete_bundle(metadata.model_name, metadata.version)
    status, text = run("replay", prediction_id)
    assert (status, "Expected a published version" in text) == (CANNOT_TELL, True), text
    known = json.loads(run("passport", prediction_id, "--json")[1])
    assert (known["model"], known["training_data"]["has_learned"]) == (None, None)
    with engine.begin() as connection:
        connection.execute(update(predictions).values(image_sha256=None))
    status, text = run("replay", prediction_id)
    assert (status, "did not keep it" in text) == (CANNOT_TELL, True), text
    assert delete_from_database(engine, prediction_id)
    status, text = run("replay", prediction_id)
    assert (status, "it was deleted on" in text) == (CANNOT_TELL, True), text
    status, text = run("passport", uuid4())
    assert (status, "there is none in the request log" in text) == (1, True), text
