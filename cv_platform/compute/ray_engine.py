"""The engine `ray`: tasks of a Ray cluster, one core and 1 GiB each, on this machine or on many (extra `ray`).

Ray brings shards back that a killed worker or node had, and spills results that do not fit into memory; one task waits
for each core and two more. What nodes have to see is said in docs/scale.md.
https://docs.ray.io/en/latest/ray-core/fault-tolerance.html
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.resources
import logging
import platform
import queue
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from typing_extensions import override

from cv_platform.compute.engine import AHEAD, ATTEMPTS, TASK_BYTES, Outcome, R, S, Turns, answer, use_one_thread
from cv_platform.cores import available_cores
from cv_platform.errors import ComputeError, CvPlatformError
from cv_platform.settings import prepare_process

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

logger = logging.getLogger(__name__)

Packages: TypeAlias = tuple[tuple[str, str], ...]
"""Names and versions, as `versions` finds them."""
PACKAGES = (
    *("cv-platform", "ray", "numpy", "opencv-python-headless", "simplejpeg", "pillow", "onnxruntime", "pyarrow"),
    *("tensorflow", "keras"),
)
"""What decides the bytes that come of a shard, or whether it can be read at all."""
SOURCE = "source of cv-platform"
"""Among versions: what tells two check-outs of one version apart."""
_WIDTHS = {"AVX512F": "AVX-512", "FMA3": "AVX2", "AVX": "AVX"}
"""NumPy's names of what x86 processors round by, the widest first, as everybody knows them."""
_MOST_SAID = 20
"""Warnings of a shard that its driver repeats."""
_STARTS = 3
"""On a busy machine, its agents may not be there within 15 s: https://github.com/ray-project/ray/issues/65983"""
_PLACE_SECONDS = 300.0
"""That processes wait for nodes to come, before a cluster counts as too small for all of them."""
_INSTALL = "Install the extra: pip install 'cv-platform[ray]', or set CV_COMPUTE=local."


class RayEngine:
    """Works on shards by a Ray cluster, which is joined, or started, when the first shard comes.

    Args:
        address: of a running cluster; None: one is started on this machine, and ends with this process.
        workers: most shards at a time; None: as many as the cluster has cores.
        notes: see `Engine.notes`.

    Raises:
        ComputeError: Ray is not installed.
    """

    worth_seconds = 0.0

    def __init__(self, address: str | None = None, *, workers: int | None = None, notes: Path | None = None) -> None:
        self._address, self._most, self.notes = address, workers, notes
        _ray()

    @property
    def workers(self) -> int:
        """Returns how many shards it works on at a time."""
        return self._most or max(1, int(self._joined().cluster_resources().get("CPU", 1)))

    def one_each(self) -> RayEngine:
        """Returns one that gives a shard out when there is a core for it, and none ahead."""
        return RayEngine(self._address, workers=self.workers, notes=self.notes)

    def ask(self, question: Callable[[], R]) -> dict[str, R]:
        """See `Engine.ask`; a node without cores, as a head may be, is not asked: it gets no shards."""
        ray = self._joined()
        try:
            return _ask(ray, question, [node for node in ray.nodes() if node["Resources"].get("CPU")])
        except ray.exceptions.RayError as err:
            raise ComputeError(
                "Expected each node of the Ray cluster to say what it sees. Received: "
                f"{str(err).strip().splitlines()[-1]}. Look at the nodes with `ray status`, then try again."
            ) from err

    def run(self, function: Callable[[S], R], shards: Iterable[S], *, in_order: bool) -> Iterator[Outcome[S, R]]:
        """See `Engine.run`."""
        ray = self._joined()
        turns: Turns[S, R] = Turns(shards, ahead=self._most or AHEAD * self.workers, in_order=in_order)
        task = self._task(ray)
        shared, packages = ray.put(function), ray.put(_packages())
        at_work: dict[Any, tuple[int, S]] = {}
        try:
            while True:
                while (taken := turns.take()) is not None:
                    # By its name Ray's dashboard says which are at work.
                    at_work[task.options(name=taken[1].name).remote(shared, taken[1], packages)] = taken
                if not at_work:
                    return
                done, _ = ray.wait(list(at_work), num_returns=1)
                for reference in done:
                    number, shard = at_work.pop(reference)
                    turns.settle(number, _outcome(ray, reference, shard))
                yield from turns.give()
        finally:
            for reference in at_work:
                ray.cancel(reference, force=True)

    def _task(self, ray: Any) -> Any:
        sizes = [int(node["Resources"].get("memory", 0)) for node in ray.nodes() if node["Alive"]]
        memory = min(TASK_BYTES, max(sizes))  # More than any node has would never be there.
        kept = {"num_cpus": 1, "memory": memory, "max_retries": ATTEMPTS - 1}
        return ray.remote(scheduling_strategy=self._strategy(), **kept)(_work)

    def _strategy(self) -> Any:
        """Returns where tasks go: else they wait for the first node, for seconds at times, while another one idles."""
        return "SPREAD"

    def gpus_each(self, count: int) -> int:
        """Returns how many GPUs each of so many processes gets that work together: one, where the cluster has as many.

        Otherwise none, as those that meet in each step have to compute on the same kind of device.
        """
        return int(self._joined().cluster_resources().get("GPU", 0) >= count)

    @contextmanager
    def together(
        self,
        function: Callable[..., None],
        count: int,
        *,
        gpus_each: int = 0,
        receive: Callable[[Any], None] | None = None,
    ) -> Iterator[Callable[[], str | None]]:
        """Calls a function in several processes at the same time, on as many nodes as there are; leaves none behind.

        Waits where others have the cores and GPUs; where there are too few, five minutes for nodes that come.

        Args:
            function: of a module; gets its place, from 0, and an address that is free for each place, HOST:PORT.
            count: of the processes.
            gpus_each: that a process has to itself, beside a core.
            receive: gets in this process, in order, what the first process reports; the function then gets as its third
                argument what reports, which waits until no more than one report is on its way.

        Yields:
            What waits until all calls have returned, or one has not, and returns how that one ended; it raises
            CvPlatformErrors of theirs.

        Raises:
            ComputeError: the cluster has fewer cores or GPUs, or a node has other packages.
        """
        ray = self._joined()
        member = ray.remote(num_cpus=1, num_gpus=gpus_each, max_restarts=0)(_Member)
        member = member.options(scheduling_strategy="SPREAD", max_concurrency=1 if receive is None else 2)
        members, addresses = _placed(ray, member, count, {"CPU": count, "GPU": gpus_each * count})
        try:
            shared = ray.put(function)
            is_heard = receive is not None
            calls = [one.work.remote(shared, index, addresses, is_heard) for index, one in enumerate(members)]
            yield functools.partial(_first_death, ray, calls, members[0], receive)
        finally:
            _end(ray, members)

    def _joined(self) -> Any:
        ray = _ray()
        if not ray.is_initialized():
            _join(ray, self._address)
            _require_same(ray)
        return ray


