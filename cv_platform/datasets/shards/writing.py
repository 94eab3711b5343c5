"""Writes the shards of a pack, each whole or not at all, and takes over those of a packing that has ended early."""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cv_platform.compute import map_shards
from cv_platform.compute.engine import DECODING_BYTES, MOST_LOST, Engine, Salvage, span
from cv_platform.compute.sight import Proof
from cv_platform.datasets.origins import Files, Origin
from cv_platform.datasets.shards.pixels import Encoding, PackForm, read_pixels, stored
from cv_platform.files import file_sha256, whole_file, write_file

if TYPE_CHECKING:  # Each process that packs imports this module.
    import pyarrow as pa

logger = logging.getLogger(__name__)

SHARD_BYTES = 256 * 2**20
"""Of pixels as uint8; a JPEG shard has as many images."""
_LEAST_SHARD_BYTES = 8 * 2**20
_SHARDS = 32
"""Of a split, if they are of a size between the two above: enough for many workers."""
_SEAL = ".sealed.json"
_HERE = ".here"
"""A file that is there while shards are made, by which others tell that they see the folder."""


@dataclass(frozen=True)
class Rows:
    """The images of one split.

    Attributes:
        split: its name.
        images: columns path and sha256, in order.
        encoding: of the pixels.
        form: of the pixels.
    """

    split: str
    images: pa.Table
    encoding: Encoding
    form: PackForm

    @property
    def per_shard(self) -> int:
        """How many images a shard holds; the last one may hold fewer."""
        even = len(self.images) * self.form.bytes // _SHARDS
        return max(1, min(SHARD_BYTES, max(even, _LEAST_SHARD_BYTES)) // self.form.bytes)

    def shards(self) -> dict[str, int]:
        """Returns the names of the shards' files, and the first row of each."""
        starts = range(0, len(self.images), self.per_shard)
        return {f"{self.split}-{number:05}.{self.encoding}": start for number, start in enumerate(starts)}


@dataclass(frozen=True)
class Shard:
    """A finished shard.

    Attributes:
        file: its name.
        images: how many it holds.
        bytes: of the file.
        sha256: of the file.
        sizes: bytes of each image, where they differ: JPEG.
    """

    file: str
    images: int
    bytes: int
    sha256: str
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Some consecutive rows of a split: what one process makes a shard of."""

    folder: Path
    """Of the unfinished pack."""
    file: str
    """The shard's, by its name."""
    files: Files
    sha256: tuple[str, ...]
    form: PackForm
    encoding: Encoding
    seen_by: Proof | None = None
    """Tells who sees `folder`; None: nobody works on it."""

    @property
    def name(self) -> str:
        """Its first and its last image."""
        return span(self.files.paths[0], self.files.paths[-1])

    @property
    def images(self) -> int:
        """How many rows it has."""
        return len(self.sha256)

    @property
    def contents(self) -> str:
        """What the shard is to hold: another plan, of a release with other shards say, has other contents."""
        return hashlib.sha256(json.dumps([repr(self.form), self.encoding, self.sha256]).encode()).hexdigest()

    @property
    def seal(self) -> Path:
        """The file that says that the shard is whole."""
        return self.folder / f"{self.file}{_SEAL}"

    def sealed(self, shard: Shard) -> None:
        """Says that the shard is whole, on the disk."""
        write_file(self.seal, json.dumps({"contents": self.contents, "shard": asdict(shard)}))


def write_shards(
    folder: Path, origin: Origin, splits: Sequence[Rows], *, engine: Engine | None = None
) -> dict[str, list[Shard]]:
    """Makes the shards of all splits in `folder`, and returns those of each split.

    Args:
        folder: of the unfinished pack; shards that are sealed there are kept if they are whole.
        origin: where the images are.
        splits: the images, and the form of their pixels.
        engine: who makes them; what does not see `folder` hands them back.

    Raises:
        InvalidDatasetError: a file is not the one that the manifest describes.
        ShardError: images have killed each process that packed them; all other shards are sealed, see `Salvage`.
        OSError: the disk is full, say.
    """
    unread = Origin(origin.directory)  # Nobody has to find where else the images of finished shards are.
    finished = {plan.file: shard for plan in _plans(folder, unread, splits) if (shard := _sealed(plan))}
    if finished:
        planned = sum(len(rows.shards()) for rows in splits)
        logger.info("%d of %d shards were finished by a packing that has ended early", len(finished), planned)
    kept = {name for file in finished for name in (file, f"{file}{_SEAL}")}
    for path in folder.iterdir():
        if path.name not in kept:
            path.unlink()
    total = sum(len(rows.images) for rows in splits) - sum(shard.images for shard in finished.values())
    if total:
        with _seen_by(folder) as seen_by:
            todo = _plans(folder, origin, splits, without=frozenset(finished), seen_by=seen_by)
            made = map_shards(
                write_shard,
                todo,
                engine=engine,
                title="Packing",
                total=total,
                in_order=False,
                salvage=_ONE_BY_ONE,
                task_bytes=DECODING_BYTES,
            )
            finished |= {plan.file: _written(plan, *of_plan) for plan, of_plan in made}
    return {rows.split: [finished[name] for name in rows.shards()] for rows in splits}


def write_shard(plan: Plan) -> tuple[Shard, NDArray[np.uint8] | None]:
    """Makes a shard, and returns `(shard, bytes)`: where its folder is seen, on the disk with its seal, and None.

    Raises:
        InvalidDatasetError: a file is not the one that the manifest describes.
        StorageError: see `Files`.
        OSError: it cannot be written.
    """
    if plan.seen_by and plan.seen_by.holds():
        with whole_file(plan.folder / plan.file) as partial, partial.open("wb") as file:
            shard = _fill(file, plan)
        plan.sealed(shard)
        return shard, None
    with TemporaryFile() as file:
        shard = _fill(file, plan)
        file.seek(0)
        return shard, np.fromfile(file, np.uint8)


def _fill(file: IO[bytes], plan: Plan) -> Shard:
    digest, sizes = hashlib.sha256(), list[int]()
    for pixels in read_pixels(plan.files, plan.sha256, plan.form):
        row = stored(pixels, plan.encoding)
        # Written, not mapped: a full disk is then an error, where a memory map would be a SIGBUS.
        sizes.append(file.write(row))
        digest.update(row)
    differing = tuple(sizes) if plan.encoding == "jpeg" else ()
    return Shard(plan.file, plan.images, sum(sizes), digest.hexdigest(), differing)


def _joined(parts: Sequence[tuple[Shard, NDArray[np.uint8] | None]]) -> tuple[Shard, NDArray[np.uint8]]:
    """Returns what several calls of `write_shard` have handed back as one."""
    content = np.concatenate([content for _, content in parts if content is not None])
    shards = [shard for shard, _ in parts]
    sizes = tuple(size for shard in shards for size in shard.sizes)
    return Shard(shards[0].file, len(shards), len(content), hashlib.sha256(content.data).hexdigest(), sizes), content


_ONE_BY_ONE: Salvage[Plan, tuple[Shard, NDArray[np.uint8] | None]] = Salvage(
    divide=lambda plan: (
        replace(plan, files=plan.files.only(at), sha256=(sha256,), seen_by=None)
        for at, sha256 in enumerate(plan.sha256)
    ),
    join=_joined,
    lost=None,
    most_lost=MOST_LOST,
)
"""A pack lacks no image: one that ends its processes is named."""


def _written(plan: Plan, shard: Shard, content: NDArray[np.uint8] | None) -> Shard:
    """Writes a shard that was handed back, and its seal."""
    if content is not None:
        with whole_file(plan.folder / plan.file) as partial, partial.open("wb") as file:
            file.write(content.data)
        plan.sealed(shard)
    return shard


@contextmanager
def _seen_by(folder: Path) -> Iterator[Proof]:
    """Yields what tells who sees a folder."""
    file = folder / _HERE
    file.write_text(secrets.token_hex(16), encoding="utf-8")
    try:
        yield Proof.of(file)
    finally:
        file.unlink(missing_ok=True)


def remove_seals(folder: Path) -> None:
    """Removes what only an unfinished pack needs."""
    for path in folder.glob(f"*{_SEAL}"):
        path.unlink()


def _plans(
    folder: Path,
    origin: Origin,
    splits: Sequence[Rows],
    *,
    without: Collection[str] = frozenset(),
    seen_by: Proof | None = None,
) -> Iterator[Plan]:
    """Yields the plans of all shards but those named: one at a time, as it names each of its images."""
    for rows in splits:
        for name, start in rows.shards().items():
            if name not in without:
                part = rows.images.slice(start, rows.per_shard)
                paths, sha256 = (tuple(part[column].to_pylist()) for column in ("path", "sha256"))
                yield Plan(folder, name, origin.files(paths), sha256, rows.form, rows.encoding, seen_by)


def _sealed(plan: Plan) -> Shard | None:
    """Returns the shard of a plan if it is there and whole."""
    file = plan.folder / plan.file
    try:
        seal = json.loads(plan.seal.read_bytes())
        shard = Shard(**{**seal["shard"], "sizes": tuple(seal["shard"]["sizes"])})
        is_whole = seal["contents"] == plan.contents and file.stat().st_size == shard.bytes
        return shard if is_whole and file_sha256(file) == shard.sha256 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
