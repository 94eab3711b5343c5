"""`scores.parquet`, a row group at a time: of millions of images, some bytes each are in memory, and who is chosen.

What its columns are is said in `scoring.rows`, which writes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray


class Answers(NamedTuple):
    """What is kept in memory of each row.

    Attributes:
        is_there: `(N,)` bool, whether the image has an answer.
        digests: `(N,)` uint64, the first 64 bits of its sha256; 0 of one that could not be read.
        confidence: `(N,)` float32, 0 to 1; NaN without an answer.
    """

    is_there: NDArray[np.bool_]
    digests: NDArray[np.uint64]
    confidence: NDArray[np.float32]

    def first_of_copies(self, rows: NDArray[np.intp]) -> NDArray[np.intp]:
        """Returns those of `rows` before which none has the same image, in their order."""
        return rows[np.sort(np.unique(self.digests[rows], return_index=True)[1])]


def read_answers(file: pq.ParquetFile) -> Answers:
    """Returns what there is of each row, without its vectors."""
    parts = [(np.zeros(0, np.bool_), np.zeros(0, np.uint64), np.zeros(0, np.float32))]
    for group in range(file.num_row_groups):
        table = file.read_row_group(group, columns=["sha256", "problem", "confidence"])
        digests = bytes.fromhex("".join((one or "0" * 64)[:16] for one in table["sha256"].to_pylist()))
        confidence = table["confidence"].to_numpy().astype(np.float32)
        parts.append((table["problem"].is_null().to_numpy(), np.frombuffer(digests, np.uint64), confidence))
    return Answers(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def read_rows(file: pq.ParquetFile, rows: NDArray[np.intp], columns: Sequence[str]) -> pa.Table:
    """Returns columns of rows, which ascend."""
    parts, start = [file.schema_arrow.empty_table().select(columns)], 0
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        inside = rows[slice(*np.searchsorted(rows, (start, start + count)))] - start
        if len(inside):
            table = file.read_row_group(group, columns=list(columns)).select(columns)
            parts.append(table.take(pa.array(inside, pa.int64())))
        start += count
    return pa.concat_tables(parts)
