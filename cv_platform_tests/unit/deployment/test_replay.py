"""A challenger on the uploads that production was asked about last: published bundles, a log in a real PostgreSQL."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import cv2
import numpy as np
import pytest
from sqlalchemy import Engine, insert

from benchmarks.ray_nodes import ray_nodes
from cv_platform.compute.engine import Engine as ComputeEngine
from cv_platform.compute.local import LocalEngine
from cv_platform.compute.ray_engine import RayEngine
from cv_platform.config import ExperimentConfig, ReplayConfig
from cv_platform.database.schema import feedback, images, predictions
from cv_platform.deployment import replay as replays
from cv_platform.deployment.bundle import TRAINED_ON
from cv_platform.deployment.export import export_bundle
from cv_platform.deployment.replay import replay_challenger
from cv_platform.images import preprocessing_hash
from cv_platform.records import Replay
from cv_platform.storage import CentralStorage
from cv_platform_tests.support import poison
from cv_platform_tests.support.channel_models import MODEL, save_encoder, save_model
from cv_platform_tests.support.record_samples import identity
from cv_platform_tests.support.tiny_models import tiny_metadata
from cv_platform_tests.support.tiny_training import CLASSES, experiment

pytestmark = pytest.mark.xdist_group("tensorflow")

OLD, EQUAL, BLIND = (f"2026010{day}T000000Z-0000000{day}" for day in (1, 2, 3))
NOW = datetime(2026, 3, 1, tzinfo=UTC)


def upload(channel: int, seed: int) -> bytes:
    """Returns a PNG whose brightest channel is `channel` of blue, green, red."""
    pixels = np.random.default_rng(seed).integers(0, 60, (12, 12, 3), np.uint8)
    pixels[..., channel] += 120
    return cv2.imencode(".png", pixels)[1].tobytes()


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with the champion (8×8 pixels), its equal and one that is blind to blue (16×16); tests copy it."""
    root = tmp_path_factory.mktemp("published")
    storage = CentralStorage(root / "storage")
    for version, side, blind_to in ((OLD, 8, None), (EQUAL, 16, None), (BLIND, 16, "blue")):
        folder = save_model(root / version, side, blind_to)
        golden = np.random.default_rng(0).integers(0, 255, (2, side, side, 3), dtype=np.uint8)
        uae = save_encoder(folder / "uae.keras", side)
        facts = export_bundle(folder / f"{MODEL}.keras", uae, folder, golden_images=golden, runtime="onnx")
        learned = bytes.fromhex(hashlib.sha256(upload(0, 1000)).hexdigest())
        np.save(folder / TRAINED_ON, np.frombuffer(learned, np.uint8).reshape(1, 32))
        metadata = tiny_metadata(
            version,
            model_name=MODEL,
            class_names=CLASSES,
            preprocessing_hash=preprocessing_hash((side, side)),
            **facts.model_dump(include={"image_size", "feature_dims", "uae_dims", "runtime"}),
        )
        storage.publish_bundle(folder, metadata)
    return root / "storage"


@pytest.fixture
def storage(tmp_path: Path, published: Path) -> CentralStorage:
    shutil.copytree(published, tmp_path / "storage")
    return CentralStorage(tmp_path / "storage")


@pytest.fixture
def replay(engine: Engine, storage: CentralStorage, tmp_path: Path) -> Callable[..., Replay]:
    def replayed(version: str, compute: ComputeEngine | None = None, **limits: Any) -> Replay:
        config: ExperimentConfig = experiment()
        deploy = config.deploy.model_copy(update={"replay": ReplayConfig(**limits)})
        return replay_challenger(
            identity(MODEL, version),
            identity(MODEL, OLD),
            config.model_copy(update={"deploy": deploy}),
            engine=engine,
            storage=storage,
            home=tmp_path,
            directory=tmp_path / "replay",
            compute=compute,
        )

    return replayed


