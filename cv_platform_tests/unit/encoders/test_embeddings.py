from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from cv_platform.encoders import embeddings
from cv_platform.encoders.embeddings import embed_files, kept_vectors
from cv_platform.encoders.encoder import Encoder


class Reader:
    """Reads images of one colour, and knows which it was asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, part: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        for at in part:
            self.asked.append(at)
            yield np.full((4, 4, 3), at, np.uint8)


@pytest.fixture
def encoder() -> Encoder:
    """Returns the means of the channels."""
    return Encoder("0123456789abcdef", 4, 3, lambda images: images.mean(axis=(1, 2), dtype=np.float32))


def test_each_image_is_computed_once_whatever_it_is_beside(encoder: Encoder, tmp_path: Path) -> None:
    read = Reader()
    first = embed_files(["a", "b", "a"], read, encoder, tmp_path)
    np.testing.assert_array_equal(first, [[0] * 3, [1] * 3, [0] * 3])
    assert sorted(read.asked) == [0, 1], "copies share a vector"
    read.asked.clear()
    np.testing.assert_array_equal(embed_files(["c", "b"], read, encoder, tmp_path), [[0] * 3, [1] * 3])
    assert read.asked == [0]
    assert embed_files([], read, encoder, tmp_path).shape == (0, 3)


def test_what_was_written_before_the_end_stays(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embeddings, "_FILE_IMAGES", 2)
    names, read = ["a", "b", "c", "d"], Reader()

    def fails(part: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        yield from read([at for at in part if at != 3])
        if 3 in part:
            raise FileNotFoundError("d.png")

    with pytest.raises(FileNotFoundError):
        embed_files(names, fails, encoder, tmp_path)
    read.asked.clear()
    np.testing.assert_array_equal(embed_files(names, read, encoder, tmp_path)[:, 0], [0, 1, 2, 3])
    assert sorted(read.asked) == [2, 3]


def test_what_was_computed_before_an_error_stays(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embeddings, "_PART_IMAGES", 2)
    names, read = ["a", "b", "c", "d"], Reader()

    def fails(part: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        if 3 in part:
            raise FileNotFoundError("d.png")
        return read(part)

    with pytest.raises(FileNotFoundError):
        embed_files(names, fails, encoder, tmp_path)
    np.testing.assert_array_equal(kept_vectors(names, encoder, tmp_path)[:, 0], [0, 1, np.nan, np.nan])


@pytest.mark.parametrize("damage", [b"", b"PAR1 no more of it", None])
def test_a_damaged_file_is_computed_again(encoder: Encoder, tmp_path: Path, damage: bytes | None) -> None:
    read = Reader()
    embed_files(["a", "b"], read, encoder, tmp_path)
    (path,) = (tmp_path / "cache" / "embeddings" / encoder.key).iterdir()
    path.write_bytes(path.read_bytes()[:-20] if damage is None else damage)
    read.asked.clear()
    np.testing.assert_array_equal(embed_files(["a", "b"], read, encoder, tmp_path)[:, 0], [0, 1])
    assert sorted(read.asked) == [0, 1]
