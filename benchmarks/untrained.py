"""A deployed network with random weights: exported, load-tested and published by the platform, without any training.

For what does not depend on the answers: speed, swaps, faults. `python -m benchmarks.untrained` reads an
`UntrainedModel` as JSON from standard input; it is a process of its own, as no TensorFlow should lie beside a measured
server.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from benchmarks.harness import Record
from benchmarks.installation import quick_experiment
from benchmarks.options import REPOSITORY
from cv_platform.errors import CvPlatformError
from cv_platform.settings import Settings
from cv_platform.storage import CentralStorage, ProductionPointer, new_version

GOLDEN_IMAGES = 8
UAE_DIMS = 128
EXPORT_SECONDS = 300.0


class UntrainedModel(Record):
    """What to build and where to publish it."""

    name: str
    architecture: str
    side_px: int
    versions: list[str]
    """The same weights are published under each of them."""
    storage_url: str
    scratch: Path
    """Receives what only the export needs."""
    runtime: Literal["auto", "onnx", "tensorflow"] = "auto"


def deploy_untrained(
    settings: Settings,
    environment: Mapping[str, str],
    scratch: Path,
    *,
    name: str,
    architecture: str,
    side_px: int,
    versions: int = 1,
    runtime: Literal["auto", "onnx", "tensorflow"] = "auto",
) -> list[str]:
    """Publishes a network in the installation's storage and points production at its first version.

    Args:
        settings: of the installation.
        environment: see `installation.isolated_environment`.
        scratch: a folder for what only the export needs.
        name: of the experiment; the model is `<name>_classifier`.
        architecture: see `training/architectures`.
        side_px: height and width of the input.
        versions: how many versions of it are published.
        runtime: see `deployment.export.export_bundle`.

    Returns:
        The versions, oldest first.

    Raises:
        CvPlatformError: the export failed; the end of its output is shown.
    """
    begin = datetime.now(UTC)
    wanted = UntrainedModel(
        name=name,
        architecture=architecture,
        side_px=side_px,
        versions=[new_version(begin + timedelta(seconds=number)) for number in range(versions)],
        storage_url=settings.storage_url,
        scratch=scratch,
        runtime=runtime,
    )
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.untrained"],
        input=wanted.model_dump_json(),
        env=dict(environment),
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=EXPORT_SECONDS,
    )
    if done.returncode:
        raise CvPlatformError(
            f"Expected {architecture} to be published. Received: status {done.returncode}.\n{done.stdout[-3000:]}"
        )
    CentralStorage(settings.storage_url).write_pointer(
        settings.service_name,
        ProductionPointer(model_name=f"{name}_classifier", version=wanted.versions[0], since_utc=datetime.now(UTC)),
    )
    return wanted.versions


def publish(wanted: UntrainedModel) -> None:
    """Builds the network and its encoder, and publishes them under every wanted version."""
    import numpy as np

    from cv_platform.config import DeployConfig
    from cv_platform.deployment.bundle import Place, publish_model
    from cv_platform.drift.encoders import build_uae, encoder_hash
    from cv_platform.images import Preprocessing, preprocessing_hash
    from cv_platform.records import (
        DriftDetectors,
        Evaluation,
        ModelIdentity,
        Provenance,
        Task,
        TrainedModel,
    )
    from cv_platform.training.network import build_model

    size: dict[str, Any] = {"h": wanted.side_px, "w": wanted.side_px}
    experiment = quick_experiment(wanted.name, model={"architecture": wanted.architecture, "input_size": size})
    model = experiment.model
    network, encoder = build_model(model), build_uae(model.image_size, UAE_DIMS, seed=0)
    identity = ModelIdentity(model_name=model.model_name, version=wanted.versions[0])
    trained = TrainedModel(
        model=identity,
        provenance=Provenance(ds_name=experiment.dataset.ds_name, dvc_tag=experiment.dataset.dvc_tag, dvc_md5="0" * 32),
        task=Task(
            image_size=model.image_size,
            preprocessing_hash=preprocessing_hash(model.image_size, Preprocessing.of(model)),
            class_names=model.classes,
            classifier_type=model.classifier_type,
        ),
        pack="none",
        directory=wanted.scratch.absolute(),
        best_epoch=1,
        history={"loss": []},  # No epoch.
        seconds=0.0,
        images_per_second=0.0,
        effective_config=experiment.model_dump(mode="json"),
    )
    detectors = DriftDetectors(
        model=identity,
        directory=trained.directory,
        encoder_hash=encoder_hash(encoder),
        uae_dims=UAE_DIMS,
        feature_dims=0,
    )
    evaluation = Evaluation(
        model=identity,
        passed=True,
        reasons=(),
        threshold=model.threshold,
        metrics={},
        per_class=[],
        confusion=[],
        directory=trained.directory,
        plot_names=(),
        mlflow_run_id=None,
    )
    wanted.scratch.mkdir(parents=True, exist_ok=True)
    network.save(trained.keras_path)
    encoder.save(detectors.uae_path)
    shape = (GOLDEN_IMAGES, *model.image_size, 3)
    golden = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    place = Place(CentralStorage(wanted.storage_url), wanted.scratch / "bentoml", wanted.scratch / "cache")
    publish_model(trained, detectors, evaluation, golden, deploy=DeployConfig(runtime=wanted.runtime), place=place)
    folder, metadata = place.storage.fetch_bundle(identity.model_name, identity.version, place.cache)
    for version in wanted.versions[1:]:
        place.storage.publish_bundle(folder, metadata.model_copy(update={"version": version}))


if __name__ == "__main__":
    publish(UntrainedModel.model_validate_json(sys.stdin.read()))
