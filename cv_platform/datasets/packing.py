"""Decodes every usable image once, into shards of pixels that training, evaluation and drift read in order.

A pack is keyed by data version, preprocessing, manifest and quarantine, never changes, and is made again when its files
are not the ones that were written. `shards` says what lies in `home/packed/<md5>-<hash>/`. What an earlier format left
there is made again under the same name: its pixels are the same, and models keep to it.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import logging
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cv_platform.compute.engine import Engine, patiently
from cv_platform.config import DatasetConfig, ModelConfig
from cv_platform.datasets.manifest import manifest_parts
from cv_platform.datasets.manifest_rows import MANIFEST_SCHEMA
from cv_platform.datasets.publishing import Sharing, find_origin
from cv_platform.datasets.shards.pixels import Encoding, PackForm
from cv_platform.datasets.shards.reading import Images, ShardedImages, find_damage, note_verified
from cv_platform.datasets.shards.sharing import (
    absent_shards,
    bring_shards,
    drop_shard,
    is_still_shared,
    publish_pack,
    published_in,
    take_pack,
)
from cv_platform.datasets.shards.writing import Rows, remove_seals, write_shards
from cv_platform.datasets.splits import SPLITS
from cv_platform.errors import (
    ComputeError,
    DatasetError,
    DiskSpaceError,
    InvalidDatasetError,
    StorageError,
    VerdictError,
)
from cv_platform.files import exclusive, file_sha256, require_free_space, sync_file, whole_directory
from cv_platform.images import Preprocessing
from cv_platform.records import DatasetVersion, PackedImages, Task, TrainedModel
from cv_platform.settings import home_here

logger = logging.getLogger(__name__)

PACK_FORMAT = 2
_MARKER = "packed.json"
_FACTS = ("counts", "bytes", "images_per_second")
"""In the marker, beside the checksums: what cannot be told from dataset version and config."""
_JPEG_SHARE = 0.3
"""Of uint8, that JPEGs take at most: noise at quality 90 takes more, photographs a fifth."""
_UINT8_BUDGET_BYTES = DatasetConfig.model_fields["packed_uint8_bytes"].default
_REMEDY = "Materialise packed_images again."


@dataclass(frozen=True)
class PackedSplit:
    """One split of a pack; row i of everything is the same image, and rows are ordered by path.

    Attributes:
        images: `(N, H, W, 3)` uint8 RGB, as the model sees them, read from the shards as they are asked for.
        targets: `(N,)` int64 class indices, or `(N, C)` float32 of 0 and 1 for multi-label, NaN where nobody knows: see
            `predictions.known_labels`.
        paths: POSIX, as in the manifest.
        sha256: of the image files.
        larger: the same, as they were packed by a `train.pack_scale` above 1; None: `images` are all there is.
    """

    images: Images
    targets: np.ndarray
    paths: list[str]
    sha256: list[str]
    larger: Images | None = None

    @property
    def stored(self) -> Images:
        """What training takes its parts from: the larger images, where there are some."""
        return self.images if self.larger is None else self.larger

    def batches(self, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields `(images, targets)` in order, the last batch possibly smaller; the arrays are read-only views."""
        if batch_size < 1:
            raise ValueError(f"Expected a batch size of at least 1. Received: {batch_size}.")
        for start in range(0, len(self.targets), batch_size):
            rows = slice(start, start + batch_size)
            yield np.asarray(self.images[rows]), np.asarray(self.targets[rows])


def pack_forms(model: ModelConfig, pack_scale: float = 1.0) -> dict[str, PackForm]:
    """Returns the form of the pixels of each split: training images may be larger than what the model sees."""
    seen = PackForm(model.image_size, Preprocessing.of(model))
    height, width = (round(side * pack_scale) for side in model.image_size)
    return dict.fromkeys(SPLITS, seen) | {"train": replace(seen, image_size=(height, width))}