class _Member:
    """A process of those that work together: an actor, which Ray does not start again by itself."""

    def __init__(self) -> None:
        self._reports: queue.Queue[Any] = queue.Queue(1)

    def address(self, expected: Packages) -> tuple[Exception | None, str]:
        """Returns `(error, HOST:PORT)`; the error is what this node has otherwise than who asks."""
        import ray

        with socket.socket() as free:
            free.bind(("", 0))
            return _unlike(expected), f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    def work(self, function: Callable[..., None], index: int, addresses: list[str], is_heard: bool) -> None:
        if not is_heard:
            return function(index, addresses)
        try:
            function(index, addresses, self._reports.put)
        finally:
            if index == 0:
                self._reports.put(None)
                self._reports.join()  # That one is asked for when all before it are received: no error overtakes them.

    def reported(self) -> Any:
        """Waits for the next report; None: no other follows."""
        report = self._reports.get()
        self._reports.task_done()
        return report


def _placed(ray: Any, member: Any, count: int, needs: Mapping[str, int]) -> tuple[list[Any], list[str]]:
    """Starts so many members, and returns them with their addresses."""
    deadline = time.monotonic() + _PLACE_SECONDS
    while True:
        members = [member.remote() for _ in range(count)]
        try:
            return members, _addresses(ray, members, needs)
        except ray.exceptions.RayActorError as err:  # On a node that Ray does not know yet to be gone.
            _end(ray, members)
            if time.monotonic() > deadline:
                raise ComputeError(
                    f"Expected Ray to start {count} processes that work together. Received: {err}. Look at its nodes."
                ) from err
            time.sleep(1.0)
        except BaseException:
            _end(ray, members)
            raise


def _end(ray: Any, members: list[Any]) -> None:
    for one in members:
        ray.kill(one)


