"""Reads the tensors of a PyTorch checkpoint without PyTorch, and without running what a pickle may hold.

The format that `torch.save` wrote before 1.6: three small pickles (a magic number, the protocol, the machine), the
state dict, the keys of its storages, and for each key a count and the raw values.
https://github.com/pytorch/pytorch/blob/v1.5.0/torch/serialization.py
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from cv_platform.errors import EncoderError

_MAGIC = 0x1950A86A20F9469CFC6C
_DTYPES = {"FloatStorage": "<f4", "DoubleStorage": "<f8", "HalfStorage": "<f2", "LongStorage": "<i8"}
MOST_VALUES = 2**30
"""What a file may promise: a damaged count may not ask for all memory."""


def read_state_dict(path: Path) -> dict[str, NDArray[Any]]:
    """Returns each tensor by its name, contiguous, in the file's dtype.

    Raises:
        EncoderError: there is no such file, or it is no checkpoint of this format, damaged, or names anything else
            than tensors.
    """
    try:
        with path.open("rb") as file:
            return _read(file)
    except FileNotFoundError as err:
        raise EncoderError(f"Expected a PyTorch checkpoint at {path}. Received: no such file.") from err
    # A damaged pickle breaks its reader in many ways; each means the same.
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError, AttributeError, MemoryError) as err:
        raise EncoderError(
            f"Expected a PyTorch checkpoint of tensors, in the format before 1.6, at {path}. Received: one that does "
            f"not read ({err}). Save it by torch.save with _use_new_zipfile_serialization=False, or convert it to ONNX."
        ) from err


@dataclass(frozen=True)
class _View:
    """A tensor that waits for its storage's values; offset and strides count values."""

    key: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Tensors(pickle.Unpickler):
    """Admits an ordered dictionary of tensors, and nothing that could run."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self.dtypes: dict[str, str] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda key, offset, shape, strides, *_: _View(key, offset, tuple(shape), tuple(strides))
        if module == "torch" and name in _DTYPES:
            return name
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no tensor")

    def persistent_load(self, pid: Any) -> str:
        kind, storage, key, _, _, view = pid
        if kind != "storage" or view is not None:
            raise pickle.UnpicklingError("a storage of an unknown kind")
        self.dtypes[key] = _DTYPES[storage]
        return key


def _read(file: BinaryIO) -> dict[str, NDArray[Any]]:
    if _Tensors(file).load() != _MAGIC:
        raise ValueError("its first bytes are another format's")
    for _ in range(2):
        _Tensors(file).load()
    tensors = _Tensors(file)
    views = tensors.load()
    storages: dict[str, NDArray[Any]] = {}
    for key in _Tensors(file).load():
        dtype = np.dtype(tensors.dtypes[key])
        count = int.from_bytes(file.read(8), "little")
        if count > MOST_VALUES:
            raise ValueError(f"a storage of {count} values")
        storages[key] = np.frombuffer(file.read(count * dtype.itemsize), dtype=dtype, count=count)
    return {str(name): _strided(view, storages[view.key]) for name, view in views.items()}


def _strided(view: _View, values: NDArray[Any]) -> NDArray[Any]:
    """Lays a tensor out as its strides say: convolutions are often kept channels last."""
    if any(side < 0 for side in (*view.shape, *view.strides, view.offset)):
        raise ValueError("a tensor with a negative side")
    last = view.offset + sum((side - 1) * stride for side, stride in zip(view.shape, view.strides, strict=True))
    if 0 in view.shape or last >= values.size:
        raise ValueError(f"a tensor of shape {view.shape} that its storage does not hold")
    strides = [stride * values.itemsize for stride in view.strides]
    window = np.lib.stride_tricks.as_strided(values[view.offset :], view.shape, strides, writeable=False)
    return np.ascontiguousarray(window)
