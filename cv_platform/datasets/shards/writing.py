"""Writes the shards of a pack, each whole or not at all, and takes over those that a killed packing has finished."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from cv_platform.datasets.shards.crew import make_pieces
from cv_platform.datasets.shards.pixels import Encoding, PackForm, Piece
from cv_platform.files import file_sha256, sync_file, sync_folder, write_file

logger = logging.getLogger(__name__)

SHARD_BYTES = 256 * 2**20
"""Of pixels as uint8; a JPEG shard has as many images."""
_PIECE_BYTES = 4 * 2**20
_SEAL = ".sealed.json"


@dataclass(frozen=True)
class Rows:
    """The images of one split, in order."""

    split: str
    paths: Sequence[str]
    sha256: Sequence[str]
    encoding: Encoding


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


def write_shards(
    folder: Path, source: Path, splits: Sequence[Rows], form: PackForm, *, workers: int | None = None
) -> dict[str, list[Shard]]:
    """Makes the shards of all splits in `folder`, and returns those of each split.

    Args:
        folder: of the unfinished pack; shards that are sealed there are kept if they are whole.
        source: what the paths are relative to.
        splits: the images.
        form: of their pixels.
        workers: processes that decode; None: as many as there are cores.

    Raises:
        InvalidDatasetError: a file is not the one that the manifest describes.
        OSError: the disk is full, say.
    """
    planned = {rows.split: list(_plan(folder, source, rows, form)) for rows in splits}
    everything = [pieces for of_split in planned.values() for pieces in of_split]
    finished = {pieces[0].file.name: sealed for pieces in everything if (sealed := _sealed(folder, pieces))}
    todo = [pieces for pieces in everything if pieces[0].file.name not in finished]
    if finished:
        logger.info("%d of %d shards were finished by a packing that was killed", len(finished), len(everything))
    kept = {name for file in finished for name in (file, f"{file}{_SEAL}")}
    for path in folder.iterdir():
        if path.name not in kept:
            path.unlink()
    for pieces in todo:
        pieces[0].file.touch()
    with ThreadPoolExecutor(1) as sealer:  # Hashing and syncing a shard keep nobody from decoding the next one.
        seals: list[Future[Shard]] = []
        sizes: list[int] = []
        ends = {id(pieces[-1]): pieces for pieces in todo}
        for piece, made in make_pieces([piece for pieces in todo for piece in pieces], workers=workers):
            if made:
                with piece.file.open("ab") as file:
                    file.writelines(made)
                sizes += map(len, made)
            if pieces := ends.get(id(piece)):
                seals.append(sealer.submit(_seal, folder, pieces, tuple(sizes)))
                sizes = []
                for seal in seals:
                    if seal.done():
                        seal.result()  # A full disk ends the work at once.
        finished |= {shard.file: shard for shard in (seal.result() for seal in seals)}
    return {split: [finished[pieces[0].file.name] for pieces in of_split] for split, of_split in planned.items()}


def remove_seals(folder: Path) -> None:
    """Removes what only an unfinished pack needs."""
    for path in folder.glob(f"*{_SEAL}"):
        path.unlink()


def _plan(folder: Path, source: Path, rows: Rows, form: PackForm) -> Iterator[list[Piece]]:
    """Yields the pieces of each shard."""
    per_shard, per_piece = max(1, SHARD_BYTES // form.bytes), max(1, min(1024, _PIECE_BYTES // form.bytes))
    for number, first in enumerate(range(0, len(rows.paths), per_shard)):
        last = min(first + per_shard, len(rows.paths))
        yield [
            Piece(
                source=source,
                paths=tuple(rows.paths[start : min(start + per_piece, last)]),
                sha256=tuple(rows.sha256[start : min(start + per_piece, last)]),
                form=form,
                encoding=rows.encoding,
                file=folder / f"{rows.split}-{number:05}.{rows.encoding}",
                offset=(start - first) * form.bytes,
            )
            for start in range(first, last, per_piece)
        ]


def _contents(pieces: Sequence[Piece]) -> str:
    """Names what a shard is to hold: another plan, of a release with other shards say, has another name."""
    names = [[repr(pieces[0].form), pieces[0].encoding], *(piece.sha256 for piece in pieces)]
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()


def _seal(folder: Path, pieces: Sequence[Piece], sizes: tuple[int, ...]) -> Shard:
    file = pieces[0].file
    sync_file(file)
    images = sum(len(piece.paths) for piece in pieces)
    shard = Shard(file.name, images, file.stat().st_size, file_sha256(file), sizes)
    sync_folder(folder)
    write_file(folder / f"{file.name}{_SEAL}", json.dumps({"contents": _contents(pieces), "shard": asdict(shard)}))
    return shard


def _sealed(folder: Path, pieces: Sequence[Piece]) -> Shard | None:
    """Returns the shard that these pieces make if it is there and whole."""
    file = pieces[0].file
    try:
        seal = json.loads((folder / f"{file.name}{_SEAL}").read_bytes())
        shard = Shard(**{**seal["shard"], "sizes": tuple(seal["shard"]["sizes"])})
        is_whole = seal["contents"] == _contents(pieces) and file.stat().st_size == shard.bytes
        return shard if is_whole and file_sha256(file) == shard.sha256 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