def pack_images(
    version: DatasetVersion,
    model: ModelConfig,
    *,
    quarantined: Collection[str],
    home: Path,
    spare_bytes: int | None = None,
    uint8_budget_bytes: int = _UINT8_BUDGET_BYTES,
    engine: Engine | None = None,
    pack_scale: float = 1.0,
    sharing: Sharing | None = None,
) -> PackedImages:
    """Decodes the readable images that are not quarantined, or returns the pack that has them already.

    A pack that central storage has is taken from there, its shards when they are first used.

    Args:
        version: the checkout.
        model: image size, classes and classifier type.
        quarantined: paths of the manifest that validation keeps out.
        home: the pack is made in `home/packed`.
        spare_bytes: see `files.require_free_space`.
        uint8_budget_bytes: a larger training split is kept as JPEG; what judges a model stays as the service sees it.
        engine: who decodes; None: processes of this machine.
        pack_scale: of the training split, see `train.pack_scale`; what judges a model stays as the service sees it.
        sharing: central storage, that gives and gets packs, and has the images for machines that do not see the
            checkout; None: packs are this installation's own, and such machines are refused.

    Raises:
        InvalidDatasetError: nothing is left to train on, quarantined paths are not in the manifest, or a file is not
            the one that the manifest describes.
        DiskSpaceError: there is not enough disk space.
        ShardError: an image ends each process that decodes it; the next call goes on with all other shards.
        StorageError: packs are shared, and central storage cannot be reached or written.
        ComputeError: see `publishing.find_origin`.
    """
    usable = _usable(version, quarantined)
    forms = pack_forms(model, pack_scale)
    is_large = len(usable["train"]) * forms["train"].bytes > uint8_budget_bytes
    encodings: dict[str, Encoding] = dict.fromkeys(SPLITS, "uint8")
    if is_large:
        encodings["train"] = "jpeg"
    key = _key(version.manifest_path, model, forms, quarantined, encodings)
    directory = home.absolute() / "packed" / f"{version.provenance.dvc_md5}-{key}"
    with exclusive(directory.parent / f".{directory.name}.lock"):
        facts = patiently(f"The look at {key}", _intact, directory)
        if not facts and sharing and patiently(f"The search for {key}", take_pack, directory, sharing.url):
            facts = _intact(directory)
        facts = facts or _pack(version, model, usable, (forms, encodings), directory, spare_bytes, engine, sharing)
        if sharing:
            publish_pack(directory, [*_read_marker(directory)["files"], _MARKER], sharing.url)
    task = Task(
        image_size=model.image_size,
        preprocessing_hash=forms["test"].preprocessing_hash,
        class_names=model.classes,
        classifier_type=model.classifier_type,
    )
    # Another tag of the same images shares the pack.
    return PackedImages(provenance=version.provenance, task=task, directory=directory, pack_scale=pack_scale, **facts)


