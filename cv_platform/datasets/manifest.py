"""`manifest.parquet`: what is in a checked-out dataset version, one row per image.

The manifest follows from the images and from the config (classes, classifier type, fractions, seed), so its file name
carries a hash of the latter: experiments that share a checkout do not share a manifest by mistake.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cv_platform import images
from cv_platform.config import DatasetConfig, ModelConfig
from cv_platform.datasets.near_copies import THUMBNAIL_PX, find_near_copies, thumbnail
from cv_platform.datasets.sources.entries import ImageEntry
from cv_platform.datasets.sources.label_files import LabelRules
from cv_platform.datasets.sources.layouts import read_layout
from cv_platform.datasets.sources.tree import walk
from cv_platform.datasets.splits import SPLITS, TAKEN, complete_splits
from cv_platform.errors import DatasetError, ImageError, InvalidDatasetError
from cv_platform.files import whole_file

logger = logging.getLogger(__name__)

MANIFEST_VERSION = 3
MANIFEST_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("sha256", pa.string()),
        ("split", pa.string()),
        ("split_origin", pa.string()),
        ("labels", pa.list_(pa.string())),
        ("width_px", pa.int32()),
        ("height_px", pa.int32()),
        ("bytes", pa.int64()),
        ("is_readable", pa.bool_()),
        ("problem", pa.string()),
        ("damage", pa.string()),
        ("constant", pa.string()),
        ("narrow_range", pa.string()),
        ("thumbnail", pa.binary(THUMBNAIL_PX**2)),
    ]
)
_READERS = 2
_FEWEST_LEVELS = 64
"""A quarter of the 256 that 8 bits have, as 14-bit data in 16 bits use."""
_SHOWN = 5


def manifest_name(model: ModelConfig, dataset: DatasetConfig) -> str:
    """Returns the manifest's file name for a config; it changes with everything that would change a row."""
    config = {
        "version": MANIFEST_VERSION,
        "classes": sorted(model.classes),
        "classifier_type": model.classifier_type,
        "fractions": [dataset.valid_fraction, dataset.reference_fraction, dataset.test_fraction],
        "seed": dataset.split_seed,
        "max_image_pixels": dataset.max_image_pixels,
    }
    return f"manifest-{hashlib.sha256(json.dumps(config).encode()).hexdigest()[:16]}.parquet"


def build_manifest(
    directory: Path, *, data_path: str, annotations: bytes | None, model: ModelConfig, dataset: DatasetConfig
) -> Path:
    """Describes the images of a checkout and returns the manifest's path; each file is read once.

    A row is one image, keyed by `path`, ordered by it:

    * `path`: POSIX, relative to `directory`; `sha256` of the file; `bytes`, its size.
    * `split`: train, valid, test or reference; `split_origin`: `given`, or `taken from train` where it was missing;
      what is taken never divides copies or near-copies.
    * `labels`: class names; exactly one for multi-class.
    * `width_px`, `height_px`: of the upright image; of the header, or 0, where it is not readable.
    * `is_readable`, and the `problem` where it is not: such an image is a finding of validation, not an error here.
    * `thumbnail`: its 32×32 grey levels, by which near-copies are found; none where it is not readable.
    * `damage` that its decoder went on after, its colour if it is `constant`, and the `narrow_range` that its 16-bit
      samples stay in: in words, or none where there is nothing of the kind.

    Args:
        directory: root of the checkout; the manifest is written into it.
        data_path: folder of the images below it.
        annotations: content of annotations.csv, if the version has one.
        model: classes and classifier type.
        dataset: split fractions and seed.

    Raises:
        InvalidDatasetError: the classes found are not the configured ones, a class has no images, labels do not fit the
            classifier type, or splits are missing that cannot be taken from train.
    """
    layout = read_layout(walk(directory / data_path), annotations, LabelRules(is_stored=True))
    _check_classes(layout.entries, layout.class_names, model, dataset)
    paths = [f"{data_path}/{entry.path}" for entry in layout.entries]
    with ThreadPoolExecutor(_READERS) as pool:
        files = list(pool.map(lambda path: _inspect(directory / path, dataset.max_image_pixels), paths))
    are_given = {entry.split for entry in layout.entries} == set(SPLITS)
    splits, origins = complete_splits(
        [entry.split for entry in layout.entries],
        [file.sha256 for file in files] if are_given else _inseparable(files),
        [entry.labels for entry in layout.entries],
        dataset,
    )
    if TAKEN in origins:
        taken = Counter(split for split, origin in zip(splits, origins, strict=True) if origin == TAKEN)
        logger.info("Taken from train with seed %d: %s", dataset.split_seed, dict(taken))
    table = pa.table(
        {
            "path": paths,
            "sha256": [file.sha256 for file in files],
            "split": splits,
            "split_origin": origins,
            "labels": [list(entry.labels) for entry in layout.entries],
            "width_px": [file.width_px for file in files],
            "height_px": [file.height_px for file in files],
            "bytes": [file.bytes for file in files],
            "is_readable": [file.problem is None for file in files],
            "problem": [file.problem for file in files],
            "damage": [file.damage for file in files],
            "constant": [file.constant for file in files],
            "narrow_range": [file.narrow_range for file in files],
            "thumbnail": [file.thumbnail for file in files],
        },
        schema=MANIFEST_SCHEMA,
    )
    path = directory / manifest_name(model, dataset)
    with whole_file(path) as partial:
        pq.write_table(table, partial, compression="zstd")
    return path