def _addresses(ray: Any, members: list[Any], needs: Mapping[str, int]) -> list[str]:
    """Returns where the members are, once Ray has placed all of them."""
    asked = [one.address.remote(_packages()) for one in members]
    while ray.wait(asked, num_returns=len(asked), timeout=_PLACE_SECONDS)[1]:
        has = {name: int(ray.cluster_resources().get(name, 0)) for name in needs}
        if any(has[name] < count for name, count in needs.items()):
            raise ComputeError(
                f"Expected a Ray cluster with {needs['CPU']} cores and {needs['GPU']} GPUs, for {len(members)} "
                f"members. Received: {has['CPU']} and {has['GPU']}, {_PLACE_SECONDS / 60:.0f} minutes later. Add "
                "nodes, or lower train.workers."
            )
        logger.warning("Processes that are to work together still wait for cores or GPUs of the Ray cluster")
    found = ray.get(asked)
    for error in filter(None, (error for error, _ in found)):
        raise error
    return [address for _, address in found]


def _first_death(ray: Any, calls: list[Any], first: Any, receive: Callable[[Any], None] | None) -> str | None:
    waiting = calls if receive is None else [*calls, first.reported.remote()]
    while waiting:
        (ended,), waiting = ray.wait(waiting, num_returns=1)
        try:
            report = ray.get(ended)
        except ray.exceptions.RayActorError:
            return "was ended, or its node"
        except ray.exceptions.RayError as err:
            if isinstance(cause := getattr(err, "cause", None), CvPlatformError):
                raise cause from err
            return f"ended with {str(err).strip().splitlines()[-1]}"
        if report is not None and receive is not None:
            receive(report)
            waiting.append(first.reported.remote())
            del report, ended  # Large, maybe: the next one comes when they are gone.
    return None


def _ray() -> Any:
    # It tells its maker how it is used, unless the environment says no, and gives a busy machine little time.
    prepare_process()
    try:
        import ray
    except ImportError as err:
        raise ComputeError(f"CV_COMPUTE=ray: expected the package ray. Received: {err}. {_INSTALL}") from err
    return ray


def _join(ray: Any, address: str | None, attempts: int = _STARTS) -> None:
    # "local": without an address Ray would join whatever cluster runs on this machine, or RAY_ADDRESS names.
    own = {"address": "local", "num_cpus": available_cores(), "include_dashboard": False}
    which = {"address": address} if address else own
    try:
        ray.init(logging_level=logging.WARNING, log_to_driver=False, configure_logging=False, **which)
    # A cluster of another Ray or Python is a RuntimeError, none at all a ConnectionError, a slow start an Exception.
    except Exception as err:
        ray.shutdown()
        # A head may fail to start what serves a client: https://github.com/ray-project/ray/issues/63202
        if attempts > 1 and (address is None or isinstance(err, ConnectionAbortedError)):
            logger.warning("Ray has not started, and is tried again: %s", err)
            return _join(ray, address, attempts - 1)
        where = f"a Ray cluster at {address}" if address else "Ray to start on this machine"
        raise ComputeError(
            f"Expected {where} that has Python {platform.python_version()} and Ray {ray.__version__}. Received: {err}. "
            "Start it with these versions, or correct CV_RAY_ADDRESS."
        ) from err


def _require_same(ray: Any) -> None:
    """Refuses a cluster of which a node has other packages than this process; names processors that round otherwise."""
    try:
        found = _ask(ray, _described, ray.nodes())
    except (ray.exceptions.RayError, ImportError) as err:
        ray.shutdown()
        raise ComputeError(
            f"Expected cv-platform on each node of the Ray cluster. Received: {str(err).strip().splitlines()[-1]}. "
            "Install the same packages there as here."
        ) from err
    if differences := different_versions(versions(), {name: there for name, (there, _) in found.items()}):
        ray.shutdown()
        raise _refusal(differences)
    here = processor()
    if others := [f"{name} has {there}" for name, (_, there) in found.items() if there != here]:
        logger.warning(
            "The Ray cluster computes by processors that round otherwise than this one (%s): %s. Vectors, scores and "
            "what models say then differ in their last bits by who computed them, and what is kept under its content's "
            "name stays as the first one made it. Where runs are to be repeated to the byte, use one kind of processor",
            here,
            "; ".join(others),
        )