def open_split(packed: PackedImages, split: str, *, beside: TrainedModel | None = None) -> PackedSplit:
    """Opens one split without reading its pixels.

    Args:
        packed: the pack.
        split: train, valid, test or reference.
        beside: a model that must have been trained with this pack; with another, splits may overlap.

    Raises:
        VerdictError: the model was trained with another pack.
        DatasetError: the pack is incomplete, and materialising packed_images makes it again; or it was taken from
            central storage, which cannot be reached or has other bytes.
    """
    if beside is not None and beside.pack != packed.directory.name:
        raise VerdictError(
            f"Expected the packed images {beside.pack}, whose training split the model has seen. "
            f"Received: {packed.directory.name}. Materialise model, then this asset."
        )
    if split not in SPLITS:
        raise ValueError(f"Expected one of {', '.join(SPLITS)}. Received: {split!r}.")
    task, count, directory = packed.task, packed.counts.get(split, 0), packed.directory
    try:
        marker = _read_marker(directory)
        files = {name: entry for name, entry in marker["files"].items() if name.startswith((f"{split}.", f"{split}-"))}
        bring_shards(directory, files)
        if damaged := find_damage(directory, files):
            drop_shard(directory, damaged)
            raise ValueError(f"{damaged} is not the file that was written")
        rows = pq.read_table(directory / f"{split}.rows.parquet")
        shards = marker["shards"][split]
        larger = tuple(marker.get("larger", {}).get(split, ()))
        stored = (
            [directory / shard["file"] for shard in shards],
            [shard["images"] for shard in shards],
            larger or tuple(marker["shape"]),
            rows["bytes"].to_numpy() if marker["encodings"][split] == "jpeg" else None,
        )
        source = PackSource(directory, split, published_in(directory), packed)
        pixels = ShardedImages(*stored, seen_as=task.image_size if larger else None, reopened=(open_images, source))
        targets = np.load(directory / f"{split}.targets.npy")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as err:
        raise DatasetError(f"Expected a pack at {directory}. Received: {err}. {_REMEDY}") from err
    targets.flags.writeable = False
    target_shape = (count,) if task.classifier_type == "multi-class" else (count, len(task.class_names))
    expected = ((count, *task.image_size, 3), target_shape, count)
    if (pixels.shape, targets.shape, rows.num_rows) != expected:
        raise DatasetError(
            f"Expected shapes and rows {expected} in {directory}. Received: {pixels.shape}, {targets.shape}, "
            f"{rows.num_rows}. {_REMEDY}"
        )
    paths, sha256 = rows["path"].to_pylist(), rows["sha256"].to_pylist()
    return PackedSplit(pixels, targets, paths, sha256, ShardedImages(*stored) if larger else None)


@dataclass(frozen=True)
class PackSource:
    """Where another process finds the images of a split.

    Attributes:
        directory: of the pack, where this process has it.
        split: see `open_split`.
        shared_in: URL of the central storage that has the pack; None: none has.
        packed: the pack.
    """

    directory: Path
    split: str
    shared_in: str | None
    packed: PackedImages = field(compare=False, repr=False)


@functools.lru_cache(maxsize=2)
def open_images(source: PackSource) -> Images:
    """Opens the images of a split where its pack is, or takes them from central storage into this process's home.

    Raises:
        DatasetError: see `open_split`.
        StorageError: central storage cannot be reached.
    """
    return open_split(pack_here(source.packed, source.shared_in), source.split).images


def pack_here(packed: PackedImages, shared_in: str | None) -> PackedImages:
    """Returns a pack where this process sees it, or takes it from central storage into this process's home.

    Args:
        packed: the pack, where another process has it.
        shared_in: see `PackSource`.

    Raises:
        StorageError: central storage cannot be reached.
    """
    if shared_in is None or packed.directory.is_dir():
        return packed
    directory = home_here(packed.directory.parents[1]) / "packed" / packed.directory.name
    with exclusive(directory.parent / f".{directory.name}.lock"):
        if not _intact(directory):
            take_pack(directory, shared_in)
    return packed.model_copy(update={"directory": directory})


def _usable(version: DatasetVersion, quarantined: Collection[str]) -> dict[str, pa.Table]:
    """Returns `_STORED` of the images that are packed, by split, in a fifth of what Python's objects take."""
    parts: dict[str, list[pa.Table]] = {split: [] for split in SPLITS}
    none = pa.schema([MANIFEST_SCHEMA.field(name) for name in _STORED]).empty_table()
    kept_out, unknown = frozenset(quarantined), set(quarantined)
    for part in manifest_parts(version.manifest_path, _COLUMNS):
        paths, splits, is_readable = (part[name].to_pylist() for name in ("path", "split", "is_readable"))
        unknown.difference_update(paths)
        rows = [at for at, path in enumerate(paths) if is_readable[at] and path not in kept_out]
        for split, of_split in parts.items():
            if of_rows := [at for at in rows if splits[at] == split]:
                of_split.append(part.select(_STORED).take(of_rows))
    if unknown:
        raise InvalidDatasetError(
            f"Expected quarantined paths of {version.provenance}. Received: {', '.join(sorted(unknown)[:5])}, "
            "not in its manifest. Validate this version again."
        )
    usable = {split: pa.concat_tables([none, *of_split]) for split, of_split in parts.items()}
    if not len(usable["train"]):
        raise InvalidDatasetError(
            f"Expected images to train on in {version.provenance}. Received: none that is readable and not "
            f"quarantined ({len(quarantined)} are). Look at the validation report."
        )
    return usable


