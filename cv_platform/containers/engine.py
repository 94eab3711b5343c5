"""The `docker` command, and what this project's containers are doing.

https://docs.docker.com/reference/cli/docker/
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cv_platform.containers.env_file import read_env
from cv_platform.containers.run_container import RUN_LABEL
from cv_platform.errors import ServiceError

REPOSITORY = Path(__file__).resolve().parents[2]
DOCKER = REPOSITORY / "docker"
COMPOSE_FILE = DOCKER / "compose.yaml"
EXAMPLE = DOCKER / ".env.example"
ENV_FILE = DOCKER / ".env"
RESTORING = DOCKER / ".env.restoring"
"""The settings of a restoration under way, or of one that was killed; it becomes `ENV_FILE`."""
SUFFIX = "VOLUME_SUFFIX"
"""Variable of docker/.env: which of the `RESTORED_VOLUMES` are the stack's."""
RESTORED_VOLUMES = ("postgres", "home", "storage", "mlflow", "evidently", "notebooks", "spool")
"""Volumes that docker/compose.yaml names with the suffix: those that a backup holds."""
ONE_SHOTS = frozenset({"migrate", "mlflow-migrate", "maintenance"})
"""Services of docker/compose.yaml that end when their task is done."""
DEFAULTS = {
    "STACK_NAME": "cv-platform",
    "BIND_ADDRESS": "127.0.0.1",
    "PUBLIC_HOST": "localhost",
    "STACK_USER": "admin",
    "CV_CODE_HOST": "dagster-code",
    "DOCKER_SOCKET": "/var/run/docker.sock",
    "DOCKER_GID": "999",
    "PLATFORM_IMAGE": "cv-platform/platform:0.2.0",
    "GPU_IMAGE": "cv-platform/platform:0.2.0-gpu",
    "SERVICE_IMAGE": "cv-platform/service:0.2.0",
    "NOTEBOOK_IMAGE": "cv-platform/notebook:0.2.0",
    "NGINX_IMAGE": "nginx:1.26.3",
    "RAY_WORKERS": "2",
    "RAY_WORKER_CPUS": "1",
    # The published ports; HTTPS_PORT with TLS only.
    "HTTP_PORT": "80",
    "HTTPS_PORT": "443",
    "SERVICE_PORT": "4242",
    "PAGE_PORT": "4243",
    "DAGSTER_PORT": "3001",
    "MLFLOW_PORT": "5050",
    "EVIDENTLY_PORT": "8000",
    "PROMETHEUS_PORT": "9090",
    "ALERTMANAGER_PORT": "9093",
    "GRAFANA_PORT": "3000",
    "JUPYTER_PORT": "8888",
    "PGADMIN_PORT": "16543",
    "RAY_PORT": "8265",
}
"""What docker/compose.yaml takes for a variable that docker/.env leaves empty; those that are asked for here, see
`setting`."""
_COMPOSE_VARIABLES = ("COMPOSE_FILE", "COMPOSE_PROJECT_NAME", "COMPOSE_ENV_FILES", "COMPOSE_PROFILES")
_PROJECT = "com.docker.compose.project"
_SERVICE = "com.docker.compose.service"


@dataclass(frozen=True)
class Container:
    """One container of the project."""

    id: str
    name: str
    service: str
    state: str
    """created, running, exited, restarting, …"""
    status: str
    """As Docker words it, such as `Up 2 minutes (healthy)` or `Exited (0) 3 seconds ago`."""

    @property
    def is_well(self) -> bool:
        """Whether it runs and is healthy, or is a one-shot that has done its task."""
        return (self.state == "running" and "(healthy)" in self.status) or self._has_done_its_task

    @property
    def is_lost(self) -> bool:
        """Whether waiting is useless; what ends again and again is running most of the time, see `restarts`."""
        return "(unhealthy)" in self.status or (self.state == "exited" and not self._has_done_its_task)

    @property
    def _has_done_its_task(self) -> bool:
        return self.service in ONE_SHOTS and self.status.startswith("Exited (0)")


def environment() -> dict[str, str]:
    """Returns this process' environment without what docker/.env decides: Compose would prefer an exported value."""
    decided = {*read_env(EXAMPLE), *_COMPOSE_VARIABLES}
    return {name: value for name, value in os.environ.items() if name not in decided}


