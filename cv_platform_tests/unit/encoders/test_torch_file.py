"""Checkpoints are written opcode by opcode: PyTorch is no dependency. https://docs.python.org/3/library/pickletools.html"""

from __future__ import annotations

import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cv_platform.encoders.torch_file import MOST_VALUES, read_state_dict
from cv_platform.errors import EncoderError

HEAD = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
VALUES = np.arange(6, dtype="<f4")


def pushed(value: Any) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def tensor(
    shape: tuple[int, ...], strides: tuple[int, ...], *, offset: int = 0, storage: str = "FloatStorage"
) -> bytes:
    kept = b"(" + pushed("storage") + named("torch", storage) + pushed("0") + pushed("cpu") + pushed(6) + b"NtQ"
    hooks = named("collections", "OrderedDict") + b")R"
    arguments = b"(" + kept + pushed(offset) + pushed(shape) + pushed(strides) + b"\x89" + hooks + b"t"
    return named("torch._utils", "_rebuild_tensor_v2") + arguments + b"R"


def checkpoint(value: bytes, *, count: int = 6, values: bytes = VALUES.tobytes()) -> bytes:
    state = b"\x80\x02" + named("collections", "OrderedDict") + b")R(" + pushed("weight") + value + b"u."
    return HEAD + state + pickle.dumps(["0"], 2) + struct.pack("<q", count) + values


def read(content: bytes, folder: Path) -> dict[str, np.ndarray]:
    path = folder / "weights.pth"
    path.write_bytes(content)
    return read_state_dict(path)


def test_a_tensor_is_laid_out_as_its_strides_say(tmp_path: Path) -> None:
    np.testing.assert_array_equal(read(checkpoint(tensor((2, 3), (3, 1))), tmp_path)["weight"], [[0, 1, 2], [3, 4, 5]])
    turned = read(checkpoint(tensor((3, 2), (1, 3))), tmp_path)["weight"]
    np.testing.assert_array_equal(turned, [[0, 3], [1, 4], [2, 5]])
    assert turned.flags.c_contiguous
    np.testing.assert_array_equal(read(checkpoint(tensor((2,), (2,), offset=1)), tmp_path)["weight"], [1, 3])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (checkpoint(named("os", "system") + b"(" + pushed("touch owned") + b"tR"), "os.system"),
        (checkpoint(named("builtins", "eval") + b"(" + pushed("1") + b"tR"), "builtins.eval"),
        (checkpoint(tensor((2, 3), (3, 1), storage="CharStorage")), "torch.CharStorage"),
        (checkpoint(tensor((3, 3), (3, 1))), "does not hold"),
        (checkpoint(tensor((2, 3), (3, -1))), "negative"),
        (checkpoint(tensor((2, 3), (3, 1)), count=MOST_VALUES + 1), "a storage of"),
        (checkpoint(tensor((2, 3), (3, 1)), values=VALUES.tobytes()[:-1]), "buffer"),
        (checkpoint(tensor((2, 3), (3, 1)))[:80], ""),
        (pickle.dumps(7, 2), "another format's"),
        (b"PK\x03\x04 a zip, as PyTorch writes since 1.6", ""),
        (b"", ""),
    ],
)
def test_what_is_no_checkpoint_of_tensors_is_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="Expected a PyTorch checkpoint of tensors") as caught:
        read(content, tmp_path)
    assert reason in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pth"]


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="no such file"):
        read_state_dict(tmp_path / "weights.pth")
