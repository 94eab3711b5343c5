"""Decodes every usable image once, into memory-mapped uint8 arrays that training, evaluation and drift read in order.

A pack is keyed by data version, preprocessing, manifest and quarantine, never changes, and is made again when its files
are not the ones that were written. Layout of `home/packed/<md5>-<hash>/`:

    <split>.images.npy    (N, H, W, 3) uint8 RGB
    <split>.targets.npy   (N,) int64, or (N, C) float32 of 0 and 1 for multi-label
    <split>.rows.parquet  path and sha256 of each row
    packed.json           written last: sizes and checksums of the files above
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from cv_platform import images
from cv_platform.config import ModelConfig
from cv_platform.datasets.manifest import read_manifest
from cv_platform.datasets.splits import SPLITS
from cv_platform.errors import DatasetError, ImageError, InvalidDatasetError, VerdictError
from cv_platform.files import exclusive, file_sha256, require_free_space, whole_directory
from cv_platform.records import DatasetVersion, PackedImages, Task, TrainedModel

logger = logging.getLogger(__name__)

PACK_FORMAT = 1
_MARKER = "packed.json"
_FACTS = ("counts", "bytes", "images_per_second")
"""In the marker, beside the checksums: what cannot be told from dataset version and config."""
_CHUNK_IMAGES = 256
_DECODERS = 2


@dataclass(frozen=True)
class PackedSplit:
    """One split of a pack; row i of everything is the same image, and rows are ordered by path.

    Attributes:
        images: `(N, H, W, 3)` uint8 RGB, memory-mapped, read-only.
        targets: `(N,)` int64 class indices, or `(N, C)` float32 of 0 and 1 for multi-label.
        paths: POSIX, as in the manifest.
        sha256: of the image files.
    """

    images: np.ndarray
    targets: np.ndarray
    paths: list[str]
    sha256: list[str]

    def batches(self, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields `(images, targets)` in order, the last batch possibly smaller; the arrays are read-only views."""
        if batch_size < 1:
            raise ValueError(f"Expected a batch size of at least 1. Received: {batch_size}.")
        for start in range(0, len(self.targets), batch_size):
            rows = slice(start, start + batch_size)
            yield np.asarray(self.images[rows]), np.asarray(self.targets[rows])


def pack_images(
    version: DatasetVersion,
    model: ModelConfig,
    *,
    quarantined: Collection[str],
    home: Path,
    spare_bytes: int | None = None,
) -> PackedImages:
    """Decodes the readable images that are not quarantined, or returns the pack that has them already.

    Args:
        version: the checkout.
        model: image size, classes and classifier type.
        quarantined: paths of the manifest that validation keeps out.
        home: the pack is made in `home/packed`.
        spare_bytes: see `files.require_free_space`.

    Raises:
        InvalidDatasetError: nothing is left to train on, quarantined paths are not in the manifest, or a file is not
            the one that the manifest describes.
        DiskSpaceError: there is not enough disk space.
    """
    manifest = read_manifest(version.manifest_path)
    unknown = sorted(set(quarantined) - set(manifest["path"]))
    if unknown:
        raise InvalidDatasetError(
            f"Expected quarantined paths of {version.provenance}. Received: {', '.join(unknown[:5])}, "
            "not in its manifest. Validate this version again."
        )
    usable = manifest.loc[manifest["is_readable"] & ~manifest["path"].isin(list(quarantined))]
    if not (usable["split"] == "train").any():
        raise InvalidDatasetError(
            f"Expected images to train on in {version.provenance}. Received: none that is readable and not "
            f"quarantined ({len(quarantined)} are). Look at the validation report."
        )
    directory = home.absolute() / "packed" / f"{version.provenance.dvc_md5}-{_key(manifest, model, quarantined)}"
    with exclusive(directory.parent / f".{directory.name}.lock"):
        facts = _intact(directory) or _pack(version, model, usable, directory, spare_bytes)
    task = Task(
        image_size=model.image_size,
        preprocessing_hash=images.preprocessing_hash(model.image_size, framing=model.resize),
        class_names=model.classes,
        classifier_type=model.classifier_type,
    )
    # Another tag of the same images shares the pack.
    return PackedImages(provenance=version.provenance, task=task, directory=directory, **facts)


