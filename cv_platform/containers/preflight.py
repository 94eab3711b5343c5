"""What has to be so before the stack starts; each thing that is not becomes a message with what to do."""

from __future__ import annotations

import json
import math
import re
import shutil
import socket
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from cv_platform.containers import engine
from cv_platform.containers.certificate import certificate_problems, certificate_warnings, has_tls
from cv_platform.containers.env_file import env_problems, read_env
from cv_platform.cores import free_memory_bytes
from cv_platform.errors import ConfigError, ServiceError

OLDEST_ENGINE = (20, 10)
OLDEST_COMPOSE = (2, 20)
"""The first with `include`, and with `depends_on` of one-shot services as compose.yaml uses it."""
FORMAT = "1"
"""Layout of the volumes' content, their label `cv-platform.format` in docker/compose.yaml."""
POSTGRES_MAJOR = "17"
FREE_DISK_BYTES = 10 * 10**9
FREE_MEMORY_BYTES = 4 * 10**9

PORTS = {name: default for name, default in engine.DEFAULTS.items() if name.endswith("_PORT")}
"""The published ports, with docker/compose.yaml's defaults; HTTPS_PORT with TLS only."""
PROFILE_OF_PORT = {
    "PROMETHEUS_PORT": "monitoring",
    "ALERTMANAGER_PORT": "monitoring",
    "GRAFANA_PORT": "monitoring",
    "JUPYTER_PORT": "notebook",
    "PGADMIN_PORT": "admin",
    "RAY_PORT": "ray",
}
"""Whose page a port is; nginx publishes it with its profile off too."""
GPU_PROFILE = "gpu"
CONCURRENT_RUNS = 2
"""Of docker/dagster/dagster-ray.yaml."""
_RAY_PROFILE = "ray"
_GPU_CODE_HOST = "dagster-code-gpu"
_IMAGE_OF_PROFILE = {"notebook": "NOTEBOOK_IMAGE", GPU_PROFILE: "GPU_IMAGE"}


def preflight(*, needs_images: bool = True) -> list[str]:
    """Returns everything that keeps the stack from starting, worded for a person; empty when it may start."""
    problems = restoration_problems()
    problems += env_problems(engine.EXAMPLE, engine.ENV_FILE)
    try:
        values = read_env(engine.ENV_FILE) if engine.ENV_FILE.exists() else {}
    except ConfigError:
        return problems  # It is among them.
    found, information = engine_problems()
    if found:
        return problems + found
    problems += certificate_problems(values, engine.DOCKER)
    problems += port_problems(values, is_free, published_ports(engine.project_name(values)))
    problems += capacity_problems(values, information, free_memory_bytes(), is_running=_is_running(values))
    problems += volume_problems(volume_labels(values))
    problems += run_container_problems(values)
    problems += run_job_problems(values)
    problems += code_host_problems(values)
    if needs_images:
        problems += image_problems(values)
    return problems


def warnings(values: Mapping[str, str]) -> list[str]:
    """Returns what a person should know although everything starts."""
    found = certificate_warnings(values, engine.DOCKER)
    address = engine.setting(values, "BIND_ADDRESS")
    lacks = [
        text
        for text, is_there in (
            ("TLS_CERTIFICATE: passwords and images travel in clear (make stack-certificate)", has_tls(values)),
            ("CV_API_KEYS: everybody may predict", bool(values.get("CV_API_KEYS"))),
        )
        if not is_there
    ]
    if lacks and not is_loopback(address):
        found.append(f"BIND_ADDRESS={address} opens the ports to the network, without {' and without '.join(lacks)}.")
    return found


def is_loopback(address: str) -> bool:
    """Returns whether only this machine reaches an address."""
    return address == "localhost" or address.startswith("127.") or address == "::1"


def restoration_problems() -> list[str]:
    """Returns that a restoration has not ended, if so: it works, or was killed."""
    if not engine.RESTORING.exists():
        return []
    return [
        f"Expected no unfinished restoration. Received: {engine.RESTORING}, which a running or killed one has left. "
        "Nothing of the stack was changed by it. Run it again (make stack-restore FILE=…), or clear it away "
        "(make stack-restore GIVE_UP=1)."
    ]


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
    address = engine.setting(values, "BIND_ADDRESS")
    taken: dict[int, str] = {}
    ours = set(ours)
    for name in PORTS:
        if name == "HTTPS_PORT" and not has_tls(values):
            continue
        text = engine.setting(values, name)
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
            profile = PROFILE_OF_PORT.get(name)
            is_off = profile is not None and profile not in engine.profiles(values)
            because = f" nginx publishes it although the profile {profile} is off, to say so there." if is_off else ""
            problems.append(
                f"{name}: expected {address}:{port} to be free. Received: something listens there, or the address is "
                f"not this machine's.{because} Stop it (`ss -ltnp 'sport = :{port}'` names it), or set {name} in "
                "docker/.env to a port that is free."
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
                "made it, back it up (make stack-backup), and restore that here (make stack-restore); or choose "
                "another STACK_NAME in docker/.env."
            )
        major = of_volume.get("cv-platform.postgres", POSTGRES_MAJOR)
        if major != POSTGRES_MAJOR:
            problems.append(
                f"Expected the volume {name} to be of PostgreSQL {POSTGRES_MAJOR}. Received: of PostgreSQL {major}, "
                f"which {POSTGRES_MAJOR} does not start on. Back it up with the release that made it "
                "(make stack-backup), and restore that here (make stack-restore)."
            )
    return problems


