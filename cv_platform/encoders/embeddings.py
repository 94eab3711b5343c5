"""The vectors of image files, each computed once: the same bytes have the same vector in every data version.

`home/cache/embeddings/<encoder's key>/` holds Parquet files that are only ever added, of `sha256` and `vector`
(float16). A run that is killed keeps the files that it wrote, and of two runs at once one computes in vain, which does
no harm.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cv_platform.encoders.encoder import Encoder
from cv_platform.files import whole_file

logger = logging.getLogger(__name__)

_FILE_IMAGES = 4096
"""Of one file, and the most that a killed run loses."""


def embed_files(
    sha256: Sequence[str], read: Callable[[int], NDArray[np.uint8] | None], encoder: Encoder, home: Path
) -> NDArray[np.float16]:
    """Returns the vectors of image files, and computes those that no earlier call has.

    Args:
        sha256: of each file.
        read: returns the pixels of the file at a position of `sha256`, as `Encoder.embed_all` takes them; None where it
            has none.
        encoder: what computes the vectors.
        home: they are kept in `home/cache/embeddings`.

    Returns:
        `(N, features)` float16, in the order of `sha256`; NaN where a file has no pixels, which is asked again.
    """
    folder = home / "cache" / "embeddings" / encoder.key
    folder.mkdir(parents=True, exist_ok=True)
    positions = dict(zip(reversed(sha256), range(len(sha256) - 1, -1, -1), strict=True))  # The first of copies.
    vectors = np.empty((len(sha256), encoder.features), np.float16)
    missing = dict(positions)
    for path in sorted(folder.glob("*.parquet")):
        for names, values in _read(path, encoder.features):
            for row, name in enumerate(names):
                if (at := missing.pop(name, None)) is not None:
                    vectors[at] = values[row]
    started, todo = time.perf_counter(), sorted(missing.values())
    without: set[int] = set()

    def pixels(at: int) -> NDArray[np.uint8]:
        if (image := read(at)) is None:
            without.add(at)
            return np.zeros((encoder.input_px, encoder.input_px, 3), np.uint8)
        return image

    for start in range(0, len(todo), _FILE_IMAGES):
        part = todo[start : start + _FILE_IMAGES]
        vectors[part] = np.concatenate(list(encoder.embed_all(part, pixels)))
        vectors[list(without)] = np.nan
        if known := [at for at in part if at not in without]:
            _write(folder, [sha256[at] for at in known], vectors[known])
    if todo:
        seconds = time.perf_counter() - started
        logger.info("embedded %d images in %.1f s; %d were known", len(todo), seconds, len(positions) - len(todo))
    return vectors[[positions[name] for name in sha256]]


def _read(path: Path, features: int) -> Iterator[tuple[list[str], NDArray[np.float16]]]:
    """Yields `sha256` and `(N, features)` float16 of a file, a row group at a time; a damaged file is as none."""
    try:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group)
                values = table["vector"].combine_chunks().flatten().to_numpy()
                yield table["sha256"].to_pylist(), values.reshape(table.num_rows, features)
    except (OSError, ValueError, KeyError, pa.ArrowException) as err:
        logger.warning("Embeddings in %s are unreadable (%s): they are computed again", path, err)


def _write(folder: Path, sha256: list[str], vectors: NDArray[np.float16]) -> None:
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    with whole_file(folder / f"{time.time_ns()}-{secrets.token_hex(4)}.parquet") as partial:
        pq.write_table(pa.table({"sha256": sha256, "vector": column}), partial)
