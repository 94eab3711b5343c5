"""Trains one network by several processes, on one machine or on many (`train.workers`): one step, shared.

Each process has the whole network, takes its share of every batch, and applies the mean of all gradients, so that the
weights stay the same in all of them. The mean is TensorFlow's, by the collectives that `MultiWorkerMirroredStrategy`
sets up from TF_CONFIG: https://www.tensorflow.org/guide/distributed_training. Keras 3's `fit` does not work in that
strategy's scope; here it trains an ordinary model whose optimizer asks the others first.

`train_elsewhere` leaves a training to one process, wherever that is (`train.job_gpus`).

`train_together` starts the processes, on this machine or by Ray on others, and starts all of them again from the last
whole epoch when one dies. What goes to machines that do not see the training's folder, and back, is in `travelling`.
Where TF_CONFIG names all of them, and this process as the first, a person starts the others, by
`python -m cv_platform.training.together FOLDER`: FOLDER is the training's own, on a file system that all share.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import shlex
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import TYPE_CHECKING, Any

from cv_platform.compute.ray_engine import RayEngine
from cv_platform.compute.sight import Proof, blind_machines
from cv_platform.compute.worker import end_with
from cv_platform.cores import available_cores
from cv_platform.errors import CvPlatformError, TrainingError
from cv_platform.files import write_file
from cv_platform.settings import process_environment
from cv_platform.training.travelling import Luggage, receive_epoch, require_shared

if TYPE_CHECKING:
    import keras

    from cv_platform.compute.engine import Engine
    from cv_platform.config import ExperimentConfig
    from cv_platform.records import PackedImages
    from cv_platform.training.callbacks import Epoch

logger = logging.getLogger(__name__)

TASK, PROBLEM = "together.pickle", "together.problem"
"""In the training's folder: what its processes train, and why they cannot."""
ATTEMPTS = 3
"""Times in a row that a process may die without an epoch being done since."""
TO_START = "to be started at "
"""How the lines of the log begin that people wait for who start processes by hand."""
_EXAMPLE = '{"cluster": {"worker": ["HOST:PORT", …]}, "task": {"type": "worker", "index": 0}}'
_LOOK_SECONDS = 0.2
_SHOWN = 1000
"""Characters at either end of what a process elsewhere has printed."""


