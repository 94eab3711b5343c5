"""A training on machines that do not see its folder: what goes along with the call, and how its epochs come back.

Each process trains in a folder below the `CV_HOME` of its own machine, which begins with the last whole epoch of the
training's folder and is removed afterwards. Packs come from central storage, as where a model is evaluated. Each
epoch that the first process has written comes back while they train, one at a time, and is kept as if it had been
trained here.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cv_platform.compute.carried import CarriedFile
from cv_platform.datasets.packing import pack_here
from cv_platform.datasets.publishing import require_readable
from cv_platform.datasets.shards.sharing import published_in, shared_note
from cv_platform.errors import ComputeError, LockHeldError
from cv_platform.files import exclusive, write_file
from cv_platform.settings import home_here
from cv_platform.training.callbacks import Epoch, keep_epoch, read_state, record_name

if TYPE_CHECKING:
    from cv_platform.compute.engine import Engine
    from cv_platform.config import ExperimentConfig
    from cv_platform.records import PackedImages

_FREE_SECONDS = 60.0
"""That a process which was told to end may hold its folder."""


@dataclass(frozen=True)
class Luggage:
    """What a process needs to train elsewhere; pickle takes the files with it.

    Attributes:
        packed: the pixels, where who gives out the work has them.
        shared_in: URL of the central storage that has them, too.
        config: the experiment.
        name: of the folders, which no other training has.
        epoch: the files of the last whole one; none: they begin at the first.
        weights: of `model.weights`; None: that names none.
    """

    packed: PackedImages
    shared_in: str
    config: ExperimentConfig
    name: str
    epoch: tuple[CarriedFile, ...]
    weights: CarriedFile | None

    @classmethod
    def of(cls, packed: PackedImages, shared_in: str, config: ExperimentConfig, folder: Path) -> Luggage:
        """Returns what a training needs to go on from what is in its folder."""
        state, weights = read_state(folder), config.model.weights
        names = (*state.sha256, record_name(state)) if state else ()
        return cls(
            packed,
            shared_in,
            config,
            f".training-{hashlib.sha256(f'{platform.node()}:{folder}'.encode()).hexdigest()[:16]}",
            tuple(CarriedFile.of(folder / name) for name in names),
            CarriedFile.of(Path(weights)) if weights else None,
        )

    @contextmanager
    def unpacked(self, index: int) -> Iterator[tuple[PackedImages, ExperimentConfig, Path]]:
        """Yields the pixels, the experiment and the folder, as the process of that index has them on this machine.

        What killed ones of the same training have left there is removed; garbage collection of that `CV_HOME` knows it.

        Raises:
            StorageError: central storage cannot be reached.
        """
        model = self.config.model
        parent = home_here(self.packed.directory.parents[1]) / "models" / model.model_name
        folder = parent / f"{self.name}-{index}"
        for left in [path for path in parent.glob(f"{self.name}-*") if path.is_dir() and path != folder]:
            with suppress(LockHeldError), _alone(left, 0.0):
                shutil.rmtree(left, ignore_errors=True)
        with ExitStack() as held:
            held.enter_context(_alone(folder, _FREE_SECONDS))
            shutil.rmtree(folder, ignore_errors=True)
            held.callback(shutil.rmtree, folder, ignore_errors=True)
            folder.mkdir()
            for file in self.epoch:
                with file.open_path() as path:
                    shutil.copyfile(path, folder / file.path.name)
            if self.weights is not None:
                model = model.model_copy(update={"weights": str(held.enter_context(self.weights.open_path()))})
            config = self.config.model_copy(update={"model": model})
            yield pack_here(self.packed, self.shared_in), config, folder


def _alone(folder: Path, timeout_seconds: float) -> AbstractContextManager[None]:
    return exclusive(folder.with_name(f"{folder.name}.lock"), timeout_seconds=timeout_seconds)


def require_shared(engine: Engine, blind: list[str], packed: PackedImages, folder: Path) -> str:
    """Returns the URL of the central storage from which machines take a pack that do not see a training's folder.

    Raises:
        ComputeError: the pack is not there, or one of them does not read it.
    """
    expected = (
        f"Expected {folder} on each node, as processes that train together go on from what is in it. Received: none on "
        f"{', '.join(blind)}."
    )
    if (shared_in := published_in(packed.directory)) is None:
        raise ComputeError(
            f"{expected} Put CV_HOME at the same path of all of them, on a shared file system; or set "
            "CV_SHARE_PACKS=1, and CV_STORAGE to what they all reach, such as s3://bucket/prefix, and materialise "
            "packed_images: they then take its pixels from there, and hand epochs back; or set train.workers: 1."
        )
    require_readable(engine, blind, shared_in, shared_note(packed.directory, shared_in), expected)
    return shared_in


def receive_epoch(folder: Path, epoch: Epoch) -> None:
    """Keeps an epoch that another machine has trained as `callbacks.TrainingMonitor` does: its record last."""
    before = read_state(folder)
    write_file(folder / epoch.state.last_weights, epoch.weights)
    keep_epoch(folder, epoch.state, before)
