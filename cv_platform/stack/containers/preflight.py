"""What has to be so before the stack starts; each thing that is not becomes a message with what to do."""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from cv_platform.errors import ConfigError, ServiceError
from cv_platform.stack.containers import engine
from cv_platform.stack.containers.env_file import env_problems, read_env

OLDEST_ENGINE = (20, 10)
OLDEST_COMPOSE = (2, 20)
"""The first with `include`, and with `depends_on` of one-shot services as compose.yaml uses it."""
FORMAT = "1"
"""Layout of the volumes' content, their label `cv-platform.format` in docker/compose.yaml."""
POSTGRES_MAJOR = "17"
FREE_DISK_BYTES = 10 * 10**9
FREE_MEMORY_BYTES = 4 * 10**9

PORTS = {
    "HTTP_PORT": "80",
    "SERVICE_PORT": "4242",
    "PAGE_PORT": "4243",
    "DAGSTER_PORT": "3001",
    "MLFLOW_PORT": "5050",
    "EVIDENTLY_PORT": "8000",
}
"""The published ports, with docker/compose.yaml's defaults."""


def preflight(*, needs_images: bool = True) -> list[str]:
    """Returns everything that keeps the stack from starting, worded for a person; empty when it may start."""
    problems = env_problems(engine.EXAMPLE, engine.ENV_FILE)
    try:
        values = read_env(engine.ENV_FILE) if engine.ENV_FILE.exists() else {}
    except ConfigError:
        return problems  # It is among them.
    found, information = engine_problems()
    if found:
        return problems + found
    problems += port_problems(values, is_free, published_ports(engine.project_name(values)))
    problems += capacity_problems(values, information, free_memory_bytes(), is_running=_is_running(values))
    problems += volume_problems(volume_labels(engine.project_name(values)))
    if needs_images:
        problems += image_problems(values)
    return problems


def engine_problems() -> tuple[list[str], Mapping[str, Any]]:
    """Returns what is wrong with Docker and Compose, and what the engine says of itself."""
    if shutil.which("docker") is None:
        return [
            "Expected the command docker. Received: none on PATH. Install Docker Engine with its Compose plugin."
        ], {}
    try:
        information = json.loads(engine.docker("info", "--format", "{{json .}}"))
    except (ServiceError, ValueError) as err:
        return [f"Expected a Docker daemon that answers. Received: {err} Start it: systemctl start docker"], {}
    if information.get("ServerErrors"):
        return [
            f"Expected a Docker daemon that answers. Received: {'; '.join(information['ServerErrors'])}. "
            "Start it (systemctl start docker), or join the group that may use it."
        ], {}
    problems: list[str] = []
    version = str(information.get("ServerVersion", ""))
    if engine.version_tuple(version) < OLDEST_ENGINE:
        problems.append(f"Expected Docker Engine {dotted(OLDEST_ENGINE)} or newer. Received: {version}. Upgrade it.")
    try:
        version = engine.docker("compose", "version", "--short")
    except ServiceError:
        version = ""
    if engine.version_tuple(version) < OLDEST_COMPOSE:
        problems.append(
            f"Expected Docker Compose {dotted(OLDEST_COMPOSE)} or newer, as Docker's plugin. Received: "
            f"{version or 'none'}. Install the package docker-compose-plugin."
        )
    return problems, information


def port_problems(
    values: Mapping[str, str], is_free: Callable[[str, int], bool], ours: Iterable[int] = ()
) -> list[str]:
    """Returns what is wrong with the ports: no number, named twice, or in use by something else.

    Args:
        values: of docker/.env.
        is_free: says whether an address and port can be bound.
        ours: ports that this stack publishes already.
    """
    problems: list[str] = []
    address = values.get("BIND_ADDRESS") or "127.0.0.1"
    taken: dict[int, str] = {}
    ours = set(ours)
    for name, default in PORTS.items():
        text = values.get(name) or default
        if not text.isdigit() or not 1 <= int(text) <= 65535:
            problems.append(f"{name}: expected a port, 1 to 65535. Received: {text!r}. Mend docker/.env.")
            continue
        port = int(text)
        if port in taken:
            problems.append(
                f"{name}: expected a port of its own. Received: {port}, as {taken[port]}. Mend docker/.env."
            )
            continue
        taken[port] = name
        if port not in ours and not is_free(address, port):
            problems.append(
                f"{name}: expected {address}:{port} to be free. Received: something listens there, or the address is "
                f"not this machine's. Stop it (`ss -ltnp 'sport = :{port}'` names it), or set {name} in docker/.env."
            )
    return problems


