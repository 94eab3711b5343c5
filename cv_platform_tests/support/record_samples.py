"""Records as assets hand them on, with values that tests may change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cv_platform.images import preprocessing_hash
from cv_platform.records import (
    Deployment,
    DriftDetectors,
    Evaluation,
    ModelBundle,
    ModelIdentity,
    Provenance,
    Task,
    TrainedModel,
)
from cv_platform.storage import BundleMetadata
from cv_platform_tests.support.tiny_models import CLASS_NAMES, IMAGE_SIZE, MODEL_NAME

VERSION = "20260101T000000Z-00000001"


def identity(model_name: str = MODEL_NAME, version: str = VERSION) -> ModelIdentity:
    return ModelIdentity(model_name=model_name, version=version)


def deployment() -> Deployment:
    return Deployment(
        service="image_classifier",
        model=identity(),
        previous_version=None,
        confirmed_workers=(),
        seconds=1.0,
        message="deployed",
    )


def provenance(**changes: Any) -> Provenance:
    return Provenance(
        **{"ds_name": "animals", "dvc_tag": "v1.0.0", "dvc_md5": "d41d8cd98f00b204e9800998ecf8427e", **changes}
    )


def task(**changes: Any) -> Task:
    values = {
        "image_size": IMAGE_SIZE,
        "preprocessing_hash": preprocessing_hash(IMAGE_SIZE),
        "class_names": CLASS_NAMES,
        "classifier_type": "multi-class",
    }
    return Task(**{**values, **changes})


def trained_model(directory: Path, **changes: Any) -> TrainedModel:
    """Returns the record of a model whose file is `directory/<model_name>.keras`."""
    values: dict[str, Any] = {
        "model": identity(),
        "provenance": provenance(),
        "task": task(),
        "pack": "a-pack",
        "directory": directory,
        "best_epoch": 1,
        "history": {"loss": [0.5]},
        "seconds": 1.0,
        "images_per_second": 100.0,
        "effective_config": {"name": "animals"},
    }
    return TrainedModel(**{**values, **changes})


def drift_detectors(directory: Path, **changes: Any) -> DriftDetectors:
    values: dict[str, Any] = {
        "model": identity(),
        "directory": directory,
        "encoder_hash": "0123456789abcdef",
        "uae_dims": 4,
        "feature_dims": 5,
    }
    return DriftDetectors(**{**values, **changes})


def evaluation(directory: Path, **changes: Any) -> Evaluation:
    values: dict[str, Any] = {
        "model": identity(),
        "passed": True,
        "reasons": ("good",),
        "threshold": 0.5,
        "metrics": {"accuracy": 0.5},
        "per_class": [],
        "confusion": [],
        "directory": directory,
        "plot_names": (),
        "mlflow_run_id": None,
    }
    return Evaluation(**{**values, **changes})


def model_bundle(metadata: BundleMetadata) -> ModelBundle:
    """Returns the record of a published bundle."""
    model = identity(metadata.model_name, metadata.version)
    return ModelBundle(model=model, bento_tag=f"{model.model_name}:{model.version}", bytes=1, url="memory://bundle")