def open_split(packed: PackedImages, split: str, *, beside: TrainedModel | None = None) -> PackedSplit:
    """Opens one split without reading its pixels.

    Args:
        packed: the pack.
        split: train, valid, test or reference.
        beside: a model that must have been trained with this pack; with another, splits may overlap.

    Raises:
        VerdictError: the model was trained with another pack.
        DatasetError: the pack is incomplete; materialising packed_images makes it again.
    """
    if beside is not None and beside.pack != packed.directory.name:
        raise VerdictError(
            f"Expected the packed images {beside.pack}, whose training split the model has seen. "
            f"Received: {packed.directory.name}. Materialise model, then this asset."
        )
    if split not in SPLITS:
        raise ValueError(f"Expected one of {', '.join(SPLITS)}. Received: {split!r}.")
    task, count = packed.task, packed.counts.get(split, 0)
    target_shape = (count,) if task.classifier_type == "multi-class" else (count, len(task.class_names))
    try:
        pixels = _open_array(packed.directory / f"{split}.images.npy", count)
        targets = _open_array(packed.directory / f"{split}.targets.npy", count)
        rows = pq.read_table(packed.directory / f"{split}.rows.parquet")
    except (OSError, ValueError, pa.ArrowException) as err:
        raise DatasetError(
            f"Expected a pack at {packed.directory}. Received: {err}. Materialise packed_images again."
        ) from err
    expected = ((count, *task.image_size, 3), target_shape, count)
    if (pixels.shape, targets.shape, rows.num_rows) != expected:
        raise DatasetError(
            f"Expected shapes and rows {expected} in {packed.directory}. Received: {pixels.shape}, {targets.shape}, "
            f"{rows.num_rows}. Materialise packed_images again."
        )
    return PackedSplit(pixels, targets, rows["path"].to_pylist(), rows["sha256"].to_pylist())


def _open_array(path: Path, count: int) -> np.ndarray:
    array = np.load(path, mmap_mode="r" if count else None)  # An empty file cannot be mapped everywhere.
    array.flags.writeable = False
    return array


def _key(manifest: pd.DataFrame, model: ModelConfig, quarantined: Collection[str]) -> str:
    """Returns 16 hex digits that change with every pixel, target or row of the pack."""
    digest = hashlib.sha256()
    preprocessing = images.preprocessing_hash(model.image_size, framing=model.resize)
    config = [PACK_FORMAT, preprocessing, model.classes, model.classifier_type]
    digest.update(json.dumps(config).encode())
    columns = [manifest[name].tolist() for name in ("path", "sha256", "split", "labels", "is_readable")]
    for row in zip(*columns, strict=True):
        digest.update(json.dumps(row).encode())
    digest.update(json.dumps(sorted(set(quarantined))).encode())
    return digest.hexdigest()[:16]


def _intact(directory: Path) -> dict[str, Any] | None:
    """Returns the facts of the pack at `directory` if it has exactly the files that were written."""
    try:
        marker = json.loads((directory / _MARKER).read_bytes())
        facts = {name: marker["packed"][name] for name in _FACTS}
        for name, (size, sha256) in marker["files"].items():
            if (directory / name).stat().st_size != size or file_sha256(directory / name) != sha256:
                logger.warning("%s in %s is damaged; packing again", name, directory)
                return None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
        logger.warning("The pack %s is unreadable (%s); packing again", directory, err)
        return None
    return facts


