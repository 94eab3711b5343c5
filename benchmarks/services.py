"""The servers that are measured or tried: the platform's service as the stack starts it, and the original's replica."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from benchmarks import original_serving
from benchmarks.original_serving import ReplicaSettings
from benchmarks.servers import Server, process_tree, serving
from cv_platform.local.environment import prepare_home
from cv_platform.local.http import free_port
from cv_platform.local.programs import service_command
from cv_platform.settings import Settings
from cv_platform.storage import BundleMetadata

Wrap = Callable[[Sequence[str]], list[str]]
"""Makes one command of another, such as `unshare … command`."""
SERVICE = "bentos.image_classifier.service:ImageClassifier"


@contextmanager
def platform_service(
    settings: Settings,
    environment: Mapping[str, str],
    scratch: Path,
    *,
    name: str = "platform",
    service: str = SERVICE,
    port: int | None = None,
    wrap: Wrap = list,
) -> Iterator[Server]:
    """Runs the platform's service, with BentoML and its workers, to the end of the block.

    Args:
        settings: of the installation that it serves; `service_workers` processes answer.
        environment: see `installation.isolated_environment`.
        scratch: receives `<name>.log` and a BENTOML_HOME: servers that share one wipe each other's metrics.
        name: of the log, unless it is the only server.
        service: what BentoML serves, instead of the shipped service.
        port: on loopback; None: a free one.
        wrap: turns its command into the one that is run.

    Raises:
        ServiceError: it did not become ready.
    """
    prepare_home(settings)
    port = port or free_port()
    bentoml_home = scratch / f"bentoml-{name}"
    bentoml_home.mkdir(exist_ok=True)
    with serving(
        f"the service {name}",
        wrap([service if part == SERVICE else part for part in service_command(port)]),
        environment={**environment, "BENTOML_HOME": str(bentoml_home), "CV_SERVICE_PORT": str(port)},
        base_url=f"http://127.0.0.1:{port}",
        health_path="/health_check",
        log=scratch / f"{name}.log",
    ) as server:
        yield server


def worker_pids(server_pid: int) -> list[int]:
    """Lists the processes below BentoML's that answer requests, oldest first."""
    found: list[int] = []
    for process in process_tree(server_pid):
        with suppress(psutil.NoSuchProcess):
            if "--worker-id" in process.cmdline():
                found.append(process.pid)
    return sorted(found)


@contextmanager
def original_replica(
    bundle: Path, metadata: BundleMetadata, url: str, environment: Mapping[str, str], scratch: Path
) -> Iterator[Server]:
    """Runs the replica of the original on the same model and database, to the end of the block.

    Raises:
        ServiceError: it did not become ready.
    """
    port = free_port()
    replica = ReplicaSettings(
        model_name=metadata.model_name,
        class_names=metadata.class_names,
        keras_path=bundle / f"{metadata.model_name}.keras",
        uae_path=bundle / f"{metadata.model_name}_uae.keras",
        database_url=url,
    )
    application = ("--factory", "benchmarks.original_serving:application", "--no-access-log")
    with serving(
        "the original's replica",
        (sys.executable, "-m", "uvicorn", *application, "--host", "127.0.0.1", "--port", str(port)),
        environment={**environment, original_serving.SETTINGS_VARIABLE: replica.model_dump_json()},
        base_url=f"http://127.0.0.1:{port}",
        health_path="/health_check",
        log=scratch / "original.log",
    ) as server:
        yield server
