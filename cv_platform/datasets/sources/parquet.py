"""Takes images out of Parquet files, as Hugging Face keeps them: a column of bytes, a column of labels.

https://huggingface.co/docs/hub/datasets-image#parquet-format
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cv_platform.datasets.sources.entries import UNLABELLED, split_of
from cv_platform.datasets.sources.label_files import LABEL_COLUMNS
from cv_platform.datasets.sources.tree import Folder
from cv_platform.errors import InvalidDatasetError
from cv_platform.files import SPARE_BYTES, free_bytes
from cv_platform.images.files import format_by_signature
from cv_platform.predictions import LABEL_SEPARATOR

SUFFIX = ".parquet"
_BATCH_ROWS = 64
_NO_LABEL: str = min(UNLABELLED)
_MAX_GROUP_BYTES = 8 * 2**30
_SHARD = re.compile(r"-\d{5}-of-\d{5}.*$")


def parquet_files(root: Folder) -> list[Path]:
    """Returns the Parquet files of a source that holds no other images."""
    found = [folder.path / name for folder in root.below() for name in folder.files if name.lower().endswith(SUFFIX)]
    return sorted(found) if found and not root.has_images else []


def unpack_parquet(files: Sequence[Path], into: Path, *, root: Path) -> None:
    """Writes the images of Parquet files below the empty folder `into`, with an `annotations.csv`.

    Args:
        files: named as their splits (`train-00000-of-00002.parquet`), or in folders that are.
        into: gets `<name>/<row>.<suffix>`; the names that the rows give are not used, as they may lead anywhere.
        root: of the source.

    Raises:
        InvalidDatasetError: there is no column of images or labels, or several; a file is damaged; a row has no bytes;
            or the images are more than the disk takes.
    """
    left = free_bytes(into) - SPARE_BYTES
    rows: list[tuple[str, str, str]] = []
    for file in files:
        name = file.relative_to(root).with_suffix("").as_posix().replace("/", "-")
        split = split_of(_SHARD.sub("", file.stem)) or split_of(file.parent.name) or ""
        (into / name).mkdir()
        try:
            for row, (data, label) in enumerate(_read(file)):
                left -= len(data)
                if left < 0:
                    raise InvalidDatasetError(
                        f"Expected images that the disk takes in {root}. Received: more. Free some space."
                    )
                path = into / name / f"{row:07}.{(format_by_signature(data) or 'bin').lower()}"
                path.write_bytes(data)
                rows.append((path.relative_to(into).as_posix(), split, label))
        except (pa.ArrowException, OSError) as err:
            raise InvalidDatasetError(f"Expected a whole Parquet file at {file}. Received: {err}. Copy it.") from err
    has_splits = all(split for _, split, _ in rows)
    with (into / "annotations.csv").open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["path", "split", "label"] if has_splits else ["path", "label"])
        writer.writerows((path, split, label) if has_splits else (path, label) for path, split, label in rows)


def _read(file: Path) -> Iterator[tuple[bytes, str]]:
    """Yields the bytes and the labels, joined by a bar, of each row."""
    with pq.ParquetFile(file) as parquet:
        image, label, names = _columns(file, parquet.schema_arrow)
        known: dict[Any, str] | None = None
        if names is not None:
            known = {**{name: name for name in names}, **dict(enumerate(names)), -1: _NO_LABEL, None: _NO_LABEL}
        for group in range(parquet.num_row_groups):
            if (size := parquet.metadata.row_group(group).total_byte_size) > _MAX_GROUP_BYTES:
                raise InvalidDatasetError(
                    f"Expected row groups of at most {_MAX_GROUP_BYTES / 1e9:.0f} GB in {file}. "
                    f"Received: one of {size / 1e9:.0f} GB. Write the file again with smaller ones."
                )
        for batch in parquet.iter_batches(_BATCH_ROWS, columns=[image, label]):
            for cell, value in zip(batch[image].to_pylist(), batch[label].to_pylist(), strict=True):
                data = cell.get("bytes") if isinstance(cell, dict) else cell
                if not isinstance(data, bytes):
                    raise InvalidDatasetError(
                        f"Expected the bytes of each image in the column {image} of {file}. Received: none in a row "
                        "(a path alone, say). Write the data set with its files embedded."
                    )
                yield data, _label(value, known, file)


def _label(value: Any, known: Mapping[Any, str] | None, file: Path) -> str:
    """Returns the labels of a row; `known` has them by name and number, where the file names its numbers."""
    values: list[Any] = value if isinstance(value, list) else [value]
    # pandas writes NaN for none, and the numbers beside it as floats.
    values = [None if one is None or one != one else one for one in values]
    if known is not None and any(isinstance(one, dict | list) or one not in known for one in values):
        names = [name for name in known if isinstance(name, str)]
        raise InvalidDatasetError(
            f"Expected the labels {', '.join(names[:5])} ({len(names)} names), or their numbers, in {file}. "
            f"Received: {str(value)[:80]}. Write the data set again."
        )
    labels = ["" if one is None else str(one) for one in values] if known is None else [known[one] for one in values]
    if wrong := [label for label in labels if LABEL_SEPARATOR in label]:
        raise InvalidDatasetError(f"Expected labels without {LABEL_SEPARATOR!r} in {file}. Received: {wrong[0]}.")
    return LABEL_SEPARATOR.join(labels)


def _columns(file: Path, schema: pa.Schema) -> tuple[str, str, tuple[str, ...] | None]:
    """Returns the columns of images and labels, and the labels' names where these are numbers."""
    features: Any = {}
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):
        features = {}
    images = [
        column.name
        for column in schema
        if pa.types.is_binary(column.type)
        or pa.types.is_large_binary(column.type)
        or (pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0)
    ]
    pairs = features.items() if isinstance(features, dict) else ()
    named = {name: found for name, feature in pairs if (found := _names(feature)) is not None}
    usual = [name for name in schema.names if name.lower() in LABEL_COLUMNS]
    labels = usual[:1] or list(named)
    if len(images) != 1 or len(labels) != 1:
        raise InvalidDatasetError(
            f"Expected one column of images (with their bytes) and one called label in {file}. Received: images "
            f"{', '.join(images) or 'none'}, labels {', '.join(labels) or 'none'}, of {', '.join(schema.names)}. "
            "Rename or drop columns."
        )
    return images[0], labels[0], named.get(labels[0])


def _names(feature: Any) -> tuple[str, ...] | None:
    if isinstance(feature, list) and feature:
        feature = feature[0]
    while isinstance(feature, dict) and feature.get("_type") in {"Sequence", "List"}:
        feature = feature.get("feature")
    if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and isinstance(feature.get("names"), list):
        return tuple(map(str, feature["names"]))
    return None