def run_container_problems(values: Mapping[str, str]) -> list[str]:
    """Returns what keeps run-gate from Docker's socket; nothing unless RUN_CONTAINERS is set."""
    chosen = values.get("RUN_CONTAINERS")
    if not chosen:
        return []
    if chosen != "1":
        return [f"RUN_CONTAINERS: expected 1, or nothing. Received: {chosen!r}. Mend docker/.env."]
    path = Path(engine.setting(values, "DOCKER_SOCKET"))
    if not path.is_socket():
        return [f"DOCKER_SOCKET: expected Docker's socket. Received: none at {path}. Mend docker/.env."]
    group = str(path.stat().st_gid)
    named = engine.setting(values, "DOCKER_GID")
    return (
        []
        if named == group
        else [f"DOCKER_GID: expected {group}, the group of {path}. Received: {named}. Mend docker/.env."]
    )


def run_job_problems(values: Mapping[str, str]) -> list[str]:
    """Returns what keeps runs from being jobs of the Ray cluster; nothing unless RUN_JOBS is set."""
    chosen = values.get("RUN_JOBS")
    if not chosen:
        return []
    problems = [] if chosen == "1" else [f"RUN_JOBS: expected 1, or nothing. Received: {chosen!r}. Mend docker/.env."]
    if _RAY_PROFILE not in engine.profiles(values):
        problems.append(f"RUN_JOBS: expected the profile {_RAY_PROFILE} in COMPOSE_PROFILES. Received: none. Add it.")
    if values.get("RUN_CONTAINERS"):
        problems.append("RUN_JOBS: expected one kind of runs. Received: RUN_CONTAINERS, too. Empty one of them.")
    counts = [engine.setting(values, name) for name in ("RAY_WORKERS", "RAY_WORKER_CPUS")]
    cores = math.prod(int(count) if count.isdecimal() else 0 for count in counts)
    if values.get("CV_COMPUTE") == "ray" and cores <= CONCURRENT_RUNS:
        problems.append(
            f"RAY_WORKERS × RAY_WORKER_CPUS: expected more cores than the {CONCURRENT_RUNS} runs that Dagster starts "
            "at a time, as each job holds one while it waits for its shards. Received: "
            f"{' × '.join(counts)}. Raise RAY_WORKERS, or set CV_COMPUTE=local."
        )
    return problems


def code_host_problems(values: Mapping[str, str]) -> list[str]:
    """Returns that Dagster would look for a code location that is not there, or leave the GPU's without work."""
    host = engine.setting(values, "CV_CODE_HOST")
    expected = _GPU_CODE_HOST if GPU_PROFILE in engine.profiles(values) else engine.DEFAULTS["CV_CODE_HOST"]
    if host == expected:
        return []
    return [
        f"CV_CODE_HOST: expected {_GPU_CODE_HOST} with the profile {GPU_PROFILE} in COMPOSE_PROFILES, and "
        f"{engine.DEFAULTS['CV_CODE_HOST']} without it. Received: {host}. Mend docker/.env."
    ]


def image_problems(values: Mapping[str, str]) -> list[str]:
    """Returns which of the project's own images are not built."""
    variables = ["PLATFORM_IMAGE", "SERVICE_IMAGE"]
    variables += [variable for profile, variable in _IMAGE_OF_PROFILE.items() if profile in engine.profiles(values)]
    missing: list[str] = []
    for name in (engine.setting(values, variable) for variable in variables):
        try:
            engine.docker("image", "inspect", "--format", "{{.Id}}", name)
        except ServiceError:
            missing.append(name)
    return [f"Expected the image {name}. Received: none. Run: make stack-build" for name in missing]


def volume_labels(values: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Returns the labels of the volumes that the stack of these settings uses, by name.

    Those with another suffix are from before a restoration.
    """
    project = engine.project_name(values)
    names = engine.volumes(project)
    if not names:
        return {}
    present = engine.present_volumes(values)
    labels = {v["Name"]: v.get("Labels") or {} for v in json.loads(engine.docker("volume", "inspect", *names))}
    return {
        name: of_volume
        for name, of_volume in labels.items()
        if name in present or of_volume.get("com.docker.compose.volume") not in engine.RESTORED_VOLUMES
    }


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


def dotted(version: tuple[int, ...]) -> str:
    """Returns a version as people write it."""
    return ".".join(map(str, version))


def _is_running(values: Mapping[str, str]) -> bool:
    return any(c.state == "running" for c in engine.containers(engine.project_name(values)))
