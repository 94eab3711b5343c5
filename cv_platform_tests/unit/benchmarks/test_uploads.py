from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.uploads import write_uploads
from cv_platform.images import decode, read_size


@pytest.mark.parametrize("kind", ["photos", "digits"])
def test_uploads_are_different_jpegs_of_320_by_240(kind: str, tmp_path: Path) -> None:
    paths = write_uploads(kind, tmp_path / kind, count=5, seed=3)
    contents = [path.read_bytes() for path in paths]
    assert {read_size(content) for content in contents} == {("JPEG", 240, 320)}
    assert len(set(contents)) == 5


def test_uploads_repeat_with_their_seed(tmp_path: Path) -> None:
    first, again, other = (
        [path.read_bytes() for path in write_uploads("photos", tmp_path / str(index), count=3, seed=seed)]
        for index, seed in enumerate((0, 0, 1))
    )
    assert first == again
    assert first != other


def test_photos_are_in_colour_and_digits_are_not(tmp_path: Path) -> None:
    def colourfulness(kind: str) -> float:
        image = decode(write_uploads(kind, tmp_path / kind, count=1, seed=0)[0].read_bytes()).astype(float)
        return float(np.abs(image[..., 0] - image[..., 2]).mean())

    assert colourfulness("photos") > 5
    assert colourfulness("digits") < 1
