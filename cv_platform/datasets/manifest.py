"""`manifest.parquet`: what is in a checked-out dataset version, one row per image.

The manifest follows from the images and from the config (classes, classifier type, fractions, seed), so its file name
carries a hash of the latter: experiments that share a checkout do not share a manifest by mistake.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial as partial_of
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cv_platform.compute import map_shards
from cv_platform.compute.engine import DECODING_BYTES, Engine
from cv_platform.config import DatasetConfig, ModelConfig
from cv_platform.datasets.manifest_rows import MANIFEST_SCHEMA, ONE_BY_ONE, Part, describe
from cv_platform.datasets.near_copies import THUMBNAIL_PX, find_near_copies
from cv_platform.datasets.origins import Origin
from cv_platform.datasets.quarantine import judge_duplicates, kind_of
from cv_platform.datasets.sources.entries import ImageEntry
from cv_platform.datasets.sources.label_files import LabelRules
from cv_platform.datasets.sources.layouts import read_layout
from cv_platform.datasets.sources.tree import walk
from cv_platform.datasets.splits import SPLITS, TAKEN, complete_splits
from cv_platform.errors import DatasetError, InvalidDatasetError
from cv_platform.files import whole_file

logger = logging.getLogger(__name__)

MANIFEST_VERSION = 9
_IMAGES_PER_PART = 128
_PARTS_PER_GROUP = 16
"""2,048 images are what is written at a time: 3 MB of rows."""
_SHOWN = 5
_LISTED = pa.schema([MANIFEST_SCHEMA.field(name) for name in ("path", "split", "labels", "unknown_labels", "group")])
_LISTS = ("labels", "unknown_labels")


def manifest_name(model: ModelConfig, dataset: DatasetConfig) -> str:
    """Returns the manifest's file name for a config; it changes with everything that would change a row."""
    config: dict[str, object] = {
        "version": MANIFEST_VERSION,
        "classes": sorted(model.classes),
        "classifier_type": model.classifier_type,
        "fractions": [dataset.valid_fraction, dataset.reference_fraction, dataset.test_fraction],
        "seed": dataset.split_seed,
        "max_image_pixels": dataset.max_image_pixels,
        "quarantine": dataset.quarantine.model_dump(),
    }
    if model.sample_bits is not None:
        config["sample_bits"] = model.sample_bits
    return f"manifest-{hashlib.sha256(json.dumps(config).encode()).hexdigest()[:16]}.parquet"


def build_manifest(
    directory: Path,
    *,
    data_path: str,
    annotations: bytes | None,
    model: ModelConfig,
    dataset: DatasetConfig,
    engine: Engine | None = None,
    origin: Origin | None = None,
) -> Path:
    """Describes the images of a checkout and returns the manifest's path; each file is read once.

    A row is one image, keyed by `path`, ordered by it:

    * `path`: POSIX, relative to `directory`; `sha256` of the file; `bytes`, its size.
    * `split`: train, valid, test or reference, or none of an image that is not used; `split_origin`: `given`, or `taken
      from train` where it was missing; what is taken divides neither groups nor copies nor near-copies.
    * `labels`: class names; exactly one for multi-class. `unknown_labels`: classes of which nobody knows whether it
      shows them; of those in neither it shows none. `group`: what the dataset says the image belongs to.
    * `status`: used, quarantined or refused (see `datasets.quarantine`), and the `reason` why it is not used.
    * `width_px`, `height_px`: of the upright image; of the header, or 0, where it is not readable. `format`; `channels`
      and `bit_depth` of the file; `orientation` of EXIF, 1 to 8: none where it is not readable.
    * `is_readable`, and the `problem` where it is not: such an image is a finding of validation, not an error here.
    * Remarks in words, or none: `damage` that its decoder went on after; that it is `animated`; its colour if it is
      `constant`; the `narrow_range` that its 16-bit samples stay in, where `model.sample_bits` does not say how many
      bits they use, and what of them is `clipped` where it does; its `wrong_suffix`.
    * `largest_sample` of a file of more than 8 bits, see `images.DecodedImage`.
    * The seven statistics of `cv_platform.properties`, of its pixels at 32×32, as validation looks at; NaN where it is
      not readable.
    * `thumbnail`: its 32×32 grey levels, by which near-copies are found; none where it is not readable.

    Rows are written as they are made: memory does not grow with the number of images but by their names and, where
    splits are to be made, by what near-copies are found by.

    Args:
        directory: root of the checkout; the manifest is written into it.
        data_path: folder of the images below it.
        annotations: content of annotations.csv, if the version has one.
        model: classes, classifier type, and how many bits samples use.
        dataset: split fractions and seed.
        engine: who reads and decodes the images; None: processes of this machine.
        origin: where they read the images; None: in `directory`, which all of them see.

    Raises:
        InvalidDatasetError: the classes found are not the configured ones, a class has no images, labels do not fit the
            classifier type, or splits are missing that cannot be taken from train.
    """
    listed = _listed(directory / data_path, annotations, model, dataset)
    path = directory / manifest_name(model, dataset)
    are_given = set(listed["split"].unique().to_pylist()) == set(SPLITS)
    with TemporaryDirectory(dir=directory, prefix=".manifest-") as folder, whole_file(path) as partial:
        inspected = partial if are_given and dataset.quarantine.duplicate == "keep" else Path(folder) / "rows.parquet"
        part = partial_of(Part, classes=frozenset(model.classes), dataset=dataset, sample_bits=model.sample_bits)
        _write(inspected, _rows(listed, origin or Origin(directory), data_path, part, engine))
        if inspected != partial:
            _write(partial, _decided(inspected, dataset, are_given=are_given))
    return path