def docker(*arguments: str, seconds: float = 60.0, stdin: bytes = b"") -> str:
    """Runs a short `docker` command, with `stdin` as its input, and returns what it prints.

    Raises:
        ServiceError: it failed, is not there, or took too long.
    """
    command = ["docker", *arguments]
    try:
        done = subprocess.run(
            command, input=stdin, capture_output=True, check=False, timeout=seconds, env=environment()
        )
    except FileNotFoundError as err:
        raise ServiceError("Expected the command docker. Received: none on PATH. Install Docker Engine.") from err
    except subprocess.TimeoutExpired as err:
        raise ServiceError(
            f"Expected `{' '.join(command[:4])} …` to end within {seconds:.0f} s. Received: no end. "
            "Look at Docker's log."
        ) from err
    if done.returncode != 0:
        error = (done.stderr or done.stdout).decode(errors="replace").strip()[-2000:]
        raise ServiceError(f"`{' '.join(command[:5])} …` failed ({done.returncode}): {error}")
    return done.stdout.decode(errors="replace").strip()


def compose(*arguments: str) -> None:
    """Runs a Compose command whose output is for the person who looks on.

    Raises:
        ServiceError: it failed; Compose has said why.
    """
    status = subprocess.run(compose_command(*arguments), check=False, env=environment()).returncode
    if status != 0:
        raise ServiceError(f"`docker compose {' '.join(arguments)}` failed ({status}); its reason is above.")


def compose_command(*arguments: str, env_file: Path | None = None) -> list[str]:
    """Returns the command line of a Compose command, with the settings of `env_file`; None: `ENV_FILE`.

    Who runs it gives it `environment`, so that these settings are the only ones.
    """
    return ["docker", "compose", "--file", str(COMPOSE_FILE), "--env-file", str(env_file or ENV_FILE), *arguments]


def setting(values: Mapping[str, str], name: str) -> str:
    """Returns a variable of docker/.env, or what docker/compose.yaml takes where it is empty.

    Args:
        values: of docker/.env.
        name: one of `DEFAULTS`.
    """
    return values.get(name) or DEFAULTS[name]


def project_name(values: Mapping[str, str]) -> str:
    """Returns the name of the project, as docker/compose.yaml has it."""
    return setting(values, "STACK_NAME")


def profiles(values: Mapping[str, str]) -> set[str]:
    """Returns the profiles that are on, as docker/.env has them."""
    return {name.strip() for name in values.get("COMPOSE_PROFILES", "").split(",") if name.strip()}


def containers(project: str, *services: str) -> list[Container]:
    """Returns the containers of the project's services, stopped ones too; of these services, or of all."""
    fields = f'{{{{.ID}}}}\t{{{{.Names}}}}\t{{{{.Label "{_SERVICE}"}}}}\t{{{{.State}}}}\t{{{{.Status}}}}'
    # Those of runs, and of `docker compose run`, come and go.
    filters = ["--filter", f"label={_PROJECT}={project}", "--filter", "label=com.docker.compose.oneoff=False"]
    listing = docker("ps", "--all", "--no-trunc", *filters, "--format", fields)
    found = [Container(*line.split("\t")) for line in listing.splitlines()]
    return sorted(
        (c for c in found if not services or c.service in services), key=lambda c: (c.service, natural(c.name))
    )


def run_containers(project: str) -> list[str]:
    """Returns the ids of the containers that run-gate has made for runs of Dagster, of ended runs too."""
    filters = ["--filter", f"label={_PROJECT}={project}", "--filter", f"label={RUN_LABEL}"]
    return docker("ps", "--all", "--quiet", "--no-trunc", *filters).split()


def restarts(container: Container) -> int:
    """Returns how often Docker has started a container again since `docker compose up` did."""
    return int(docker("inspect", "--format", "{{.RestartCount}}", container.id))


def volumes(project: str) -> list[str]:
    """Returns the names of the project's volumes."""
    listing = docker("volume", "ls", "--filter", f"label={_PROJECT}={project}", "--format", "{{.Name}}")
    return sorted(listing.splitlines())


def present_volumes(values: Mapping[str, str]) -> list[str]:
    """Returns the names of those `RESTORED_VOLUMES` which exist and are the ones that docker/.env means."""
    project = project_name(values)
    names = {f"{project}_{volume}{values.get(SUFFIX, '')}" for volume in RESTORED_VOLUMES}
    return [name for name in volumes(project) if name in names]


def last_lines(container: Container, count: int = 25) -> str:
    """Returns the end of a container's log."""
    return log_end(container.id, count)


def log_end(container_id: str, count: int = 25) -> str:
    """Returns the last lines that a container has printed."""
    command = ["docker", "logs", "--tail", str(count), container_id]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr).strip()


def version_tuple(text: str) -> tuple[int, ...]:
    """Returns the numbers of a version such as `v2.26.1-4`: (2, 26, 1)."""
    found = re.match(r"v?(\d+(?:\.\d+)*)", text.strip())
    return tuple(int(part) for part in found[1].split(".")) if found else ()


def natural(name: str) -> Sequence[object]:
    """Returns a sort key that puts service-10 after service-9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
