"""Functions on shards that other processes find by their names; imports little, as each of them does it anew."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cv_platform.compute.carried import CarriedFile
from cv_platform.errors import InvalidDatasetError, StorageError


@dataclass(frozen=True)
class Numbers:
    """A shard of numbers."""

    values: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"numbers from {self.values[0]}"

    @property
    def images(self) -> int:
        return len(self.values)


def shards(count: int, size: int = 2) -> list[Numbers]:
    return [Numbers(tuple(range(start, start + size))) for start in range(0, count * size, size)]


def doubled(shard: Numbers) -> list[int]:
    """Ends the process at 7, as a poisonous image does, and finds 9 wrong."""
    if 7 in shard.values:
        os.kill(os.getpid(), signal.SIGKILL)
    if 9 in shard.values:
        raise InvalidDatasetError("Expected no 9.")
    return [2 * value for value in shard.values]


def process_id(_: Numbers) -> int:
    return os.getpid()


def carried_bytes(file: CarriedFile, _: Numbers) -> int | None:
    """Returns how many bytes have come with the work; None: the file lies at its path."""
    return None if file.content is None else len(file.content)


def tensorflow_threads(_: Numbers) -> str | None:
    return os.environ.get("TF_NUM_INTRAOP_THREADS")


@dataclass(frozen=True)
class Noted(Numbers):
    """A shard whose workers leave a file each, and of which the first one is ended."""

    folder: Path
    dies: bool = False


def noted(shard: Noted) -> int:
    (shard.folder / f"{shard.values[0]}-{time.time_ns()}").touch()
    if shard.dies and len(list(shard.folder.glob(f"{shard.values[0]}-*"))) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return shard.images


def noted_slowly(shard: Noted) -> int:
    """Takes long enough that its node is ended meanwhile."""
    noted(shard)
    time.sleep(0.5)
    return shard.images


def read_back(shard: Noted) -> int:
    """Needs a storage that is away at first, and says that somebody looked for it."""
    (shard.folder / f"asked-{shard.values[0]}").touch()
    if not (shard.folder / "storage").is_dir():
        raise StorageError("Expected the storage. Received: nothing.")
    return shard.images


def held(_: Numbers) -> None:
    """Never ends by itself."""
    threading.Event().wait()


def assigned(shard: Numbers) -> dict[str, float]:
    """Returns what Ray keeps for the task, by resource."""
    import ray

    return dict(ray.get_runtime_context().get_assigned_resources())


def count_up(fails: bool, index: int, addresses: list[str], report: Callable[[int], None]) -> None:
    """Reports four numbers, if it is the first of several processes, and may fail then."""
    if index == 0:
        for number in range(4):
            report(number)
        if fails:
            raise InvalidDatasetError("Expected five. Received: four.")


def note_gpu(folder: Path, index: int, addresses: list[str]) -> None:
    """Notes which GPU a process has that works together with others, by the others' number."""
    import ray

    (folder / f"{index}-of-{len(addresses)}").write_text(f"{ray.get_gpu_ids()} {os.environ['CUDA_VISIBLE_DEVICES']}")
