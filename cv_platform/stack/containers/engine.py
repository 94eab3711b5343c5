"""The `docker` command, and what this project's containers are doing.

https://docs.docker.com/reference/cli/docker/
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cv_platform.errors import ServiceError

REPOSITORY = Path(__file__).resolve().parents[3]
DOCKER = REPOSITORY / "docker"
COMPOSE_FILE = DOCKER / "compose.yaml"
EXAMPLE = DOCKER / ".env.example"
ENV_FILE = DOCKER / ".env"
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
        """Whether it runs and is healthy, or has done its one task."""
        return (self.state == "running" and "(healthy)" in self.status) or self.status.startswith("Exited (0)")

    @property
    def is_lost(self) -> bool:
        """Whether waiting is useless; what ends again and again is running most of the time, see `restarts`."""
        return "(unhealthy)" in self.status or (self.state == "exited" and not self.status.startswith("Exited (0)"))


def docker(*arguments: str, seconds: float = 60.0) -> str:
    """Runs a short `docker` command and returns what it prints.

    Raises:
        ServiceError: it failed, is not there, or took too long.
    """
    command = ["docker", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    except FileNotFoundError as err:
        raise ServiceError("Expected the command docker. Received: none on PATH. Install Docker Engine.") from err
    except subprocess.TimeoutExpired as err:
        raise ServiceError(
            f"Expected `{' '.join(command[:4])} …` to end within {seconds:.0f} s. Received: no end. "
            "Look at Docker's log."
        ) from err
    if done.returncode != 0:
        error = (done.stderr or done.stdout).strip()[-2000:]
        raise ServiceError(f"`{' '.join(command[:5])} …` failed ({done.returncode}): {error}")
    return done.stdout.strip()


def compose(*arguments: str) -> None:
    """Runs a Compose command whose output is for the person who looks on.

    Raises:
        ServiceError: it failed; Compose has said why.
    """
    command = ["docker", "compose", "--file", str(COMPOSE_FILE), "--env-file", str(ENV_FILE), *arguments]
    status = subprocess.run(command, check=False).returncode
    if status != 0:
        raise ServiceError(f"`docker compose {' '.join(arguments)}` failed ({status}); its reason is above.")


def project_name(values: Mapping[str, str]) -> str:
    """Returns the name of the project, as docker/compose.yaml has it."""
    return values.get("STACK_NAME") or "cv-platform"


def containers(project: str, *services: str) -> list[Container]:
    """Returns the project's containers, stopped ones too; of these services, or of all."""
    fields = f'{{{{.ID}}}}\t{{{{.Names}}}}\t{{{{.Label "{_SERVICE}"}}}}\t{{{{.State}}}}\t{{{{.Status}}}}'
    listing = docker("ps", "--all", "--no-trunc", "--filter", f"label={_PROJECT}={project}", "--format", fields)
    found = [Container(*line.split("\t")) for line in listing.splitlines()]
    return sorted(
        (c for c in found if not services or c.service in services), key=lambda c: (c.service, natural(c.name))
    )


def restarts(container: Container) -> int:
    """Returns how often Docker has started a container again since `docker compose up` did."""
    return int(docker("inspect", "--format", "{{.RestartCount}}", container.id))


def volumes(project: str) -> list[str]:
    """Returns the names of the project's volumes."""
    listing = docker("volume", "ls", "--filter", f"label={_PROJECT}={project}", "--format", "{{.Name}}")
    return sorted(listing.splitlines())


def last_lines(container: Container, count: int = 25) -> str:
    """Returns the end of a container's log."""
    command = ["docker", "logs", "--tail", str(count), container.id]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr).strip()


def version_tuple(text: str) -> tuple[int, ...]:
    """Returns the numbers of a version such as `v2.26.1-4`: (2, 26, 1)."""
    found = re.match(r"v?(\d+(?:\.\d+)*)", text.strip())
    return tuple(int(part) for part in found[1].split(".")) if found else ()


def natural(name: str) -> Sequence[object]:
    """Returns a sort key that puts service-10 after service-9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
