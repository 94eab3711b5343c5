from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cv_platform.config import ValidateConfig
from cv_platform.datasets.manifest import MANIFEST_SCHEMA
from cv_platform.datasets.near_copies import thumbnail
from cv_platform.images import resize
from cv_platform.properties import PROPERTY_NAMES, image_properties
from cv_platform.records import DatasetVersion, Provenance
from cv_platform.validation.checks import Subject
from cv_platform.validation.sample import ImageSample

REMARKS = ("group", "problem", "damage", "constant", "narrow_range", "largest_sample", "clipped")
MakeManifest = Callable[..., pd.DataFrame]


@pytest.fixture
def make_manifest() -> MakeManifest:
    """Builds the readable part of a manifest from `(path, split, labels, content)`; equal content, equal sha256."""

    def make(*rows: tuple[str, str, Sequence[str], str]) -> pd.DataFrame:
        return pd.DataFrame(
            {
                "path": [row[0] for row in rows],
                "split": [row[1] for row in rows],
                "labels": [list(row[2]) for row in rows],
                "unknown_labels": [list(row[4]) if len(row) > 4 else [] for row in rows],
                "sha256": [hashlib.sha256(row[3].encode()).hexdigest() for row in rows],
                "is_readable": [True] * len(rows),
                "status": ["used"] * len(rows),
                "bit_depth": [8] * len(rows),
                **{name: [None] * len(rows) for name in REMARKS},
            }
        )

    return make


def _properties(image: np.ndarray) -> dict[str, float]:
    return dict(zip(PROPERTY_NAMES, image_properties(resize(image, (32, 32))).tolist(), strict=True))


@dataclass
class Checkout:
    """A folder of real image files that becomes a `DatasetVersion`."""

    directory: Path
    rows: list[dict[str, object]]

    def add(self, path: str, split: str, labels: Sequence[str], image: np.ndarray | bytes, problem: str | None = None):
        """Writes an image (or raw bytes) and its manifest row; with `problem` the row says that it is unreadable."""
        target = self.directory / path
        target.parent.mkdir(parents=True, exist_ok=True)
        data = image if isinstance(image, bytes) else cv2.imencode(".png", image[..., ::-1])[1].tobytes()
        target.write_bytes(data)
        self.rows.append(
            {
                "path": path,
                "sha256": hashlib.sha256(data).hexdigest(),
                "split": split,
                "split_origin": "given",
                "labels": list(labels),
                "width_px": 16,
                "height_px": 16,
                "bytes": len(data),
                "status": "used" if problem is None else "quarantined",
                "reason": None if problem is None else f"unreadable: {problem}",
                "is_readable": problem is None,
                "problem": problem,
                **(_properties(image) if isinstance(image, np.ndarray) else {}),
                "thumbnail": thumbnail(image).tobytes() if isinstance(image, np.ndarray) else None,
            }
        )

    def version(self, class_names: Sequence[str]) -> DatasetVersion:
        manifest = self.directory / "manifest.parquet"
        rows = sorted(self.rows, key=lambda row: str(row["path"]))
        pq.write_table(pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA), manifest)
        return DatasetVersion(
            provenance=Provenance(ds_name="shapes", dvc_tag="v1.0.0", dvc_md5="0123456789abcdef0123456789abcdef.dir"),
            git_commit="c" * 40,
            directory=self.directory,
            manifest=manifest.name,
            class_names=tuple(class_names),
        )


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path / "checkout", [])


def picture(kind: str, seed: int) -> np.ndarray:
    """Draws a 16×16 RGB image: a bright `left` or `right` half on dark noise."""
    generator = np.random.default_rng(seed)
    image = generator.integers(0, 60, (16, 16, 3), dtype=np.uint8)
    half = slice(0, 8) if kind == "left" else slice(8, 16)
    image[:, half] += np.uint8(150)
    return image


@pytest.fixture
def draw() -> Callable[[str, int], np.ndarray]:
    return picture


@pytest.fixture
def clean_checkout(checkout: Checkout) -> Checkout:
    """Two classes in four splits without a fault: 120 images of train, 40 of each other split."""
    seed = 0
    for split, count in (("train", 60), ("valid", 20), ("test", 20), ("reference", 20)):
        for kind in ("left", "right"):
            for number in range(count):
                seed += 1
                checkout.add(f"images/{split}/{kind}/{number:03d}.png", split, [kind], picture(kind, seed))
    return checkout


NO_PIXELS = ImageSample(
    pd.DataFrame({"split": []}), np.zeros((0, 32, 32, 3), np.uint8), np.zeros((0, 7)), np.zeros((0, 1)), {}, 0
)


NONE_QUARANTINED = pd.DataFrame({name: [] for name in ("path", "status", "reason", "is_readable", "problem")})


def subject(manifest: pd.DataFrame | None = None, config: ValidateConfig | None = None, **given: Any) -> Subject:
    """Returns what a check looks at: without more, no images, of one class."""
    values: dict[str, Any] = {"directory": Path("unused"), "root": Path("unused"), "version": "shapes v1"}
    values |= {
        "quarantined": NONE_QUARANTINED,
        "sample": NO_PIXELS,
        "class_names": ("cat",),
        "classifier_type": "multi-class",
        **given,
    }
    manifest = pd.DataFrame({"split": []}) if manifest is None else manifest
    values = {"thumbnails": np.zeros((len(manifest), 32, 32), np.uint8), **values}
    values = {"vectors": np.zeros((len(manifest), 1), np.float16), **values}
    return Subject(manifest=manifest, config=config or ValidateConfig(), **values)