def _listed(images: Path, annotations: bytes | None, model: ModelConfig, dataset: DatasetConfig) -> pa.Table:
    """Returns the fields of `ImageEntry` of all images: an eighth of the memory that the entries take."""
    layout = read_layout(walk(images), annotations, LabelRules(is_stored=True))
    _check_classes(layout.entries, layout.class_names, model, dataset)
    entries, size = layout.entries, _IMAGES_PER_PART * _PARTS_PER_GROUP
    parts = (entries[start : start + size] for start in range(0, len(entries), size))
    columns = ({name: [getattr(entry, name) for entry in part] for name in _LISTED.names} for part in parts)
    return pa.concat_tables(pa.table(part, schema=_LISTED) for part in columns)


def _rows(
    listed: pa.Table, origin: Origin, data_path: str, make: Callable[..., Part], engine: Engine | None
) -> Iterator[pa.Table]:
    """Yields the rows of all images, a row group at a time."""
    parts = (
        make(
            files=origin.files([f"{data_path}/{path}" for path in part["path"].to_pylist()]),
            entries=tuple(ImageEntry(**row | {name: tuple(row[name]) for name in _LISTS}) for row in part.to_pylist()),
        )
        for part in listed.to_batches(_IMAGES_PER_PART)
    )
    done = map_shards(
        describe,
        parts,
        engine=engine,
        title="Manifest",
        total=len(listed),
        salvage=ONE_BY_ONE,
        task_bytes=DECODING_BYTES,
    )
    while tables := [table for _, table in islice(done, _PARTS_PER_GROUP)]:
        yield pa.concat_tables(tables).combine_chunks()


def _write(path: Path, tables: Iterator[pa.Table]) -> None:
    with pq.ParquetWriter(path, MANIFEST_SCHEMA, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table)


def _decided(inspected: Path, dataset: DatasetConfig, *, are_given: bool) -> Iterator[pa.Table]:
    """Yields the rows with what follows from all of them: copies that are quarantined, and the splits that are made."""
    columns = ["path", "sha256", "split", "labels", "unknown_labels", "group", "status", "split_origin", "reason"]
    frame = _frame(pq.read_table(inspected, columns=columns))
    copies = judge_duplicates(frame.loc[frame["status"] == "used"], dataset.quarantine)
    if copies:
        is_copy = frame["path"].isin(list(copies)).to_numpy()
        frame.loc[is_copy, ["status", "reason"]] = [copies[path] for path in frame.loc[is_copy, "path"]]
        frame.loc[is_copy, ["split", "split_origin"]] = None
    is_used = (frame["status"] == "used").to_numpy()
    used = frame.loc[is_used]
    if not are_given:
        splits, origins = complete_splits(
            used["split"].tolist(),
            _inseparable(used, _thumbnails(inspected)[is_used]),
            used["labels"].tolist(),
            dataset,
            by_size=bool(used["group"].notna().any()),
        )
        taken = Counter(split for split, origin in zip(splits, origins, strict=True) if origin == TAKEN)
        logger.info("Taken from train with seed %d: %s", dataset.split_seed, dict(taken))
        frame.loc[is_used, "split"], frame.loc[is_used, "split_origin"] = splits, origins
    start = 0
    with pq.ParquetFile(inspected) as file:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group)
            part = frame.iloc[start : start + len(table)]
            for name in ("split", "split_origin", "status", "reason"):
                values = pa.array([value if isinstance(value, str) else None for value in part[name]], pa.string())
                table = table.set_column(table.schema.get_field_index(name), name, values)
            start += len(table)
            yield table