def log(engine: Engine, content: bytes | None, minute: int = 0, true_class: str | None = None) -> UUID:
    """Logs an answer of the champion on an upload, and what somebody has said of it."""
    prediction_id, sha256 = uuid4(), hashlib.sha256(content).hexdigest() if content else None
    row = {
        "prediction_id": prediction_id,
        "model_name": MODEL,
        "model_version": OLD,
        "predicted_class": "blue",
        "prediction_json": {},
        "uae_feats": [],
        "bbsd_feats": [],
        "features": [],
        "properties": [],
        "image_sha256": sha256,
        "created_on": NOW + timedelta(minutes=minute),
    }
    with engine.begin() as connection:
        if content and not connection.execute(images.select().where(images.c.sha256 == sha256)).first():
            file = {"sha256": sha256, "content": content, "bytes": len(content), "media_type": "image/png"}
            connection.execute(insert(images).values(file))
        connection.execute(insert(predictions).values(row))
        if true_class:
            said = {"entry_id": uuid4(), "prediction_id": prediction_id, "true_class": true_class, "source": "client"}
            connection.execute(insert(feedback).values(said))
    return prediction_id


def test_an_equal_challenger_passes_and_what_cannot_be_replayed_is_counted_and_named(
    engine: Engine, replay: Callable[..., Replay]
) -> None:
    for number in range(45):
        log(engine, upload(number % 3, number), number)
    log(engine, upload(0, 0), 50)  # The same upload again counts once.
    log(engine, None, 51)
    damaged = log(engine, b"no image", 52)
    done = replay(EQUAL, min_agreement=0.9, max_cost_ratio=1000.0)
    assert done.passed
    assert (done.replayed, done.agreed, done.not_kept, done.unreadable) == (45, 45, 1, (str(damaged),))
    assert (done.changed, done.labelled, done.comparison, done.unknown_rate) == ((), 0, None, None)
    assert done.confidence == pytest.approx(done.champion_confidence, abs=0.05)
    assert done.cost_ratio
    assert done.cost_ratio > 0
    assert "45 of 45 answers stay as they are; min_agreement is 0.9" in done.reasons
    assert f"1 uploads are gone or do not decode, such as of {damaged}" in done.reasons
    few = replay(EQUAL, max_requests=7)
    assert few.replayed == 6, "the seven latest uploads, of which one is damaged"


def test_a_shard_has_few_megabytes_of_uploads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replays, "_BATCH_BYTES", 16)
    monkeypatch.setattr(replays, "_BATCH", 3)
    uploads = [replays._Upload(str(at), size, []) for at, size in enumerate((10, 7, 9, 40, 1, 1, 1, 1))]
    batches = [[upload.bytes for upload in batch] for batch in replays._batches(uploads)]
    assert batches == [[10], [7, 9], [40], [1, 1, 1], [1]]