def _key(
    manifest: Path,
    model: ModelConfig,
    forms: dict[str, PackForm],
    quarantined: Collection[str],
    encodings: dict[str, Encoding],
) -> str:
    """Returns 16 hex digits that change with every pixel, target or row of the pack, and not with how it is stored."""
    digest = hashlib.sha256()
    # The first number was that of the format in the days of format 1.
    config = [1, forms["test"].preprocessing_hash, model.classes, model.classifier_type]
    config += [split for split, encoding in encodings.items() if encoding == "jpeg"]
    config += [list(form.image_size) for form in forms.values() if form != forms["test"]]
    digest.update(json.dumps(config).encode())
    for part in manifest_parts(manifest, _COLUMNS):
        for *row, unknown in zip(*(column.to_pylist() for column in part.columns), strict=True):
            # Where all labels are known, as before there were others: models keep to the names of their packs.
            digest.update(json.dumps([*row, unknown] if unknown else row).encode())
    digest.update(json.dumps(sorted(set(quarantined))).encode())
    return digest.hexdigest()[:16]


def _read_marker(directory: Path) -> dict[str, Any]:
    """Reads a pack's index.

    Raises:
        OSError, ValueError, KeyError: there is none of this format.
    """
    marker: dict[str, Any] = json.loads((directory / _MARKER).read_bytes())
    if (found := marker.get("format", 1)) != PACK_FORMAT:
        raise ValueError(f"one of format {found}, where this release has {PACK_FORMAT}")
    return marker


def _intact(directory: Path) -> dict[str, Any] | None:
    """Returns the facts of the pack at `directory` if it has exactly the files that were written."""
    try:
        marker = _read_marker(directory)
        facts = {name: marker["packed"][name] for name in _FACTS}
        absent = absent_shards(directory, marker["files"])
        if absent and not is_still_shared(directory):
            logger.warning("Central storage has no shards of %s any more; packing again", directory)
            return None
        if damaged := find_damage(directory, {name: it for name, it in marker["files"].items() if name not in absent}):
            logger.warning("%s in %s is damaged; packing again", damaged, directory)
            return None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
        logger.warning("The pack %s is unreadable (%s); packing again", directory, err)
        return None
    return facts