@dataclass(frozen=True)
class Member:
    """This process's place among those that train together.

    Attributes:
        index: from 0, which is the one that writes.
        count: how many they are.
        strategy: TensorFlow's, which connects them.
        report: gets each epoch that the first one has written; None: nobody asks for it.
    """

    index: int
    count: int
    strategy: Any
    report: Callable[[Epoch], None] | None = None

    @classmethod
    def join(cls, report: Callable[[Epoch], None] | None = None) -> Member:
        """Waits for the others that TF_CONFIG names; before anything else is done with TensorFlow.

        Args:
            report: see the class.

        Raises:
            TrainingError: TF_CONFIG names nobody.
        """
        import tensorflow as tf

        resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
        count = len(resolver.cluster_spec().as_dict().get("worker", []))
        if not count:
            raise TrainingError(
                f"Expected TF_CONFIG to name all workers: {_EXAMPLE}. Received: none. Set it for each process, with "
                "its own index."
            )
        return cls(int(resolver.task_id or 0), count, tf.distribute.MultiWorkerMirroredStrategy(), report)

    def mean(self, values: Any) -> Any:
        """Returns the mean of all members' `(N,)` float32 tensors; each has to call it as often as the others."""
        import tensorflow as tf

        def one(mine: Any) -> Any:
            with tf.device(self.strategy.extended.worker_devices[0]):
                return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.MEAN, tf.identity(mine))

        return self.strategy.run(one, args=(values,))

    def agree(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Returns the means of all members' metrics, by name, so that all of them decide alike."""
        import tensorflow as tf

        means = tf.function(self.mean)(tf.constant(list(metrics.values()), tf.float32))
        return dict(zip(metrics, means.numpy().tolist(), strict=True))

    def share_steps(self, network: keras.Model) -> None:
        """Makes each step of a compiled network that of all members: gradients, and batch normalisation's averages."""
        import tensorflow as tf

        optimizer: Any = network.optimizer
        apply_own = optimizer.apply

        def apply(gradients: list[Any], variables: Any = None) -> None:
            averages = [one for one in network.non_trainable_variables if one.dtype == "float32"]
            parts = [*(tf.convert_to_tensor(one) for one in gradients), *(one.value for one in averages)]
            flat = self.mean(tf.concat([tf.reshape(tf.cast(part, tf.float32), [-1]) for part in parts], axis=0))
            pieces = tf.split(flat, [part.shape.num_elements() for part in parts])
            shaped = [tf.reshape(piece, part.shape) for piece, part in zip(pieces, parts, strict=True)]
            apply_own(shaped[: len(gradients)], variables)
            for variable, value in zip(averages, shaped[len(gradients) :], strict=True):
                variable.assign(value)

        optimizer.apply = apply


def train_together(
    packed: PackedImages, config: ExperimentConfig, folder: Path, *, engine: Engine | None = None
) -> None:
    """Trains by `config.train.workers` processes to the end; what `fitting.fit_model` finds is then in `folder`.

    Args:
        packed: the pixels.
        config: the experiment.
        folder: the training's own; see `fitting.fit_model`.
        engine: Ray places the processes; any other: they are this machine's. Neither is asked where TF_CONFIG is set.

    Raises:
        TrainingError: a process says that it cannot train, or processes die time and again; by hand: once.
        ComputeError: a machine of Ray's sees neither the folder nor a central storage that has the pixels.
    """
    write_file(folder / TASK, pickle.dumps((packed, config)))
    if place := process_environment().get("TF_CONFIG"):
        _lead(folder, place, config.train.workers)
        return
    by_ray = isinstance(engine, RayEngine)
    attempt = _by_ray(engine, packed, config, folder) if by_ray else partial(_here, config, folder)
    died = 0
    while True:
        before = _epochs(folder)
        (folder / PROBLEM).unlink(missing_ok=True)
        death = attempt()
        if death is None:
            return
        if (folder / PROBLEM).is_file():
            raise TrainingError((folder / PROBLEM).read_text(encoding="utf-8"))
        died = 1 if _epochs(folder) > before else died + 1
        if died == ATTEMPTS:
            raise TrainingError(
                f"Expected {config.train.workers} processes to train together. Received: {ATTEMPTS} times in a row one "
                f"that {death}, without an epoch in between. Look at what it has said, and at the machine's memory."
            )
        logger.warning("a process of the training %s; all go on from epoch %d", death, _epochs(folder) + 1)


def _here(config: ExperimentConfig, folder: Path) -> str | None:
    """Trains by processes of this machine until all have ended well, or one has not; returns how that one ended."""
    workers = [f"127.0.0.1:{port}" for port in _free_ports(config.train.workers)]
    with _processes(folder, [_place(index, workers) for index in range(len(workers))]) as processes:
        return _first_death(processes)


def _by_ray(
    engine: RayEngine, packed: PackedImages, config: ExperimentConfig, folder: Path
) -> Callable[[], str | None]:
    """Returns what does so by processes of Ray's, wherever they are."""
    count = config.train.workers
    gpus_each = engine.gpus_each(count)
    blind = blind_machines(engine, Proof.of(folder / TASK))
    shared_in = require_shared(engine, blind, packed, folder) if blind else None

    def attempt() -> str | None:
        task = folder if shared_in is None else Luggage.of(packed, shared_in, config, folder)
        receive = None if shared_in is None else partial(receive_epoch, folder)
        work = partial(_work, task, gpus_each > 0)
        with engine.together(work, count, gpus_each=gpus_each, receive=receive) as first_death:
            try:
                return first_death()
            except CvPlatformError as err:
                raise TrainingError(str(err)) from err

    return attempt


def train_elsewhere(
    packed: PackedImages, config: ExperimentConfig, folder: Path, launch: Callable[[Path], None]
) -> None:
    """Has a process elsewhere train to the end; what `fitting.fit_model` finds is then in `folder`.

    Args:
        packed: the pixels.
        config: the experiment.
        folder: the training's own, where that process finds it too; see `fitting.fit_model`.
        launch: has `main` called with the folder, and returns when that has ended well.

    Raises:
        TrainingError: the process says that it cannot train, or has ended in another way.
    """
    write_file(folder / TASK, pickle.dumps((packed, config)))
    (folder / PROBLEM).unlink(missing_ok=True)
    try:
        launch(folder)
    except Exception as err:  # Of whoever launches it.
        if (folder / PROBLEM).is_file():
            raise TrainingError((folder / PROBLEM).read_text(encoding="utf-8")) from err
        said = str(err)  # With what the process has printed, which may be long.
        said = said if len(said) <= 2 * _SHOWN else f"{said[:_SHOWN]} … {said[-_SHOWN:]}"
        raise TrainingError(
            f"Expected a process elsewhere to train to the end. Received: {said}. Its {_epochs(folder)} whole epochs "
            "are kept: another run goes on from there."
        ) from err


def _epochs(folder: Path) -> int:
    return max((int(path.stem.removeprefix("epoch-")) for path in folder.glob("epoch-*.json")), default=0)


def _lead(folder: Path, place: str, count: int) -> None:
    """Trains as the first of those that TF_CONFIG names, in a process of its own, and says how to start the others."""
    try:
        given = json.loads(place)
        workers, index = list[str](given["cluster"]["worker"]), int(given["task"]["index"])
    except (ValueError, TypeError, KeyError) as err:
        raise TrainingError(f"Expected TF_CONFIG to be such as {_EXAMPLE}. Received: {place}. Correct it.") from err
    if len(workers) != count or index != 0:
        raise TrainingError(
            f"Expected TF_CONFIG to name {count} workers (train.workers), and this process as the first, index 0. "
            f"Received: {len(workers)} workers, index {index}. Correct it; the others are started by "
            f"python -m {__name__} FOLDER, which the first one names."
        )
    (folder / PROBLEM).unlink(missing_ok=True)
    for other in range(1, count):
        given["task"]["index"] = other
        command = shlex.join(["python", "-m", __name__, str(folder)])
        logger.info("%s%s: TF_CONFIG=%s %s", TO_START, workers[other], shlex.quote(json.dumps(given)), command)
    with _processes(folder, [place]) as processes:
        death = _first_death(processes)
    if death is None:
        return
    if (folder / PROBLEM).is_file():
        raise TrainingError((folder / PROBLEM).read_text(encoding="utf-8"))
    raise TrainingError(
        f"Expected {count} processes to train together. Received: the first {death}, as it does when another is gone. "
        f"Its {_epochs(folder)} whole epochs are kept: start all again, and they go on from there."
    )


@contextlib.contextmanager
def _processes(folder: Path, places: Sequence[str]) -> Iterator[list[Popen[bytes]]]:
    """Starts a member for each TF_CONFIG on a share of the cores; none is left behind."""
    cores = sorted(os.sched_getaffinity(0))[: available_cores()]
    each = max(1, len(cores) // len(places))
    started: list[Popen[bytes]] = []
    try:
        for index, place in enumerate(places):
            share = [cores[(index * each + core) % len(cores)] for core in range(each)]
            environment = {**process_environment(), "TF_CONFIG": place}
            arguments = [sys.executable, "-m", __name__, str(folder), str(os.getpid()), *map(str, share)]
            started.append(Popen(arguments, env=environment, stdin=DEVNULL))
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def _place(index: int, workers: list[str]) -> str:
    return json.dumps({"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}})


def _work(
    task: Path | Luggage, has_gpu: bool, index: int, workers: list[str], report: Callable[[Epoch], None] | None = None
) -> None:
    """Trains in a process of Ray's: in the training's folder, or in one of this machine with what came along."""
    if not has_gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray hides none: https://github.com/ray-project/ray/issues/54868
    os.environ["TF_CONFIG"] = _place(index, workers)
    if isinstance(task, Path):
        main(task)
        return
    with task.unpacked(index) as (packed, config, folder):
        _train(packed, config, folder, report)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _first_death(processes: list[Popen[bytes]]) -> str | None:
    """Waits until all have ended well, or one has not; returns how that one ended."""
    while True:
        codes = [process.poll() for process in processes]
        wrong = next((code for code in codes if code), None)
        if wrong is not None:
            return f"was ended by {signal.Signals(-wrong).name}" if wrong < 0 else f"ended with status {wrong}"
        if None not in codes:
            return None
        time.sleep(_LOOK_SECONDS)


def main(folder: Path) -> None:
    """Trains as one of several, as the folder's task and TF_CONFIG say; alone where the task is for one."""
    packed, config = pickle.loads((folder / TASK).read_bytes())
    try:
        _train(packed, config, folder)
    except CvPlatformError as err:
        (folder / PROBLEM).write_text(str(err), encoding="utf-8")
        raise


def _train(
    packed: PackedImages, config: ExperimentConfig, folder: Path, report: Callable[[Epoch], None] | None = None
) -> None:
    from cv_platform.datasets.packing import open_split
    from cv_platform.training.fitting import fit_model, fit_share

    member = Member.join(report) if config.train.workers > 1 else None
    splits = open_split(packed, "train"), open_split(packed, "valid")
    if member is None:
        fit_model(config, *splits, folder=folder)
    else:
        fit_share(config, *splits, folder=folder, member=member)


if __name__ == "__main__":
    if len(sys.argv) > 2:  # By `train_together`, which must not leave two crews to write in one folder.
        end_with(int(sys.argv[2]))
        os.sched_setaffinity(0, map(int, sys.argv[3:]))  # Before TensorFlow counts the cores.
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(Path(sys.argv[1]))