def _ask(ray: Any, question: Callable[[], R], nodes: Iterable[Mapping[str, Any]]) -> dict[str, R]:
    """Returns what each living one of `nodes` answers, by its name."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0)(_answer)
    asked = {
        f"{node['NodeManagerHostname']} ({node['NodeID'][:8]})": task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(question)
        for node in nodes
        if node["Alive"]
    }
    return {name: ray.get(answer, timeout=60.0) for name, answer in asked.items()}


def _answer(question: Callable[[], R]) -> R:
    return question()


def _refusal(differences: list[str]) -> ComputeError:
    return ComputeError(
        f"Expected a Ray cluster with the packages of this process. Received: {'; '.join(differences)}. "
        "Install the same ones there: requirements.lock, and cv-platform of the same check-out, or image."
    )


def _described() -> tuple[dict[str, str], str]:
    return versions(), processor()


def processor() -> str:
    """Returns what libraries round floats by, as they choose their code by it: architecture and vector instructions."""
    found = simd_found()
    widest = next((said for name, said in _WIDTHS.items() if name in found), " ".join(found))
    return f"{platform.machine()} {widest}".strip()


def simd_found() -> list[str]:
    """Returns the vector instructions that NumPy found in this processor, and was not told to hold back."""
    import numpy as np

    config: Any = np.show_config
    return config(mode="dicts")["SIMD Extensions"].get("found", [])  # NumPy's own types know no `mode`.


def versions() -> dict[str, str]:
    """Returns the versions of Python and of what decides the bytes that come of a shard."""
    found = {"python": platform.python_version(), SOURCE: source_digest("cv_platform")}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    return found


@functools.cache
def source_digest(package: str) -> str:
    """Returns 12 hex digits of a package's Python files, in a folder or a zip; nothing where it has none, but .pyc."""
    digest, found = hashlib.sha256(), dict(_sources(importlib.resources.files(package)))
    for path, content in sorted(found.items()):
        digest.update(f"{path} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12] if found else ""


def _sources(folder: Traversable, inside: str = "") -> Iterator[tuple[str, bytes]]:
    for entry in folder.iterdir():
        if entry.name.endswith(".py"):
            yield inside + entry.name, entry.read_bytes()
        elif entry.is_dir():
            yield from _sources(entry, f"{inside}{entry.name}/")


def different_versions(here: Mapping[str, str], nodes: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Says what nodes have otherwise than this process, by their names; nothing of sources that one does not have."""
    return [
        f"{node} has {name} {found} instead of {version}"
        for node, there in nodes.items()
        for name, version in here.items()
        if (found := there.get(name, "none")) != version and (name != SOURCE or (found and version))
    ]


def _packages() -> Packages:
    return tuple(versions().items())


@functools.cache
def _unlike(expected: Packages) -> ComputeError | None:
    """Returns what this worker has otherwise than who gives out the work: its node may have come after that joined."""
    import ray

    name = f"{platform.node()} ({ray.get_runtime_context().get_node_id()[:8]})"
    differences = different_versions(dict(expected), {name: versions()})
    return _refusal(differences) if differences else None


def _work(
    function: Callable[[Any], Any], shard: Any, expected: Packages
) -> tuple[Exception | None, Any, Sequence[tuple[int, str]]]:
    """Works on a shard in a worker, and returns `(error, result, what the log was told)`; error or result is None."""
    if (refusal := _unlike(expected)) is not None:
        return refusal, None, ()
    _use_one_thread()
    log, heard = logging.getLogger("cv_platform"), _Heard(logging.WARNING)
    log.addHandler(heard)
    try:
        ray: Any = sys.modules["ray"]
        # No public name has it; a cluster with another Ray is refused.
        if ended := ray._private.worker.global_worker.core_worker.get_current_task_attempt_number():
            logger.warning("%s is tried again, after the end of a process that worked on it (%d)", shard.name, ended)
        return *answer(function, shard), heard.said
    finally:
        log.removeHandler(heard)


class _Heard(logging.Handler):
    """Keeps what a worker says, level and message, for who gave out the shard: Ray leaves it in files of the node."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.said: list[tuple[int, str]] = []

    @override
    def emit(self, record: logging.LogRecord) -> None:
        if len(self.said) < _MOST_SAID:
            self.said.append((record.levelno, record.getMessage()))


_use_one_thread = functools.cache(use_one_thread)


def _outcome(ray: Any, reference: Any, shard: Any) -> Outcome[Any, Any]:
    errors = ray.exceptions
    try:
        error, result, said = ray.get(reference)
    except (errors.WorkerCrashedError, errors.OutOfMemoryError, errors.NodeDiedError, errors.ObjectLostError) as err:
        why = type(err).__name__.removesuffix("Error")
        return Outcome(shard, None, f"has ended {ATTEMPTS} processes, the last of which by {why}")
    except errors.RayError as err:
        raise ComputeError(f"{shard.name}: expected Ray to work on it. Received: {err}") from err
    for level, message in said:
        logger.log(level, "A worker of Ray: %s", message)
    if error is not None:
        raise error
    return Outcome(shard, result)
