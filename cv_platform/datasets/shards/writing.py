"""Writes the shards of a pack, each whole or not at all, and takes over those that a killed packing has finished."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cv_platform.compute import map_shards
from cv_platform.compute.engine import Engine
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
    source: Path
    """What the paths are relative to."""
    name: str
    """Of the shard's file."""
    paths: tuple[str, ...]
    sha256: tuple[str, ...]
    form: PackForm
    encoding: Encoding

    @property
    def images(self) -> int:
        """How many rows it has."""
        return len(self.paths)

    @property
    def contents(self) -> str:
        """What the shard is to hold: another plan, of a release with other shards say, has other contents."""
        return hashlib.sha256(json.dumps([repr(self.form), self.encoding, self.sha256]).encode()).hexdigest()

    @property
    def seal(self) -> Path:
        """The file that says that the shard is whole."""
        return self.folder / f"{self.name}{_SEAL}"


def write_shards(
    folder: Path, source: Path, splits: Sequence[Rows], *, engine: Engine | None = None
) -> dict[str, list[Shard]]:
    """Makes the shards of all splits in `folder`, and returns those of each split.

    Args:
        folder: of the unfinished pack; shards that are sealed there are kept if they are whole.
        source: what the paths are relative to.
        splits: the images, and the form of their pixels.
        engine: who makes them; it sees both folders.

    Raises:
        InvalidDatasetError: a file is not the one that the manifest describes.
        ShardError: see `compute.map_shards`.
        OSError: the disk is full, say.
    """
    finished = {plan.name: shard for plan in _plans(folder, source, splits) if (shard := _sealed(plan))}
    if finished:
        planned = sum(len(rows.shards()) for rows in splits)
        logger.info("%d of %d shards were finished by a packing that was killed", len(finished), planned)
    kept = {name for file in finished for name in (file, f"{file}{_SEAL}")}
    for path in folder.iterdir():
        if path.name not in kept:
            path.unlink()
    total = sum(len(rows.images) for rows in splits) - sum(shard.images for shard in finished.values())
    todo = _plans(folder, source, splits, without=frozenset(finished))
    made = map_shards(write_shard, todo, engine=engine, title="Packing", total=total, in_order=False)
    finished |= {plan.name: shard for plan, shard in made}
    return {rows.split: [finished[name] for name in rows.shards()] for rows in splits}


def write_shard(plan: Plan) -> Shard:
    """Writes a shard and its seal, on the disk when it returns.

    Raises:
        InvalidDatasetError: a file is not the one that the manifest describes.
        OSError: it cannot be written.
    """
    digest, sizes = hashlib.sha256(), list[int]()
    with whole_file(plan.folder / plan.name) as partial, partial.open("wb") as file:
        for path, sha256 in zip(plan.paths, plan.sha256, strict=True):
            row = stored(read_pixels(plan.source, path, sha256, plan.form), plan.encoding)
            # Written, not mapped: a full disk is then an error, where a memory map would be a SIGBUS.
            sizes.append(file.write(row))
            digest.update(row)
    differing = tuple(sizes) if plan.encoding == "jpeg" else ()
    shard = Shard(plan.name, plan.images, sum(sizes), digest.hexdigest(), differing)
    write_file(plan.seal, json.dumps({"contents": plan.contents, "shard": asdict(shard)}))
    return shard


def remove_seals(folder: Path) -> None:
    """Removes what only an unfinished pack needs."""
    for path in folder.glob(f"*{_SEAL}"):
        path.unlink()


def _plans(
    folder: Path, source: Path, splits: Sequence[Rows], *, without: Collection[str] = frozenset()
) -> Iterator[Plan]:
    """Yields the plans of all shards but those named: one at a time, as it names each of its images."""
    for rows in splits:
        for name, start in rows.shards().items():
            if name not in without:
                part = rows.images.slice(start, rows.per_shard)
                paths, sha256 = (tuple(part[column].to_pylist()) for column in ("path", "sha256"))
                yield Plan(folder, source, name, paths, sha256, rows.form, rows.encoding)


def _sealed(plan: Plan) -> Shard | None:
    """Returns the shard of a plan if it is there and whole."""
    file = plan.folder / plan.name
    try:
        seal = json.loads(plan.seal.read_bytes())
        shard = Shard(**{**seal["shard"], "sizes": tuple(seal["shard"]["sizes"])})
        is_whole = seal["contents"] == plan.contents and file.stat().st_size == shard.bytes
        return shard if is_whole and file_sha256(file) == shard.sha256 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
