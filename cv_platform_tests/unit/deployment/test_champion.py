"""A challenger on a new data version against the published bundle of the model in production, as it would answer."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from cv_platform.compute import rows
from cv_platform.compute.engine import Engine as ComputeEngine
from cv_platform.datasets.packing import open_split, pack_images
from cv_platform.deployment.bundle import TRAINED_ON
from cv_platform.deployment.champion import ask_champion
from cv_platform.deployment.export import ExportedModel, export_bundle
from cv_platform.evaluation.evaluate import evaluate_model
from cv_platform.evaluation.gate import Champion
from cv_platform.images import preprocessing_hash
from cv_platform.records import DatasetVersion, Evaluation, PackedImages
from cv_platform.storage import CentralStorage, ProductionPointer
from cv_platform_tests.support.away import away_for_a_moment
from cv_platform_tests.support.channel_models import MODEL, save_encoder, save_model
from cv_platform_tests.support.elsewhere import Elsewhere
from cv_platform_tests.support.record_samples import identity, trained_model
from cv_platform_tests.support.tiny_models import tiny_metadata
from cv_platform_tests.support.tiny_training import CLASSES, experiment, tiny_version

pytestmark = pytest.mark.xdist_group("tensorflow")

OLD, NEW = "20260101T000000Z-00000001", "20260201T000000Z-00000002"
SERVICE = "image_classifier"


@pytest.fixture(scope="module")
def challenge(tmp_path_factory) -> tuple[DatasetVersion, PackedImages]:
    """A new data version: 90 test images that no earlier model was measured on."""
    root = tmp_path_factory.mktemp("data")
    version = tiny_version(root, {"train": 2, "valid": 2, "test": 30, "reference": 2}, seed=7)
    return version, pack_images(version, experiment().model, quarantined=(), home=root / "home")


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Callable[[str | None, Sequence[str]], tuple[Path, ExportedModel]]:
    """Exports models of 8×8 pixels, each once."""

    @functools.cache
    def make(blind_to: str | None, class_names: Sequence[str]) -> tuple[Path, ExportedModel]:
        folder = save_model(tmp_path_factory.mktemp("champion") / "files", 8, blind_to, class_names)
        golden = np.random.default_rng(0).integers(0, 255, (2, 8, 8, 3), dtype=np.uint8)
        uae = save_encoder(folder / "uae.keras")
        return folder, export_bundle(folder / f"{MODEL}.keras", uae, folder, golden_images=golden, runtime="onnx")

    return make


@pytest.fixture
def deploy(tmp_path: Path, exported) -> Callable[..., CentralStorage]:
    """Publishes the model that production serves, which was trained on another data version and other pixels."""

    def make(
        blind_to: str | None = None,
        trained_on: Sequence[str] | None = (),
        class_names: Sequence[str] = ("red", "green", "blue"),
    ) -> CentralStorage:
        files, facts = exported(blind_to, class_names)
        folder = Path(shutil.copytree(files, tmp_path / "champion"))
        if trained_on is not None:
            digests = np.array([list(bytes.fromhex(digest)) for digest in trained_on], np.uint8)
            np.save(folder / TRAINED_ON, digests.reshape(-1, 32))
        storage = CentralStorage(tmp_path / "storage")
        metadata = tiny_metadata(
            OLD,
            model_name=MODEL,
            class_names=class_names,
            preprocessing_hash=preprocessing_hash((8, 8)),
            **facts.model_dump(include={"image_size", "feature_dims", "uae_dims", "runtime"}),
        )
        storage.publish_bundle(folder, metadata)
        _serve(storage)
        return storage

    return make


def _serve(storage: CentralStorage, version: str = OLD, model_name: str = MODEL) -> None:
    storage.write_pointer(
        SERVICE, ProductionPointer(model_name=model_name, version=version, since_utc=datetime.now(UTC))
    )


def _ask(
    storage: CentralStorage,
    challenge: tuple[DatasetVersion, PackedImages],
    home: Path,
    engine: ComputeEngine | None = None,
) -> Champion | None:
    version, packed = challenge
    return ask_champion(
        identity(MODEL, NEW),
        packed.task,
        open_split(packed, "test"),
        version,
        service=SERVICE,
        storage=storage,
        home=home,
        engine=engine,
    )


def _judge(champion: Champion | None, challenge: tuple[DatasetVersion, PackedImages], model: Path) -> Evaluation:
    version, packed = challenge
    trained = trained_model(
        model, model=identity(MODEL, NEW), provenance=packed.provenance, task=packed.task, pack=packed.directory.name
    )
    return evaluate_model(
        trained,
        packed,
        experiment(),
        champion=champion,
        directory=model / "evaluation",
        run=None,
        manifest=version.manifest_path,
    )


def test_a_worse_challenger_on_a_new_data_version_is_refused_and_an_equal_one_passes(deploy, challenge, tmp_path):
    champion = _ask(deploy(), challenge, tmp_path)
    assert champion is not None
    refused = _judge(champion, challenge, save_model(tmp_path / "worse", 16, blind_to="blue"))
    assert not refused.passed
    assert f"accuracy 0.6667 against 1.0000 of {OLD} in production on the same 90 test images" in refused.reasons[0]
    assert "loses 0.3333" in refused.reasons[0]
    assert "more than max_regression 0.0100" in refused.reasons[0]
    assert any(reason.startswith("recall of blue falls from 1.0000 to 0.0000") for reason in refused.reasons)
    worst = refused.slices[0]
    assert (worst.column, worst.is_worse) == ("blue_yellow", True)
    assert "luma_mean" in {part.column for part in refused.slices}
    equal = _judge(champion, challenge, save_model(tmp_path / "equal", 16))
    assert equal.passed
    assert equal.comparison is not None
    assert (equal.comparison.only_champion_right, equal.comparison.only_challenger_right) == (0, 0)


def test_central_storage_that_is_away_for_a_moment_is_not_taken_for_no_champion(
    deploy, challenge, tmp_path, monkeypatch, caplog
):
    storage = deploy()
    with away_for_a_moment(tmp_path / "storage", monkeypatch, caplog):
        champion = _ask(storage, challenge, tmp_path)
    assert champion is not None
    assert champion.version == OLD


def test_the_bundle_decides_by_its_own_pixels_and_order_of_classes(deploy, challenge, tmp_path):
    champion = _ask(deploy(blind_to="green"), challenge, tmp_path)
    assert champion is not None
    assert champion.decisions is not None
    truth = np.asarray(open_split(challenge[1], "test").targets)
    right = champion.decisions[np.arange(len(truth)), truth]
    assert not right[truth == CLASSES.index("green")].any()
    assert right[truth != CLASSES.index("green")].all()


def test_other_machines_answer_for_the_same_pixels_as_this_process_does(deploy, challenge, tmp_path, monkeypatch):
    version, _ = challenge
    model = experiment(model__input_size={"h": 8, "w": 8}).model
    packed = pack_images(version, model, quarantined=(), home=tmp_path)
    monkeypatch.setattr(rows, "_SHARD_ROWS", 20)
    storage = deploy(blind_to="green")
    alone = _ask(storage, (version, packed), tmp_path)
    monkeypatch.setattr(rows, "WORTH_SECONDS", 0.0)
    asked = Elsewhere()
    together = _ask(storage, (version, packed), tmp_path, asked)
    assert asked.shards == 5
    assert alone is not None
    assert together is not None
    assert alone.decisions is not None
    assert together.decisions is not None
    np.testing.assert_array_equal(together.decisions, alone.decisions)
    assert alone.decisions.shape == (90, 3)


def test_test_images_that_the_champion_was_trained_on_are_recognised(deploy, challenge, tmp_path):
    sha256 = open_split(challenge[1], "test").sha256
    champion = _ask(deploy(trained_on=[*sha256[:12], "f" * 64]), challenge, tmp_path)
    assert champion is not None
    assert champion.seen is not None
    assert np.flatnonzero(champion.seen).tolist() == list(range(12))
    evaluation = _judge(champion, challenge, save_model(tmp_path / "equal", 16))
    assert evaluation.comparison is not None
    assert evaluation.comparison.images == 78
    assert "12 test images that it was trained on are left out" in evaluation.reasons[-1]


def test_a_bundle_of_an_earlier_release_says_that_its_training_images_are_not_known(deploy, challenge, tmp_path):
    champion = _ask(deploy(trained_on=None), challenge, tmp_path)
    assert champion is not None
    assert champion.seen is None
    assert "is not known" in _judge(champion, challenge, save_model(tmp_path / "equal", 16)).reasons[-1]


def test_a_champion_with_other_classes_stops_the_challenger(deploy, challenge, tmp_path):
    champion = _ask(deploy(class_names=("red", "green", "black")), challenge, tmp_path)
    assert champion is not None
    assert champion.problem == "it has other classes; the new model has no black and also blue"
    evaluation = _judge(champion, challenge, save_model(tmp_path / "equal", 16))
    assert not evaluation.passed
    assert evaluation.reasons == (f"{OLD} in production cannot be compared with: {champion.problem}",)


def test_a_champion_whose_bundle_is_gone_or_damaged_stops_the_challenger(deploy, challenge, tmp_path):
    storage = deploy()
    (tmp_path / "storage" / "models" / MODEL / OLD / "golden.npz").write_bytes(b"broken")
    damaged = _ask(storage, challenge, tmp_path)
    assert damaged is not None
    assert damaged.decisions is None
    assert "Missing or changed: golden.npz" in damaged.problem
    storage.delete_bundle(MODEL, OLD)
    gone = _ask(storage, challenge, tmp_path)
    assert gone is not None
    assert "Expected a published version of tiny_model" in gone.problem
    assert not _judge(gone, challenge, save_model(tmp_path / "equal", 16)).passed


def test_the_first_model_and_another_models_service_have_no_champion(challenge, tmp_path):
    storage = CentralStorage(tmp_path / "storage")
    assert _ask(storage, challenge, tmp_path) is None
    _serve(storage, model_name="another")
    assert _ask(storage, challenge, tmp_path) is None
    _serve(storage, version=NEW)  # Itself, evaluated again.
    assert _ask(storage, challenge, tmp_path) is None
    assert _judge(None, challenge, save_model(tmp_path / "first", 16)).passed