def is_manifest(path: Path) -> bool:
    """Tells whether a complete manifest lies at `path`."""
    try:
        return pq.read_schema(path).equals(MANIFEST_SCHEMA)
    except (OSError, pa.ArrowException):
        return False


def read_manifest(path: Path) -> pd.DataFrame:
    """Reads a manifest: one row per image, in the order of `path`; `labels` holds lists, `problem` strings or None.

    The thumbnails are left out, see `read_thumbnails`.

    Raises:
        DatasetError: there is no manifest at `path`.
    """
    table = _read(path, [name for name in MANIFEST_SCHEMA.names if name != "thumbnail"])
    frame = table.drop_columns(["labels"]).to_pandas()
    # Python lists, where pandas would give arrays that compare element-wise.
    frame.insert(frame.columns.get_loc("split") + 1, "labels", pd.Series(table["labels"].to_pylist(), dtype=object))
    return frame


def read_thumbnails(path: Path) -> NDArray[np.uint8]:
    """Reads `(N, 32, 32)` uint8 grey levels of a manifest's images, zeros of those that are not readable.

    Raises:
        DatasetError: there is no manifest at `path`.
    """
    column = _read(path, ["thumbnail"])["thumbnail"].combine_chunks().fill_null(bytes(THUMBNAIL_PX**2))
    values = b"".join(column.to_pylist())
    return np.frombuffer(values, np.uint8).reshape(-1, THUMBNAIL_PX, THUMBNAIL_PX)


def _read(path: Path, columns: list[str]) -> pa.Table:
    try:
        return pq.read_table(path, schema=MANIFEST_SCHEMA, columns=columns)
    except (OSError, pa.ArrowException) as err:
        raise DatasetError(f"Expected a manifest at {path}. Received: {err}. Materialise the dataset again.") from err


@dataclass(frozen=True)
class _File:
    sha256: str
    bytes: int
    width_px: int
    height_px: int
    problem: str | None = None
    damage: str | None = None
    constant: str | None = None
    narrow_range: str | None = None
    thumbnail: bytes | None = None


def _inseparable(files: list[_File]) -> list[str]:
    """Returns for each file what it shares with its copies and near-copies: the smallest sha256 of them."""
    distinct = {file.sha256: file.thumbnail for file in files if file.thumbnail is not None}
    pixels = np.frombuffer(b"".join(distinct.values()), np.uint8).reshape(-1, THUMBNAIL_PX, THUMBNAIL_PX)
    numbers = find_near_copies(pixels).sets(len(distinct)).tolist()
    smallest: dict[int, str] = {}
    for sha256, number in zip(distinct, numbers, strict=True):
        smallest[number] = min(sha256, smallest.get(number, sha256))
    names = {sha256: smallest[number] for sha256, number in zip(distinct, numbers, strict=True)}
    return [names.get(file.sha256, file.sha256) for file in files]


def _inspect(path: Path, max_pixels: int) -> _File:
    data = path.read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    height_px = width_px = 0
    try:
        _, height_px, width_px = images.read_size(data, max_pixels=max_pixels)
        image = images.read_image(data, max_pixels=max_pixels)
    except ImageError as err:
        return _File(sha256, len(data), width_px, height_px, problem=f"{type(err).__name__}: {err}")
    first, darkest, brightest = image.pixels[0, 0], int(image.pixels.min()), int(image.pixels.max())
    is_constant = bool((image.pixels == first).all())
    levels = brightest - darkest + 1
    is_narrow = image.sample_bits == 16 and levels < _FEWEST_LEVELS
    return _File(
        sha256,
        len(data),
        image.width_px,
        image.height_px,
        damage=image.damage,
        constant=f"all of it is RGB {tuple(map(int, first))}" if is_constant else None,
        narrow_range=f"16-bit samples from {256 * darkest} to {256 * brightest + 255}: {levels} of 256 levels are seen"
        if is_narrow
        else None,
        thumbnail=thumbnail(image.pixels).tobytes(),
    )


def _check_classes(
    entries: tuple[ImageEntry, ...], found: tuple[str, ...], model: ModelConfig, dataset: DatasetConfig
) -> None:
    name = f"{dataset.ds_name} {dataset.dvc_tag}"
    used = Counter(label for entry in entries for label in entry.labels)
    unknown = sorted(set(found) - set(model.classes))
    without = [label for label in model.classes if not used[label]]
    mistakes = []
    if unknown:
        mistakes.append(f"classes that model.classes does not name: {', '.join(unknown)}")
    if without:
        mistakes.append(f"no images of: {', '.join(without)}")
    if model.classifier_type == "multi-class":
        wrong = [entry for entry in entries if len(entry.labels) != 1]
        if wrong:
            shown = ", ".join(f"{entry.path} ({'|'.join(entry.labels) or 'none'})" for entry in wrong[:_SHOWN])
            mistakes.append(f"{len(wrong)} images without exactly one label: {shown} (multi-label has several)")
    if mistakes:
        raise InvalidDatasetError(
            f"{name}: expected images of exactly the classes {', '.join(model.classes)}. "
            f"Received: {'; '.join(mistakes)}. Found: {', '.join(found)}. "
            "Change model.classes, or import a corrected version."
        )


def split_counts(manifest: pd.DataFrame) -> dict[str, int]:
    """Returns the images per split, in the order train, valid, test, reference."""
    counts = Counter(manifest["split"])
    return {split: counts[split] for split in SPLITS}