def _pack(
    version: DatasetVersion, model: ModelConfig, usable: pd.DataFrame, directory: Path, spare_bytes: int | None
) -> dict[str, Any]:
    """Makes the pack and returns its facts, which stand in its marker too."""
    height, width = model.image_size
    directory.parent.mkdir(parents=True, exist_ok=True)
    needed = len(usable) * (height * width * 3 + 4 * len(model.classes) + 256)
    purpose = f"the decoded images of {version.provenance.ds_name}"
    require_free_space(directory.parent, needed, purpose=purpose, spare_bytes=spare_bytes)
    started = time.perf_counter()
    with whole_directory(directory) as partial, ThreadPoolExecutor(_DECODERS) as pool:
        files: dict[str, tuple[int, str]] = {}
        for split in SPLITS:
            rows = usable.loc[usable["split"] == split]
            targets = _targets(rows["labels"].tolist(), model)
            pixels = _decoded(version, rows, model, pool)
            shape = (len(rows), height, width, 3)
            files |= _write_array(partial / f"{split}.images.npy", shape, np.dtype(np.uint8), pixels)
            files |= _write_array(partial / f"{split}.targets.npy", targets.shape, targets.dtype, iter([targets]))
            table = pa.table({"path": rows["path"].tolist(), "sha256": rows["sha256"].tolist()}, schema=_ROWS)
            files |= _write(partial / f"{split}.rows.parquet", lambda path, table=table: pq.write_table(table, path))
        seconds = time.perf_counter() - started
        counts = Counter(usable["split"])
        facts: dict[str, Any] = {
            "counts": {split: counts[split] for split in SPLITS},
            "bytes": sum(size for size, _ in files.values()),
            "images_per_second": len(usable) / max(seconds, 1e-9),
        }
        marker = json.dumps({"files": files, "packed": facts})
        _write(partial / _MARKER, lambda path: path.write_text(marker, encoding="utf-8"))
    logger.info("Packed %d images at %.0f per second into %s", len(usable), facts["images_per_second"], directory)
    return facts


_ROWS = pa.schema([("path", pa.string()), ("sha256", pa.string())])


def _targets(labels: list[list[str]], model: ModelConfig) -> np.ndarray:
    index = {name: at for at, name in enumerate(model.classes)}
    if model.classifier_type == "multi-class":
        return np.array([index[names[0]] for names in labels], dtype=np.int64)
    targets = np.zeros((len(labels), len(model.classes)), dtype=np.float32)
    for row, names in enumerate(labels):
        targets[row, [index[name] for name in names]] = 1.0
    return targets


def _decoded(
    version: DatasetVersion, rows: pd.DataFrame, model: ModelConfig, pool: ThreadPoolExecutor
) -> Iterator[np.ndarray]:
    """Yields `(n, H, W, 3)` uint8 chunks in order; memory stays at one chunk."""

    def decode(path: str, sha256: str) -> np.ndarray:
        try:
            data = (version.directory / path).read_bytes()
        except OSError as err:
            raise InvalidDatasetError(f"Expected {path}. Received: {err}. Materialise the dataset again.") from err
        if hashlib.sha256(data).hexdigest() != sha256:
            raise InvalidDatasetError(
                f"Expected {path} in {version.directory} as the manifest describes it. Received: other bytes. "
                "Materialise the dataset again."
            )
        try:
            # The manifest has judged its size, by the config's limit.
            limit = images.MAX_LOCAL_PIXELS
            return images.preprocess(data, model.image_size, max_pixels=limit, framing=model.resize)
        except ImageError as err:
            raise InvalidDatasetError(f"Expected a readable image at {path}. Received: {err}") from err

    paths, sha256s = rows["path"].tolist(), rows["sha256"].tolist()
    for start in range(0, len(paths), _CHUNK_IMAGES):
        chunk = slice(start, start + _CHUNK_IMAGES)
        yield np.stack(list(pool.map(decode, paths[chunk], sha256s[chunk])))


class _HashingFile:
    """A binary file that knows the sha256 and size of what was written to it."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb")
        self._digest = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> int:
        self._digest.update(data)
        return self._file.write(data)

    def finish(self) -> tuple[int, str]:
        self._file.flush()
        os.fsync(self._file.fileno())
        size = self._file.tell()
        self._file.close()
        return size, self._digest.hexdigest()

    def close(self) -> None:
        self._file.close()


def _write_array(
    path: Path, shape: tuple[int, ...], dtype: np.dtype, chunks: Iterator[np.ndarray]
) -> dict[str, tuple[int, str]]:
    """Writes an `.npy` piece by piece: a full disk is then an error, where a memory map would be a SIGBUS."""
    file = _HashingFile(path)
    try:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for chunk in chunks:
            file.write(np.ascontiguousarray(chunk, dtype=dtype).tobytes())
        return {path.name: file.finish()}
    finally:
        file.close()


def _write(path: Path, write: Callable[[Path], object]) -> dict[str, tuple[int, str]]:
    write(path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {path.name: (path.stat().st_size, file_sha256(path))}
