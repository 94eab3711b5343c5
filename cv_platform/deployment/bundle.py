"""Turns a trained model into an immutable bundle in central storage, and into a Bento.

Nothing is published before it has been loaded the way a worker loads it: what lies in central storage can be served.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from cv_platform.compute.engine import patiently
from cv_platform.config import DeployConfig
from cv_platform.datasets.packing import PackedSplit
from cv_platform.deployment.bento import build_bento
from cv_platform.deployment.export import ExportedModel, export_bundle
from cv_platform.deployment.int8 import INT8
from cv_platform.deployment.unknown import unknown_rates, unknown_rule
from cv_platform.errors import BundleExistsError, ExportError
from cv_platform.evaluation.model_card import write_model_card
from cv_platform.files import file_sha256, require_free_space
from cv_platform.records import DriftDetectors, Evaluation, Export, ModelBundle, TrainedModel, UnknownRate
from cv_platform.serving.model.runtime import LoadedModel, load_folder
from cv_platform.serving.model.unknown import UNKNOWN
from cv_platform.storage import BundleMetadata, CentralStorage

logger = logging.getLogger(__name__)

TRAINED_ON = "trained_on.npy"
"""In a bundle: `(N, 32)` uint8, the sha256 of the images that the model has learned or was chosen by."""
_COPIES = 6


@dataclass(frozen=True)
class Place:
    """Where a bundle and its Bento go.

    Attributes:
        storage: receives the bundle.
        bentoml_home: receives the Bento.
        cache: folder for downloads.
        source: see `bento.build_bento`.
        spare_bytes: see `files.require_free_space`.
    """

    storage: CentralStorage
    bentoml_home: Path
    cache: Path
    source: Path | None = None
    spare_bytes: int | None = None


@dataclass(frozen=True)
class Splits:
    """The packed splits that a model was trained on, was chosen by, and has never seen."""

    train: PackedSplit
    valid: PackedSplit
    test: PackedSplit


def publish_model(
    trained: TrainedModel,
    detectors: DriftDetectors,
    evaluation: Evaluation,
    golden_images: np.ndarray,
    *,
    deploy: DeployConfig,
    place: Place,
    splits: Splits | None = None,
    exports: tuple[Export, ...] = (),
) -> ModelBundle:
    """Exports, load-tests and publishes a model, then builds its Bento.

    Publishing the same model under the same version again (a run repeated after a crash) keeps the published bundle and
    builds the Bento.

    Args:
        trained: the classifier, see `export.export_bundle`.
        detectors: of the same model; their encoder goes with it.
        evaluation: of the same model: its metrics, and the threshold of multi-label decisions.
        golden_images: `(G, H, W, 3)` uint8 RGB, preprocessed; G ≥ 1.
        deploy: `runtime`, see `export.export_bundle`; and the licence that the model card names.
        place: where it goes.
        splits: what the model has learned from, and what not. The bundle lists the sha256 of the former, for a later
            gate, and carries the rule for unknown images that is fitted on them. None: not known.
        exports: what was measured of its files for other devices. With `deploy.runtime` onnx_int8 the last one is of
            the graph in 8 bits, `trained.int8_path`, which the bundle carries.

    Raises:
        ExportError: the models do not fit each other or the metadata, or the Bento cannot be built.
        CorruptBundleError: the export did not pass its load test; nothing was published.
        BundleExistsError: that version is published with another model.
        StorageError: central storage cannot be written.
        DiskSpaceError: the export and its copies would fill the disk.
    """
    name, version = trained.model.model_name, trained.model.version
    # Keras file, exported graphs, bundle, Bento and its fallback: each holds the weights once.
    needed = _COPIES * sum(_existing(path).stat().st_size for path in (trained.keras_path, detectors.uae_path))
    for directory in (Path(tempfile.gettempdir()), place.bentoml_home):
        require_free_space(directory, needed, purpose=f"the bundle of {name}", spare_bytes=place.spare_bytes)
    with tempfile.TemporaryDirectory(prefix="cv-bundle-") as temporary:
        folder = Path(temporary)
        keras_path, uae_path = folder / trained.keras_path.name, folder / detectors.uae_path.name
        shutil.copyfile(trained.keras_path, keras_path)
        shutil.copyfile(detectors.uae_path, uae_path)
        exported = export_bundle(
            keras_path,
            uae_path,
            folder,
            golden_images=golden_images,
            runtime="onnx" if deploy.runtime == INT8 else deploy.runtime,
            int8=(trained.int8_path, _in_8_bits(exports[-1])) if deploy.runtime == INT8 else None,
        )
        metadata = _metadata(trained, detectors, evaluation, exported)
        model = load_folder(folder, metadata)
        unknown = () if splits is None else _tell_unknown(model, keras_path, splits, folder)
        write_model_card(folder, trained, evaluation, licence=deploy.data_licence, unknown=unknown)
        patiently(f"The upload of {trained.model}", _publish, place.storage, folder, metadata, trained)
    files, metadata = patiently(str(trained.model), place.storage.fetch_bundle, name, version, place.cache)
    tag = build_bento(files, metadata, bentoml_home=place.bentoml_home, source=place.source)
    return ModelBundle(
        model=trained.model,
        bento_tag=tag,
        bytes=sum((files / relative).stat().st_size for relative in metadata.checksums),
        url=place.storage.bundle_url(name, version),
        runtime=metadata.runtime,
        runtime_reason=metadata.runtime_reason,
        parity=metadata.parity,
        exports=exports,
        unknown=unknown,
    )


def _tell_unknown(model: LoadedModel, keras_path: Path, splits: Splits, folder: Path) -> tuple[UnknownRate, ...]:
    """Writes what the model has learned from and its rule for unknown images; returns what the rule finds."""
    seen = {*splits.train.sha256, *splits.valid.sha256}
    digests = b"".join(bytes.fromhex(digest) for digest in sorted(seen))
    np.save(folder / TRAINED_ON, np.frombuffer(digests, dtype=np.uint8).reshape(-1, 32))
    model.unknown = unknown_rule(model, keras_path, splits.train, splits.valid)
    if model.unknown is not None:
        model.unknown.save(folder / UNKNOWN)
    return unknown_rates(model, splits.test)


def _in_8_bits(served: Export) -> str:
    return (
        f"deploy.runtime asks for convolutions in 8 bits: {served.accuracy:.4f} of {served.images} test images are "
        f"right, {served.model_accuracy:.4f} by the model itself; {served.agreement:.4f} are decided alike."
    )


def _publish(storage: CentralStorage, folder: Path, metadata: BundleMetadata, trained: TrainedModel) -> None:
    try:
        storage.publish_bundle(folder, metadata)
    except BundleExistsError as err:
        keras_name = trained.keras_path.name
        published = storage.read_metadata(metadata.model_name, metadata.version).checksums.get(keras_name)
        if published != file_sha256(folder / keras_name):
            raise BundleExistsError(
                f"Expected the model that is published as {trained.model}. Received: {trained.keras_path}, which "
                "differs from it. Train again: the new model gets a version of its own."
            ) from err
        logger.info("%s is published already with this very model; it stays", trained.model)


def _metadata(
    trained: TrainedModel, detectors: DriftDetectors, evaluation: Evaluation, exported: ExportedModel
) -> BundleMetadata:
    class_names = trained.task.class_names
    if exported.classes != len(class_names):
        raise ExportError(
            f"Expected an output for each of {len(class_names)} classes ({', '.join(class_names)}). "
            f"Received: {exported.classes} outputs. Train {trained.model.model_name} with this config."
        )
    return BundleMetadata(
        **trained.model.model_dump(),
        **trained.provenance.model_dump(),
        **trained.task.model_dump(exclude={"image_size"}),
        **exported.model_dump(exclude={"golden", "classes", "cam_size"}),
        created_utc=datetime.now(UTC),
        threshold=evaluation.threshold,
        temperature=trained.temperature,
        encoder_hash=detectors.encoder_hash,
        git_commit=trained.git_commit,
        mlflow_run_id=trained.mlflow_run_id,
        metrics=evaluation.metrics,
        effective_config=trained.effective_config,
    )


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ExportError(
            f"Expected a Keras model at {path}. Received: no such file. Materialise the model and its detectors first."
        )
    return path
