"""The rows of a manifest, made of some images at a time: the work of the processes that describe them.

Imports little, as each of them does it anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from operator import attrgetter

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cv_platform.compute.engine import Salvage, span
from cv_platform.config import DatasetConfig
from cv_platform.datasets.inspection import Inspected, describe_undecoded, inspect_file
from cv_platform.datasets.near_copies import THUMBNAIL_PX
from cv_platform.datasets.origins import Files
from cv_platform.datasets.quarantine import judge
from cv_platform.datasets.sources.entries import ImageEntry
from cv_platform.datasets.splits import GIVEN
from cv_platform.properties import PROPERTY_NAMES, stacked_properties

MANIFEST_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("sha256", pa.string()),
        ("split", pa.string()),
        ("split_origin", pa.string()),
        ("labels", pa.list_(pa.string())),
        ("unknown_labels", pa.list_(pa.string())),
        ("group", pa.string()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("width_px", pa.int32()),
        ("height_px", pa.int32()),
        ("bytes", pa.int64()),
        ("format", pa.string()),
        ("channels", pa.int8()),
        ("bit_depth", pa.int8()),
        ("orientation", pa.int8()),
        ("is_readable", pa.bool_()),
        ("problem", pa.string()),
        ("damage", pa.string()),
        ("animated", pa.string()),
        ("constant", pa.string()),
        ("largest_sample", pa.int32()),
        ("narrow_range", pa.string()),
        ("clipped", pa.string()),
        ("wrong_suffix", pa.string()),
        *((name, pa.float32()) for name in PROPERTY_NAMES),
        ("thumbnail", pa.binary(THUMBNAIL_PX**2)),
    ]
)

_INSPECTED = tuple(one.name for one in fields(Inspected) if one.name in MANIFEST_SCHEMA.names)


@dataclass(frozen=True)
class Part:
    """Some consecutive images: what one process describes at a time."""

    files: Files
    entries: tuple[ImageEntry, ...]
    classes: frozenset[str]
    dataset: DatasetConfig
    sample_bits: int | None = None

    @property
    def name(self) -> str:
        """Its first and its last image."""
        return span(self.entries[0].path, self.entries[-1].path)

    @property
    def images(self) -> int:
        """How many it has."""
        return len(self.entries)

    def table(self, files: Iterable[Inspected]) -> pa.Table:
        """Returns the rows of its images, with the splits that are given."""
        inspected = list(files)
        columns: dict[str, Sequence[object]] = dict(
            zip(_INSPECTED, zip(*map(attrgetter(*_INSPECTED), inspected), strict=True), strict=True)
        )
        judged = [
            judge(file, [label for label in entry.labels if label not in self.classes], self.dataset.quarantine)
            for entry, file in zip(self.entries, inspected, strict=True)
        ]
        columns |= zip(PROPERTY_NAMES, _properties(inspected).T, strict=True)
        is_used = [status == "used" for status, _ in judged]
        columns |= {
            "path": self.files.paths,
            "split": [entry.split if used else None for entry, used in zip(self.entries, is_used, strict=True)],
            "split_origin": [GIVEN if used else None for used in is_used],
            "labels": [entry.labels for entry in self.entries],
            "unknown_labels": [entry.unknown_labels for entry in self.entries],
            "group": [entry.group for entry in self.entries],
            "status": [status for status, _ in judged],
            "reason": [reason for _, reason in judged],
            "is_readable": [file.problem is None for file in inspected],
        }
        return pa.table({name: columns[name] for name in MANIFEST_SCHEMA.names}, schema=MANIFEST_SCHEMA)


def _properties(files: Sequence[Inspected]) -> NDArray[np.float32]:
    """Returns `(N, 7)` of the files, NaN of those that do not decode."""
    properties = np.full((len(files), len(PROPERTY_NAMES)), np.nan, np.float32)
    if known := {at: file.overview for at, file in enumerate(files) if file.overview is not None}:
        properties[list(known)] = stacked_properties(np.stack(list(known.values())))
    return properties


def describe(part: Part) -> pa.Table:
    """Returns the rows of a part's images, each of which is read once.

    Raises:
        InvalidDatasetError, StorageError: a file is not there any more, or cannot be read, see `Files`.
    """
    limit, bits = part.dataset.max_image_pixels, part.sample_bits
    read = zip(part.files.paths, part.files, strict=True)
    return part.table(inspect_file(path, data, limit, bits) for path, data in read)


ONE_BY_ONE = Salvage(
    divide=lambda part: (
        replace(part, files=part.files.only(at), entries=(entry,)) for at, entry in enumerate(part.entries)
    ),
    join=pa.concat_tables,
    lost=lambda part, why: part.table([describe_undecoded(part.files.directory / part.files.paths[0], why)]),
)
