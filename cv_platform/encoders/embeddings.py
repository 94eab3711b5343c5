"""The vectors of image files, each computed once: the same bytes have the same vector in every data version.

`home/cache/embeddings/<encoder's key>/` holds Parquet files that are only ever added, of `sha256` and `vector`
(float16). A run that is killed keeps the files that it wrote, and of two runs at once one computes in vain, which does
no harm.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cv_platform.compute import map_shards
from cv_platform.compute.engine import MOST_LOST, Engine, Salvage, span
from cv_platform.encoders.encoder import BATCH_IMAGES, Encoder
from cv_platform.files import whole_file

logger = logging.getLogger(__name__)

_FILE_IMAGES = 4096
"""Of one file, and the most that a killed run loses."""
_PART_IMAGES = 4 * BATCH_IMAGES


@dataclass(frozen=True)
class Part:
    """Some image files: what one process embeds at a time.

    Attributes:
        name: the first and the last of them.
        contents: the first of them, by its sha256.
        positions: of all of them.
        pixels: of each, as `Encoder.embed` takes them; None of a file that has none. Read by who embeds them.
    """

    name: str
    contents: str
    positions: Sequence[int]
    pixels: Iterable[NDArray[np.uint8] | None]

    @property
    def images(self) -> int:
        """How many files it has."""
        return len(self.positions)


def embed_files(
    sha256: Sequence[str],
    pixels: Callable[[Sequence[int]], Iterable[NDArray[np.uint8] | None]],
    encoder: Encoder,
    home: Path,
    *,
    names: Sequence[str] | None = None,
    engine: Engine | None = None,
) -> NDArray[np.float16]:
    """Returns the vectors of image files, and computes those that no earlier call has.

    What was computed is kept, however this ends.

    Args:
        sha256: of each file.
        pixels: returns what reads the files at positions of `sha256`, see `Part`; pickle has to take it.
        encoder: what computes the vectors.
        home: they are kept in `home/cache/embeddings`.
        names: of each file, such as its path, for who reads the log; None: its sha256.
        engine: who computes; None: processes of this machine.

    Returns:
        `(N, features)` float16, in the order of `sha256`; NaN where a file has no pixels, or ends each process that
        reads it, which is asked again.

    Raises:
        ShardError: more than `MOST_LOST` files have ended each process that read them.
    """
    folder = home / "cache" / "embeddings" / encoder.key
    folder.mkdir(parents=True, exist_ok=True)
    positions = _first_of_copies(sha256)
    vectors, missing = _kept(sha256, encoder, folder)
    started, todo = time.perf_counter(), sorted(missing.values())
    size = min(_PART_IMAGES, _FILE_IMAGES)
    named = names or sha256

    def part_of(part: list[int]) -> Part:
        return Part(span(named[part[0]], named[part[-1]]), sha256[part[0]], part, pixels(part))

    unwritten: list[int] = []

    def write() -> None:
        if known := [at for at in unwritten if not np.isnan(vectors[at, 0])]:
            _write(folder, [sha256[at] for at in known], vectors[known])
        unwritten.clear()

    try:
        for part, made in map_shards(
            partial(embed_part, encoder),
            (part_of(todo[start : start + size]) for start in range(0, len(todo), size)),
            engine=engine,
            title="Embeddings",
            total=len(todo),
            salvage=_one_by_one(part_of, encoder),
        ):
            vectors[part.positions] = made
            unwritten += part.positions
            if len(unwritten) + size > _FILE_IMAGES:
                write()
    finally:
        write()
    if todo:
        seconds = time.perf_counter() - started
        logger.info("embedded %d images in %.1f s; %d were known", len(todo), seconds, len(positions) - len(todo))
    return _with_copies(vectors, sha256, positions)


def kept_vectors(sha256: Sequence[str], encoder: Encoder, home: Path) -> NDArray[np.float16]:
    """Returns `(N, features)` float16 of image files as earlier calls have kept them; NaN of those that none has."""
    vectors, _ = _kept(sha256, encoder, home / "cache" / "embeddings" / encoder.key)
    return _with_copies(vectors, sha256, _first_of_copies(sha256))


def embed_part(encoder: Encoder, part: Part) -> NDArray[np.float16]:
    """Returns `(images, features)` float16 of a part, NaN where a file has no pixels."""
    vectors = np.full((part.images, encoder.features), np.nan, np.float16)
    images = enumerate(part.pixels)
    while batch := list(islice(images, BATCH_IMAGES)):
        if known := [(at, image) for at, image in batch if image is not None]:
            vectors[[at for at, _ in known]] = encoder.embed(np.stack([image for _, image in known]))
    return vectors


def _one_by_one(part_of: Callable[[list[int]], Part], encoder: Encoder) -> Salvage[Part, NDArray[np.float16]]:
    """Returns how a part is saved of which one file ends its process: that has no vector, as one that does not decode.

    Not so for many, of whom the memory is to blame: vectors without them would be taken for all that can be had.
    """

    def lost(part: Part, why: str) -> NDArray[np.float16]:
        logger.warning("%s has no embedding: it %s", part.name, why)
        return np.full((1, encoder.features), np.nan, np.float16)

    return Salvage(lambda part: (part_of([at]) for at in part.positions), np.concatenate, lost, MOST_LOST)


def _first_of_copies(sha256: Sequence[str]) -> dict[str, int]:
    return dict(zip(reversed(sha256), range(len(sha256) - 1, -1, -1), strict=True))


def _with_copies(vectors: NDArray[np.float16], sha256: Sequence[str], positions: dict[str, int]) -> NDArray[np.float16]:
    """Returns the vectors, those of copies filled in: in place, as all of them may be gigabytes."""
    copies = [at for at, name in enumerate(sha256) if positions[name] != at]
    for start in range(0, len(copies), _FILE_IMAGES):
        part = copies[start : start + _FILE_IMAGES]
        vectors[part] = vectors[[positions[sha256[at]] for at in part]]
    return vectors


def _kept(sha256: Sequence[str], encoder: Encoder, folder: Path) -> tuple[NDArray[np.float16], dict[str, int]]:
    """Returns the vectors at the first of copies, NaN elsewhere, and the positions of those that are not kept."""
    vectors = np.full((len(sha256), encoder.features), np.nan, np.float16)
    missing = _first_of_copies(sha256)
    for path in sorted(folder.glob("*.parquet")):
        for names, values in _read(path, encoder.features):
            for row, name in enumerate(names):
                if (at := missing.pop(name, None)) is not None:
                    vectors[at] = values[row]
    return vectors, missing


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
        pq.write_table(pa.table({"sha256": sha256, "vector": column}), partial, use_dictionary=False)