def capacity_problems(
    values: Mapping[str, str], information: Mapping[str, Any], memory_bytes: int | None, *, is_running: bool
) -> list[str]:
    """Returns what the machine lacks: free disk where Docker keeps its volumes, free memory, CPUs.

    Args:
        values: of docker/.env.
        information: of `docker info`: `DockerRootDir`, `NCPU`.
        memory_bytes: available memory; None where it is not known.
        is_running: whether the stack has its memory already.
    """
    problems: list[str] = []
    root = Path(str(information.get("DockerRootDir", "/var/lib/docker")))
    if root.is_dir():  # Docker Desktop keeps it in a machine of its own.
        free = shutil.disk_usage(root).free
        if free < FREE_DISK_BYTES:
            problems.append(
                f"Expected {FREE_DISK_BYTES / 1e9:.0f} GB of free disk at {root}. Received: {free / 1e9:.1f} GB. "
                "Free some, as by: docker image prune"
            )
    if memory_bytes is not None and not is_running and memory_bytes < FREE_MEMORY_BYTES:
        problems.append(
            f"Expected {FREE_MEMORY_BYTES / 1e9:.0f} GB of available memory. Received: {memory_bytes / 1e9:.1f} GB. "
            "Stop what is not needed, as by: make down"
        )
    cores = information.get("NCPU")
    for name, value in values.items():
        if not name.endswith("_CPUS") or not value:
            continue
        if re.fullmatch(r"\d*\.?\d+", value) is None or float(value) <= 0:
            problems.append(f"{name}: expected a number of CPUs, such as 1.5. Received: {value!r}. Mend docker/.env.")
        elif isinstance(cores, int) and float(value) > cores:
            problems.append(
                f"{name}: expected at most the machine's {cores} CPUs. Received: {value}. Mend docker/.env."
            )
    return problems


def volume_problems(labels: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Returns which volumes another version of the platform or of PostgreSQL has made.

    Args:
        labels: of each existing volume of the project, by its name.
    """
    problems: list[str] = []
    for name, of_volume in labels.items():
        found = of_volume.get("cv-platform.format", "none")
        if found != FORMAT:
            problems.append(
                f"Expected the volume {name} to have format {FORMAT}. Received: format {found}. Start the release that "
                "made it, back it up (make backup), and restore that here; or choose another STACK_NAME in docker/.env."
            )
        major = of_volume.get("cv-platform.postgres", POSTGRES_MAJOR)
        if major != POSTGRES_MAJOR:
            problems.append(
                f"Expected the volume {name} to be of PostgreSQL {POSTGRES_MAJOR}. Received: of PostgreSQL {major}, "
                f"which {POSTGRES_MAJOR} does not start on. Back it up with the release that made it, and restore that "
                "here."
            )
    return problems


def image_problems(values: Mapping[str, str]) -> list[str]:
    """Returns which of the project's own images are not built."""
    names = [
        values.get("PLATFORM_IMAGE") or "cv-platform/platform:0.1.0",
        values.get("SERVICE_IMAGE") or "cv-platform/service:0.1.0",
    ]
    missing: list[str] = []
    for name in names:
        try:
            engine.docker("image", "inspect", "--format", "{{.Id}}", name)
        except ServiceError:
            missing.append(name)
    return [f"Expected the image {name}. Received: none. Run: make stack-build" for name in missing]


def volume_labels(project: str) -> dict[str, dict[str, str]]:
    """Returns the labels of the project's volumes, by name."""
    names = engine.volumes(project)
    if not names:
        return {}
    described = json.loads(engine.docker("volume", "inspect", *names))
    return {volume["Name"]: volume.get("Labels") or {} for volume in described}


def published_ports(project: str) -> set[int]:
    """Returns the ports of this machine that the project's running containers publish."""
    label = f"label=com.docker.compose.project={project}"
    return ports_of(engine.docker("ps", "--filter", label, "--format", "{{.Ports}}"))


def ports_of(listing: str) -> set[int]:
    """Returns this machine's ports in what `docker ps` shows: `127.0.0.1:80->8080/tcp`, or a range of them."""
    ranges = re.findall(r":(\d+)(?:-(\d+))?->", listing)
    return {port for first, last in ranges for port in range(int(first), int(last or first) + 1)}


def is_free(address: str, port: int) -> bool:
    """Returns whether something may listen there; a port that needs more rights than ours counts as free."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except PermissionError:
            return True
        except OSError:
            return False
        return True


def free_memory_bytes() -> int | None:
    """Returns the memory that is available without swapping; None where the system does not say."""
    information = Path("/proc/meminfo")
    if not information.is_file():
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", information.read_text(encoding="ascii"), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def dotted(version: tuple[int, ...]) -> str:
    """Returns a version as people write it."""
    return ".".join(map(str, version))


def _is_running(values: Mapping[str, str]) -> bool:
    return any(c.state == "running" for c in engine.containers(engine.project_name(values)))
