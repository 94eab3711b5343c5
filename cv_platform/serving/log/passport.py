"""Where a prediction comes from: request → model version → training run → dataset version → config."""

from __future__ import annotations

import hashlib
from typing import Any

from cv_platform.serving.log.entry import StoredPrediction
from cv_platform.storage import BundleMetadata


def make_passport(
    stored: StoredPrediction, metadata: BundleMetadata | None, *, mlflow_url: str | None, reason: str | None = None
) -> dict[str, Any]:
    """Returns a prediction's passport as JSON values.

    Args:
        stored: the prediction.
        metadata: of the model version that made it; None when it cannot be read, for `reason`.
        mlflow_url: where people open MLflow, which has its training run.
        reason: why there are no metadata.
    """
    prediction = {
        "prediction_id": str(stored.prediction_id),
        "created_on": stored.created_on.isoformat(),
        "predicted_class": stored.predicted_class,
        "model_name": stored.model_name,
        "model_version": stored.model_version,
        "image_sha256": stored.image_sha256,
        "image_is_kept": stored.image is not None,
    }
    if metadata is None:
        return {
            "prediction": prediction,
            "model": None,
            "message": f"Expected the metadata of {stored.model_name} {stored.model_version}. Received: {reason}",
        }
    return {
        "prediction": prediction,
        "model": {
            **metadata.model_dump(mode="json", exclude={"effective_config", "checksums"}),
            "files": len(metadata.checksums),
            "bundle_sha256": bundle_sha256(metadata),
        },
        "training_run": _run_url(mlflow_url, metadata.mlflow_run_id),
        "config": metadata.effective_config,
        "message": "ok",
    }


def bundle_sha256(metadata: BundleMetadata) -> str:
    """Returns one hash for all files of a bundle: the sha256 of what `sha256sum` lists for them, by name."""
    lines = (f"{digest}  {name}\n" for name, digest in sorted(metadata.checksums.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _run_url(mlflow_url: str | None, run_id: str | None) -> str | None:
    """Returns the address that opens the run in MLflow's pages, whichever experiment it belongs to."""
    return f"{mlflow_url.rstrip('/')}/#/runs/{run_id}" if mlflow_url and run_id else None