def require_same_replay(
    compute: ComputeEngine, engine: Engine, replay: Callable[..., Replay], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replays 41 uploads, of which one is damaged, in six parts, by this process and by an engine."""
    monkeypatch.setattr(replays, "_BATCH", 7)
    for number in range(40):
        log(engine, b"no image" if number == 30 else upload(number % 3, number), number, CLASSES[number % 3])
    costs = {"cpu_ms": 0.0, "champion_cpu_ms": 0.0}
    alone = replay(BLIND)
    assert (alone.replayed, len(alone.changed), len(alone.unreadable)) == (39, 13, 1)
    monkeypatch.setattr(replays, "WORTH_SECONDS", 0.0)
    together = replay(BLIND, compute)
    assert together.model_copy(update=costs).local_json() == alone.model_copy(update=costs).local_json()
    assert together.cost_ratio


def test_processes_replay_to_the_same_bit(
    engine: Engine, replay: Callable[..., Replay], monkeypatch: pytest.MonkeyPatch
) -> None:
    require_same_replay(LocalEngine(2, worth_seconds=0), engine, replay, monkeypatch)


def test_an_upload_that_ends_its_process_counts_as_unreadable(
    engine: Engine, replay: Callable[..., Replay], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(7):
        log(engine, upload(number % 3, number), number)
    deadly = log(engine, upload(0, 7) + poison.MARK, 8)
    log(engine, b"no image", 9)
    monkeypatch.setattr(replays, "answer_uploads", poison.answers)
    monkeypatch.setattr(replays, "WORTH_SECONDS", 0.0)
    done = replay(EQUAL, LocalEngine(2, worth_seconds=0))
    assert (done.replayed, done.agreed, len(done.unreadable)) == (7, 7, 2)
    assert str(deadly) in done.unreadable


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_ray_replays_to_the_same_bit(
    engine: Engine, replay: Callable[..., Replay], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="Ray, of the extra ray")
    with ray_nodes(2) as nodes:
        require_same_replay(RayEngine(str(nodes.address)), engine, replay, monkeypatch)


def test_a_challenger_that_changes_too_many_answers_is_refused_and_the_page_shows_them(
    engine: Engine, replay: Callable[..., Replay]
) -> None:
    for number in range(60):
        log(engine, upload(number % 3, number), number)
    assert replay(BLIND).passed, "two answers of three stay"
    done = replay(BLIND, min_agreement=0.9)
    assert not done.passed
    assert done.reasons[0].startswith("40 of 60 answers stay as they are, fewer than min_agreement 0.9")
    assert len(done.changed) == 20
    assert {one.old for one in done.changed} == {"blue"}
    assert all(one.new in {"green", "red"} and 0 < one.new_confidence <= 1 for one in done.changed)
    assert done.page_path.read_text().count("data:image/jpeg") == 20


def test_labels_that_neither_has_learned_refuse_a_challenger_that_is_less_often_right(
    engine: Engine, replay: Callable[..., Replay]
) -> None:
    for number in range(30):
        log(engine, upload(number % 3, number), number, CLASSES[number % 3])
    log(engine, upload(0, 1000), 40, "green")  # In both bundles' training images.
    done = replay(BLIND)
    assert not done.passed
    assert (done.replayed, done.labelled) == (31, 31)
    assert done.comparison
    assert (done.comparison.images, done.comparison.only_champion_right) == (30, 10)
    assert "exact McNemar p 0.00098" in done.reasons[0]


def test_labels_that_show_that_it_is_better_let_a_challenger_change_most_answers(
    engine: Engine, replay: Callable[..., Replay]
) -> None:
    for number in range(30):  # Blue ones that people call something else: the blind one names the next brightest.
        pixels = np.full((12, 12, 3), (200, 150, 0), np.uint8)
        pixels[0, 0] = number
        log(engine, cv2.imencode(".png", pixels)[1].tobytes(), number)
    assert not replay(BLIND).passed
    with engine.begin() as connection:
        for prediction_id in connection.execute(predictions.select()).scalars().all():
            said = {"entry_id": uuid4(), "prediction_id": prediction_id, "true_class": "green", "source": "client"}
            connection.execute(insert(feedback).values(said))
    done = replay(BLIND)
    assert done.passed
    assert "labels show that it is better" in done.reasons[1]


def test_without_readable_requests_a_challenger_passes_in_words_and_with_a_lost_champion_it_does_not(
    engine: Engine, replay: Callable[..., Replay], storage: CentralStorage
) -> None:
    done = replay(BLIND)
    assert done.passed
    assert done.reasons == (f"{OLD} has answered no request that can be read",)
    log(engine, b"no image")
    assert replay(BLIND).reasons == ("no logged upload can be read (any more)",)
    storage.delete_bundle(MODEL, OLD)
    lost = replay(EQUAL)
    assert not lost.passed
    assert lost.reasons[0].startswith(f"{OLD} in production cannot be compared with: its bundle does not answer.")
