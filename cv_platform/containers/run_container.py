"""What the container of a Dagster run is: the code location's own, with the run's command.

Image, user, environment, volumes, networks, limits and rights stand in docker/compose.yaml, once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

RUN_LABEL = "cv-platform.run"
COMPOSE_LABEL = "com.docker.compose."
_RUN_ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_JOB_NAME = re.compile(r"\w{1,200}")


@dataclass(frozen=True)
class RunRequest:
    """What Dagster decides about a run's container."""

    command: tuple[str, ...]
    run_id: str
    job: str

    @classmethod
    def read(cls, body: bytes) -> RunRequest | None:
        """Returns what dagster-docker's `DockerRunLauncher` asks the engine for; None for any other request."""
        try:
            asked = json.loads(body)
            command, labels = asked["Cmd"], asked["Labels"]
            run_id, job = labels["dagster/run_id"], labels["dagster/job_name"]
        except (ValueError, KeyError, TypeError):
            return None
        is_command = isinstance(command, list) and all(isinstance(part, str) for part in command)
        if not is_command or command[:2] != ["dagster", "api"]:
            return None
        if not isinstance(run_id, str) or not isinstance(job, str):
            return None
        return cls(tuple(command), run_id, job) if _RUN_ID.fullmatch(run_id) and _JOB_NAME.fullmatch(job) else None


def container_of_run(template: Mapping[str, Any], run: RunRequest) -> dict[str, Any]:
    """Returns the container of a run: the code location's with another command.

    Compose takes it for a one-off of that service, as `docker compose run` makes them: `up` lets it work.

    Args:
        template: the code location's container, as the engine describes it.
        run: Dagster's part.
    """
    config, host = template["Config"], template["HostConfig"]
    labels = {
        name: value
        for name, value in config["Labels"].items()
        if name.startswith(COMPOSE_LABEL) and not name.endswith((".config-hash", ".depends_on"))
    }
    return {
        # By its digest: a run is of the code that the code location has loaded, though a newer image has the name now.
        "Image": template["Image"],
        "Cmd": list(run.command),
        "Env": [*config["Env"], f"DAGSTER_RUN_JOB_NAME={run.job}"],
        "User": config["User"],
        "WorkingDir": config["WorkingDir"],
        "StopTimeout": config.get("StopTimeout"),
        "Labels": {
            **labels,
            f"{COMPOSE_LABEL}oneoff": "True",
            "dagster/run_id": run.run_id,
            "dagster/job_name": run.job,
            RUN_LABEL: run.run_id,
        },
        # What ends is started again by Dagster, not by Docker: it knows which steps are done.
        "HostConfig": {
            **host,
            "RestartPolicy": {"Name": "no"},
            "AutoRemove": False,
            "PortBindings": {},
            "ContainerIDFile": "",
        },
    }