def is_manifest(path: Path) -> bool:
    """Tells whether a complete manifest lies at `path`."""
    try:
        return pq.read_schema(path).equals(MANIFEST_SCHEMA)
    except (OSError, pa.ArrowException):
        return False


def read_manifest(path: Path) -> pd.DataFrame:
    """Reads a manifest: one row per image, in the order of `path`; labels are lists, `problem` strings or None.

    The thumbnails are left out, see `read_thumbnails`.

    Raises:
        DatasetError: there is no manifest at `path`.
    """
    return _frame(_read(path, [name for name in MANIFEST_SCHEMA.names if name != "thumbnail"]))


def manifest_parts(path: Path, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Yields columns of a manifest, some thousand rows at a time, for what need not have all of them in memory.

    Raises:
        DatasetError: there is no manifest at `path`.
    """
    try:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                yield file.read_row_group(group, columns=list(columns), use_threads=False).select(columns)
    except (OSError, KeyError, pa.ArrowException) as err:
        raise _unreadable(path, err) from err


def _frame(table: pa.Table) -> pd.DataFrame:
    frame = table.drop_columns(list(_LISTS)).to_pandas()
    # Python lists, where pandas would give arrays that compare element-wise.
    for name in _LISTS:
        lists = pd.Series([value or [] for value in table[name].to_pylist()], dtype=object)
        frame.insert(table.schema.get_field_index(name), name, lists)
    return frame


def read_thumbnails(path: Path) -> NDArray[np.uint8]:
    """Reads `(N, 32, 32)` uint8 grey levels of a manifest's images, zeros of those that are not readable.

    Raises:
        DatasetError: there is no manifest at `path`.
    """
    return _filled(_read(path, ["thumbnail"]))


def _thumbnails(inspected: Path) -> NDArray[np.uint8]:
    return _filled(pq.read_table(inspected, columns=["thumbnail"]))


def _filled(table: pa.Table) -> NDArray[np.uint8]:
    """Returns the column of thumbnails in one piece, zeros where there is none."""
    pixels = np.zeros((len(table), THUMBNAIL_PX**2), np.uint8)
    start = 0
    for chunk in table["thumbnail"].chunks:
        values = b"".join(chunk.fill_null(bytes(THUMBNAIL_PX**2)).to_pylist())
        pixels[start : start + len(chunk)] = np.frombuffer(values, np.uint8).reshape(len(chunk), -1)
        start += len(chunk)
    return pixels.reshape(-1, THUMBNAIL_PX, THUMBNAIL_PX)


def _read(path: Path, columns: list[str]) -> pa.Table:
    try:
        return pq.read_table(path, schema=MANIFEST_SCHEMA, columns=columns)
    except (OSError, pa.ArrowException) as err:
        raise _unreadable(path, err) from err


def _unreadable(path: Path, err: Exception) -> DatasetError:
    return DatasetError(f"Expected a manifest at {path}. Received: {err}. Materialise the dataset again.")


def _inseparable(used: pd.DataFrame, thumbnails: NDArray[np.uint8]) -> list[str]:
    """Returns for each image what it shares with its group, copies and near-copies: the smallest sha256 of them."""
    contents, distinct = pd.factorize(used["sha256"])
    first = np.unique(contents, return_index=True)[1]
    sets = find_near_copies(thumbnails[first]).sets(len(distinct))[contents]
    if bool(used["group"].notna().any()):
        sets = _joined(sets, pd.factorize(used["group"])[0])
    smallest = used["sha256"].groupby(sets).min()
    return smallest.loc[sets].tolist()


def _joined(sets: NDArray[np.int64], groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns `(N,)`: sets that have a group in common are one; group −1 is none."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    in_group = groups >= 0
    count = int(sets.max()) + 1
    edges = (sets[in_group], count + groups[in_group])
    nodes = count + int(groups.max()) + 1
    graph = coo_array((np.ones(len(edges[0]), np.int8), edges), shape=(nodes, nodes))
    return np.asarray(connected_components(graph, directed=False)[1], dtype=np.int64)[sets]


def _check_classes(
    entries: tuple[ImageEntry, ...], found: tuple[str, ...], model: ModelConfig, dataset: DatasetConfig
) -> None:
    name = f"{dataset.ds_name} {dataset.dvc_tag}"
    used = Counter(label for entry in entries for label in entry.labels)
    unknown = sorted(set(found) - set(model.classes))
    without = [label for label in model.classes if not used[label]]
    mistakes = []
    if unknown and dataset.quarantine.unknown_class == "fail":
        mistakes.append(f"classes that model.classes does not name: {', '.join(unknown)}")
    if without:
        mistakes.append(f"no images of: {', '.join(without)}")
    if model.classifier_type == "multi-class":
        wrong = [entry for entry in entries if len(entry.labels) != 1 and not set(entry.labels) & set(unknown)]
        if wrong:
            shown = ", ".join(f"{entry.path} ({'|'.join(entry.labels) or 'none'})" for entry in wrong[:_SHOWN])
            mistakes.append(f"{len(wrong)} images without exactly one label: {shown} (multi-label has several)")
        if is_open := [entry.path for entry in entries if entry.unknown_labels]:
            mistakes.append(
                f"{len(is_open)} images with unknown labels, such as {is_open[0]}, which only multi-label can leave "
                "out (model.classifier_type; or import them again with --unknown negative)"
            )
    if mistakes:
        raise InvalidDatasetError(
            f"{name}: expected images of exactly the classes {', '.join(model.classes)}. "
            f"Received: {'; '.join(mistakes)}. Found: {', '.join(found)}. "
            "Change model.classes, or import a corrected version; dataset.quarantine.unknown_class: quarantine leaves "
            "out images of other classes."
        )


@dataclass(frozen=True)
class ManifestCounts:
    """What a manifest comes to.

    Attributes:
        images: all rows.
        unreadable: of them, those that do not decode.
        splits: images of each, in the order train, valid, test, reference.
        origins: of the splits, see `build_manifest`.
        classes: images of each class, by split.
        unknown: images of which nobody knows whether they show a class, likewise; empty: all labels are known.
        kinds: images that are not used, by the kind that their reason begins with; the most frequent first.
        examples: the first path of each kind.
    """

    images: int
    unreadable: int
    splits: dict[str, int]
    origins: dict[str, str]
    classes: dict[str, dict[str, int]]
    unknown: dict[str, dict[str, int]]
    kinds: dict[str, int]
    examples: dict[str, str]


def count_manifest(path: Path) -> ManifestCounts:
    """Counts a manifest's rows, some thousand of them in memory at a time.

    Raises:
        DatasetError: there is no manifest at `path`.
    """
    images, unreadable = 0, 0
    kinds, splits = Counter[str](), dict.fromkeys(SPLITS, 0)
    pairs, doubts = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    origins, examples = dict[str, str](), dict[str, str]()
    wanted = ("path", "split", "split_origin", "labels", "unknown_labels", "reason", "is_readable")
    for part in manifest_parts(path, wanted):
        columns = map(pa.ChunkedArray.to_pylist, part.columns)
        for name, split, origin, labels, unknown, reason, is_readable in zip(*columns, strict=True):
            images, unreadable = images + 1, unreadable + (not is_readable)
            if split is None:
                kinds[kind_of(reason)] += 1
                examples.setdefault(kind_of(reason), name)
                continue
            splits[split] += 1
            origins.setdefault(split, origin)
            pairs.update((label, split) for label in labels)
            doubts.update((label, split) for label in unknown or ())
    classes, unknown_labels = (
        {name: {split: found[name, split] for split in SPLITS} for name in sorted({name for name, _ in found})}
        for found in (pairs, doubts)
    )
    counted = (images, unreadable, splits, origins, classes, unknown_labels)
    return ManifestCounts(*counted, dict(kinds.most_common()), examples)
