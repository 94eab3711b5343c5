"""The built-in dataset: scikit-learn's 1,797 handwritten digits as a git + DVC repository with two tags.

Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998
(https://doi.org/10.24432/C50P49), the test part, shipped inside scikit-learn: nothing is downloaded. Every byte is the
same on every machine, and so are the tags' md5s and commits.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from pathlib import Path

import numpy as np

from cv_platform.datasets.dvc_store import store_images
from cv_platform.datasets.repository import (
    DATA_FOLDER,
    commit_version,
    create_repository,
    require_repository,
    show_version,
)
from cv_platform.datasets.splits import split_identical_together
from cv_platform.files import exclusive, scratch_directory, whole_directory

SPLIT_FRACTIONS = {"test": 0.2, "reference": 0.15, "valid": 0.085}
"""Of v2.0.0: about 360 test, 270 reference and 150 validation images; drift tests need a good reference."""
SPLIT_SEED = 0
_DATE = "1998-07-01T00:00:00+0000"  # The donation of the data; a fixed date makes the commits the same everywhere.


def make_digits_repository(directory: Path) -> None:
    """Makes the digits repository at `directory` with the tags v1.0.0 and v2.0.0, unless it exists.

    v1.0.0 has class folders without splits, v2.0.0 has split/class folders. The images are 8×8 grey PNG files. A killed
    call leaves nothing at `directory`, and concurrent calls make it once.

    Raises:
        DatasetNotFoundError: there is something else at `directory`.
    """
    remedy = "Move it away: the digits repository is made there again."
    with exclusive(directory.parent / f".{directory.name}.lock"):
        if directory.exists():
            require_repository(directory, remedy=remedy)
            return
        with whole_directory(directory) as partial:
            create_repository(partial)
            pictures, digits = _pictures()
            _add(partial, "v1.0.0", pictures, [str(d) for d in digits], "Add 1,797 handwritten digits in class folders")
            names = _split_names(pictures, [str(d) for d in digits])
            folders = [f"{split}/{digit}" for split, digit in zip(names, digits, strict=True)]
            _add(partial, "v2.0.0", pictures, folders, "Split the digits into train, valid, test and reference")


def _add(repository: Path, tag: str, pictures: list[bytes], folders: list[str], message: str) -> None:
    with scratch_directory(repository.parent, repository.name) as scratch:
        for index, (picture, folder) in enumerate(zip(pictures, folders, strict=True)):
            path = scratch / DATA_FOLDER / folder / f"{index:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture)
        dvc_file = store_images(scratch, repository=repository)
    version = commit_version(repository, tag, dvc_file=dvc_file, annotations=None, message=message, date=_DATE)
    show_version(repository, version)


def _pictures() -> tuple[list[bytes], list[int]]:
    """Returns the PNG files and the digit on each, in scikit-learn's order."""
    from sklearn.datasets import load_digits

    images, digits = load_digits(return_X_y=True)
    levels = ((images.astype(np.int64) * 255 + 8) // 16).astype(np.uint8).reshape(-1, 8, 8)
    return [grey_png(image) for image in levels], [int(d) for d in digits]


def _split_names(pictures: list[bytes], labels: list[str]) -> list[str]:
    return split_identical_together(
        [hashlib.sha256(picture).hexdigest() for picture in pictures],
        [(label,) for label in labels],
        SPLIT_FRACTIONS,
        seed=SPLIT_SEED,
        remainder="train",
    )


def grey_png(image: np.ndarray) -> bytes:
    """Encodes `(H, W)` uint8 as PNG without compression: compressed bytes would differ between zlib builds."""
    height, width = image.shape
    rows = b"".join(b"\x00" + row.tobytes() for row in image)  # Filter type 0 before each row.
    size = struct.pack("<H", len(rows))
    stored = b"\x78\x01\x01" + size + bytes(b ^ 0xFF for b in size) + rows + struct.pack(">I", zlib.adler32(rows))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), (b"IDAT", stored), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