def _pack(
    version: DatasetVersion,
    model: ModelConfig,
    usable: dict[str, pa.Table],
    stored_as: tuple[dict[str, PackForm], dict[str, Encoding]],
    directory: Path,
    spare_bytes: int | None,
    engine: Engine | None,
    sharing: Sharing | None,
) -> dict[str, Any]:
    """Makes the pack and returns its facts, which stand in its marker too."""
    (forms, encodings), started = stored_as, time.perf_counter()
    counts = {split: len(images) for split, images in usable.items()}
    splits = [Rows(split, images, encodings[split], forms[split]) for split, images in usable.items()]
    purpose = f"the decoded images of {version.provenance.ds_name}"
    outlives = ComputeError, StorageError  # They say nothing against the shards that are sealed.
    with _disk_errors(directory, purpose), whole_directory(directory, resumes=True, outlives=outlives) as partial:
        shares = {"uint8": 1.0, "jpeg": _JPEG_SHARE}
        needed = sum(int(len(rows.images) * (rows.form.bytes * shares[rows.encoding] + 256)) for rows in splits)
        needed += 4 * sum(counts.values()) * len(model.classes)
        needed -= sum(path.stat().st_size for path in partial.iterdir())
        require_free_space(directory.parent, max(0, needed), purpose=purpose, spare_bytes=spare_bytes)
        seen_by, provenance = version.manifest_path, version.provenance
        origin = find_origin(version.directory, provenance, seen_by=seen_by, engine=engine, sharing=sharing)
        shards = write_shards(partial, origin, splits, engine=engine)
        files = {shard.file: (shard.bytes, shard.sha256) for of in shards.values() for shard in of}
        for rows in splits:
            targets = _targets(rows.images["labels"], rows.images["unknown_labels"], model)
            files |= _write(partial / f"{rows.split}.targets.npy", lambda path, targets=targets: np.save(path, targets))
            differing = np.fromiter((size for shard in shards[rows.split] for size in shard.sizes), np.int64)
            sizes = differing if len(differing) else np.full(len(rows.images), rows.form.bytes)
            table = pa.table([rows.images["path"], rows.images["sha256"], pa.array(sizes)], schema=_ROWS)
            path = partial / f"{rows.split}.rows.parquet"
            files |= _write(path, lambda path, table=table: pq.write_table(table, path, row_group_size=_ROWS_PER_GROUP))
        remove_seals(partial)
        facts: dict[str, Any] = {
            "counts": counts,
            "bytes": sum(size for size, _ in files.values()),
            "images_per_second": sum(counts.values()) / max(time.perf_counter() - started, 1e-9),
        }
        marker = {
            "format": PACK_FORMAT,
            "shape": forms["test"].shape,
            "larger": {split: form.shape for split, form in forms.items() if form != forms["test"]},
            "encodings": encodings,
            "shards": {s: [{"file": shard.file, "images": shard.images} for shard in of] for s, of in shards.items()},
            "files": files,
            "packed": facts,
        }
        _write(partial / _MARKER, lambda path: path.write_text(json.dumps(marker), encoding="utf-8"))
        note_verified(partial, files)
    total, rate = sum(counts.values()), facts["images_per_second"]
    logger.info("Packed %d images at %.0f per second into %s", total, rate, directory)
    return facts


@contextmanager
def _disk_errors(directory: Path, purpose: str) -> Iterator[None]:
    """Says what to do about a disk that is full in spite of the room that was there before."""
    try:
        yield
    except OSError as err:
        if err.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise
        raise DiskSpaceError(
            f"Expected room at {directory.parent} for {purpose}. Received: {err}. What was written is removed. "
            "Free some space (`cv-platform gc` lists what is not needed), or move CV_HOME to a larger disk."
        ) from err


_COLUMNS = ("path", "sha256", "split", "labels", "is_readable", "unknown_labels")
"""Of the manifest, that a pack follows from."""
_STORED = ("path", "sha256", "labels", "unknown_labels")
"""Of them, what is kept of each image while its split is packed."""
_ROWS_PER_GROUP = 4096
"""Of the table of a split: what is encoded at a time."""
_ROWS = pa.schema([("path", pa.string()), ("sha256", pa.string()), ("bytes", pa.int64())])


def _targets(labels: pa.ChunkedArray, unknown: pa.ChunkedArray, model: ModelConfig) -> np.ndarray:
    index = {name: at for at, name in enumerate(model.classes)}
    of_images = ([index[name] for name in names] for chunk in labels.chunks for names in chunk.to_pylist())
    if model.classifier_type == "multi-class":
        return np.fromiter((classes[0] for classes in of_images), dtype=np.int64, count=len(labels))
    targets = np.zeros((len(labels), len(model.classes)), dtype=np.float32)
    for row, classes in enumerate(of_images):
        targets[row, classes] = 1.0
    for row, names in enumerate(names for chunk in unknown.chunks for names in chunk.to_pylist()):
        targets[row, [index[name] for name in names or () if name in index]] = np.nan
    return targets


def _write(path: Path, write: Callable[[Path], object]) -> dict[str, tuple[int, str]]:
    write(path)
    sync_file(path)
    return {path.name: (path.stat().st_size, file_sha256(path))}
