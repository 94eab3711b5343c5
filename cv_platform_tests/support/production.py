"""A production pointer and bundles that a test moves and damages."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from cv_platform.serving.model.holder import ModelHolder
from cv_platform.storage import BundleMetadata, CentralStorage, ProductionPointer

SERVICE = "image_classifier"


def point_to(storage: CentralStorage, metadata: BundleMetadata) -> ProductionPointer:
    pointer = ProductionPointer(model_name=metadata.model_name, version=metadata.version, since_utc=datetime.now(UTC))
    storage.write_pointer(SERVICE, pointer)
    return pointer


def damage(root: Path, metadata: BundleMetadata) -> None:
    path = root / "models" / metadata.model_name / metadata.version / "golden.npz"
    path.write_bytes(path.read_bytes()[:100])


def version_of(holder: ModelHolder) -> str | None:
    model = holder.current()
    return model.metadata.version if model else None
