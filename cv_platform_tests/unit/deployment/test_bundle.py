import shutil
from pathlib import Path
from typing import Any

import pytest

from cv_platform.config import DeployConfig
from cv_platform.deployment import bundle as bundle_module
from cv_platform.deployment.bundle import Place, publish_model
from cv_platform.errors import BundleExistsError, CorruptBundleError, ExportError
from cv_platform.files import file_sha256
from cv_platform.records import ModelBundle
from cv_platform.serving.model.fallback import load_fallback
from cv_platform.serving.model.runtime import load_bundle
from cv_platform.storage import CentralStorage
from cv_platform_tests.support.away import away_for_a_moment
from cv_platform_tests.support.record_samples import VERSION, drift_detectors, evaluation, task, trained_model
from cv_platform_tests.support.tiny_models import TinyExport, build_classifier, tiny_images

pytestmark = pytest.mark.xdist_group("tensorflow")


def publish(export: TinyExport, directory: Path, *, keras_path: Path | None = None, **changes: Any) -> ModelBundle:
    """Publishes an export as assets do; `changes` are fields of the trained model, the evaluation or the config."""
    folder = directory / "trained"
    folder.mkdir(exist_ok=True)
    shutil.copyfile(keras_path or export.keras_path, folder / "tiny.keras")
    shutil.copyfile(export.uae_path, folder / "tiny_uae.keras")
    trained = trained_model(folder, git_commit="0" * 40, mlflow_run_id="f" * 32)
    judged = evaluation(folder)
    return publish_model(
        trained.model_copy(update={k: v for k, v in changes.items() if k in type(trained).model_fields}),
        drift_detectors(changes.get("encoder", folder)),
        judged.model_copy(update={k: v for k, v in changes.items() if k in type(judged).model_fields}),
        export.images,
        deploy=DeployConfig(runtime=changes.get("runtime", "auto")),
        place=Place(CentralStorage(directory / "storage"), directory / "bentoml", directory / "cache"),
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def published(home: Path, tiny_export: TinyExport) -> ModelBundle:
    """The one real Bento build of these tests: it takes seconds."""
    return publish(tiny_export, home)


@pytest.fixture
def no_bento(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the Bento out, for tests that end before it or do not look at it."""
    monkeypatch.setattr(bundle_module, "build_bento", lambda *_, **__: "tiny:none")


def test_publishes_all_files_with_their_provenance(home: Path, published: ModelBundle, tiny_export: TinyExport):
    storage = CentralStorage(home / "storage")
    metadata = storage.read_metadata("tiny", VERSION)
    assert {"tiny.keras", "tiny_uae.keras", "golden.npz", "model.onnx"} <= set(metadata.checksums)
    assert metadata.checksums["tiny.keras"] == file_sha256(tiny_export.keras_path)
    assert (metadata.ds_name, metadata.dvc_tag) == ("animals", "v1.0.0")
    assert (metadata.git_commit, metadata.mlflow_run_id) == ("0" * 40, "f" * 32)
    assert (metadata.uae_dims, metadata.feature_dims, metadata.image_size) == (4, 5, (16, 16))
    assert (metadata.runtime, published.runtime) == ("onnx", "onnx")
    assert (published.runtime_reason, published.parity) == (metadata.runtime_reason, metadata.parity)
    assert metadata.parity["probabilities"] <= 1e-4
    assert metadata.parity["cam"] <= 1e-3
    assert (metadata.metrics, metadata.effective_config) == ({"accuracy": 0.5}, {"name": "animals"})
    folder = home / "storage" / "models" / "tiny" / VERSION
    assert published.bytes == sum((folder / relative).stat().st_size for relative in metadata.checksums)
    assert published.url == folder.as_uri()
    load_bundle(storage, "tiny", VERSION, cache=home / "cache")


def test_bento_holds_a_model_that_loads_and_no_training_code(home: Path, published: ModelBundle):
    assert published.bento_tag == f"tiny:{VERSION.lower()}"
    source = home / "bentoml" / "bentos" / "tiny" / VERSION.lower() / "src"
    loaded = load_fallback(source / "bentos" / "image_classifier" / "bundled_model")
    assert loaded is not None
    assert loaded.metadata.version == VERSION
    assert loaded.predict(tiny_images(1)[0]).cam.shape == (8, 8)
    packages = {path.name for path in (source / "cv_platform").iterdir() if path.is_dir()}
    assert packages == {"client", "config", "database", "images", "serving"}
    assert not list(source.rglob("__pycache__"))
    assert not list(source.rglob("*.keras"))


def test_publishing_the_same_model_again_keeps_the_bundle(
    home: Path, published: ModelBundle, tiny_export: TinyExport, no_bento: None
):
    before = CentralStorage(home / "storage").read_metadata("tiny", VERSION)
    again = publish(tiny_export, home, metrics={"accuracy": 0.9})
    assert (again.model, again.bytes) == (published.model, published.bytes)
    assert CentralStorage(home / "storage").read_metadata("tiny", VERSION) == before


def test_central_storage_that_is_away_for_a_moment_does_not_cost_an_export(
    tmp_path: Path,
    tiny_export: TinyExport,
    no_bento: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    with away_for_a_moment(tmp_path / "storage", monkeypatch, caplog):
        publish(tiny_export, tmp_path)
    assert CentralStorage(tmp_path / "storage").bundle_versions("tiny") == [VERSION]


def test_refuses_another_model_under_a_published_version(
    home: Path, published: ModelBundle, other_export: TinyExport, no_bento: None
):
    with pytest.raises(BundleExistsError, match=rf"{published.model}.*Train again"):
        publish(other_export, home)


def test_refuses_classes_that_are_not_the_outputs(tmp_path: Path, tiny_export: TinyExport):
    with pytest.raises(ExportError, match=r"each of 2 classes.*3 outputs"):
        publish(tiny_export, tmp_path, task=task(class_names=("cat", "dog")))


def test_publishes_nothing_that_does_not_pass_its_load_test(tmp_path: Path, tiny_export: TinyExport):
    with pytest.raises(CorruptBundleError, match="preprocessing"):
        publish(tiny_export, tmp_path, task=task(preprocessing_hash="0" * 16))
    assert CentralStorage(tmp_path / "storage").bundle_versions("tiny") == []


def test_a_missing_model_file_is_named(tmp_path: Path, tiny_export: TinyExport):
    with pytest.raises(ExportError, match=r"gone.tiny_uae\.keras"):
        publish(tiny_export, tmp_path, encoder=tmp_path / "gone")


def test_multi_label_threshold_is_kept(tmp_path: Path, tiny_export: TinyExport, no_bento: None):
    build_classifier(seed=7, activation="sigmoid").save(tmp_path / "m.keras")
    kind = task(classifier_type="multi-label")
    publish(tiny_export, tmp_path, keras_path=tmp_path / "m.keras", task=kind, threshold=0.3)
    metadata = CentralStorage(tmp_path / "storage").read_metadata("tiny", VERSION)
    assert (metadata.classifier_type, metadata.threshold) == ("multi-label", 0.3)


def test_a_bundle_for_tensorflow_says_why(tmp_path: Path, tiny_export: TinyExport, no_bento: None):
    published = publish(tiny_export, tmp_path, runtime="tensorflow")
    metadata = CentralStorage(tmp_path / "storage").read_metadata("tiny", VERSION)
    assert "saved_model/saved_model.pb" in metadata.checksums
    assert "model.onnx" not in metadata.checksums
    assert (published.runtime, published.runtime_reason) == ("tensorflow", "deploy.runtime asks for TensorFlow.")
    assert metadata.runtime_reason == published.runtime_reason
