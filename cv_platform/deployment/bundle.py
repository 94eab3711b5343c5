"""Turns a trained model into an immutable bundle in central storage, and into a Bento.

Nothing is published before it has been loaded the way a worker loads it: what lies in central storage can be served.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from cv_platform.deployment.bento import build_bento
from cv_platform.deployment.export import export_bundle
from cv_platform.disk_space import require_free_space
from cv_platform.errors import BundleExistsError, ExportError
from cv_platform.files import file_sha256
from cv_platform.serving.model.runtime import load_folder
from cv_platform.storage import BundleMetadata, CentralStorage

logger = logging.getLogger(__name__)

_COPIES = 6


class ModelBundle(BaseModel):
    """A published bundle and the Bento built around it.

    Attributes:
        bento_tag: serve it with `bentoml serve`.
        bytes: size of the bundle's files.
        url: the bundle's folder in central storage.
        runtime: what runs the exported model.
        runtime_reason: why that one.
        parity: see `export.ExportedModel`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model_name: str
    version: str
    bento_tag: str
    bytes: int
    url: str
    runtime: Literal["tensorflow", "onnx"] = "tensorflow"
    runtime_reason: str = ""
    parity: dict[str, float] = Field(default_factory=dict)


def publish_model(
    *,
    model_name: str,
    version: str,
    keras_path: Path,
    uae_path: Path,
    golden_images: np.ndarray,
    class_names: tuple[str, ...],
    classifier_type: Literal["multi-class", "multi-label"],
    preprocessing_hash: str,
    encoder_hash: str,
    dataset_name: str,
    dvc_tag: str,
    dvc_md5: str,
    storage: CentralStorage,
    bentoml_home: Path,
    cache: Path,
    threshold: float = 0.5,
    temperature: float = 1.0,
    runtime: Literal["auto", "onnx", "tensorflow"] = "auto",
    git_commit: str | None = None,
    mlflow_run_id: str | None = None,
    metrics: Mapping[str, float] | None = None,
    effective_config: Mapping[str, Any] | None = None,
    source: Path | None = None,
    spare_bytes: int | None = None,
) -> ModelBundle:
    """Exports, load-tests and publishes a model, then builds its Bento.

    Publishing the same model under the same version again (a run repeated after a crash) keeps the published bundle and
    builds the Bento.

    Args:
        model_name: name in storage, registry and logs.
        version: see `storage.new_version`; the trained model's own.
        keras_path: the classifier, see `export.export_bundle`.
        uae_path: the encoder.
        golden_images: `(G, H, W, 3)` uint8 RGB, preprocessed; G ≥ 1.
        class_names: in the order of the outputs.
        classifier_type: what the outputs mean.
        preprocessing_hash: of the pixels that the model was trained on.
        encoder_hash: of the encoder's weights.
        dataset_name: the DVC repository.
        dvc_tag: its tag.
        dvc_md5: the data's own version.
        storage: receives the bundle.
        bentoml_home: receives the Bento.
        cache: folder for downloads.
        threshold: multi-label: probability from which a class is predicted.
        temperature: that the classifier's weights have in them, for the record.
        runtime: see `export.export_bundle`.
        git_commit: of the code that trained.
        mlflow_run_id: of the training.
        metrics: of the evaluation.
        effective_config: the experiment as it ran, JSON values.
        source: see `bento.build_bento`.
        spare_bytes: see `disk_space.require_free_space`.

    Raises:
        ExportError: the models do not fit each other or the metadata, or the Bento cannot be built.
        CorruptBundleError: the export did not pass its load test; nothing was published.
        BundleExistsError: that version is published with another model.
        StorageError: central storage cannot be written.
        DiskSpaceError: the export and its copies would fill the disk.
    """
    # Keras file, exported graphs, bundle, Bento and its fallback: each holds the weights once.
    needed = _COPIES * (_existing(keras_path).stat().st_size + _existing(uae_path).stat().st_size)
    for directory in (Path(tempfile.gettempdir()), bentoml_home):
        require_free_space(directory, needed, purpose=f"the bundle of {model_name}", spare_bytes=spare_bytes)
    with tempfile.TemporaryDirectory(prefix="cv-bundle-") as temporary:
        folder = Path(temporary)
        keras_name = f"{model_name}.keras"
        shutil.copyfile(_existing(keras_path), folder / keras_name)
        shutil.copyfile(_existing(uae_path), folder / f"{model_name}_uae.keras")
        exported = export_bundle(
            folder / keras_name,
            folder / f"{model_name}_uae.keras",
            folder,
            golden_images=golden_images,
            runtime=runtime,
        )
        if exported.classes != len(class_names):
            raise ExportError(
                f"Expected an output for each of {len(class_names)} classes ({', '.join(class_names)}). "
                f"Received: {exported.classes} outputs. Train {model_name} with this config."
            )
        metadata = BundleMetadata(
            model_name=model_name,
            version=version,
            created_utc=datetime.now(UTC),
            runtime=exported.runtime,
            runtime_reason=exported.runtime_reason,
            parity=exported.parity,
            classifier_type=classifier_type,
            class_names=class_names,
            image_size=exported.image_size,
            threshold=threshold,
            temperature=temperature,
            uae_dims=exported.uae_dims,
            feature_dims=exported.feature_dims,
            preprocessing_hash=preprocessing_hash,
            encoder_hash=encoder_hash,
            dataset_name=dataset_name,
            dvc_tag=dvc_tag,
            dvc_md5=dvc_md5,
            git_commit=git_commit,
            mlflow_run_id=mlflow_run_id,
            metrics=dict(metrics or {}),
            effective_config=dict(effective_config or {}),
        )
        load_folder(folder, metadata)
        try:
            storage.publish_bundle(folder, metadata)
        except BundleExistsError as err:
            if storage.read_metadata(model_name, version).checksums.get(keras_name) != file_sha256(folder / keras_name):
                raise BundleExistsError(
                    f"Expected the model that is published as {model_name} {version}. Received: {keras_path}, which "
                    "differs from it. Train again: the new model gets a version of its own."
                ) from err
            logger.info("%s %s is published already with this very model; it stays", model_name, version)
    published, metadata = storage.fetch_bundle(model_name, version, cache)
    tag = build_bento(published, metadata, bentoml_home=bentoml_home, source=source)
    return ModelBundle(
        model_name=model_name,
        version=version,
        bento_tag=tag,
        bytes=sum((published / relative).stat().st_size for relative in metadata.checksums),
        url=f"{storage.url.rstrip('/')}/models/{model_name}/{version}",
        runtime=metadata.runtime,
        runtime_reason=metadata.runtime_reason,
        parity=metadata.parity,
    )


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ExportError(
            f"Expected a Keras model at {path}. Received: no such file. Materialise the model and its detectors first."
        )
    return path
