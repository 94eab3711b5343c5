"""What every process of an installation shares: its folders, its environment, and the logs of its runs."""

from __future__ import annotations

import json
import os
import re
import secrets
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

from cv_platform.client.loopback import is_loopback
from cv_platform.errors import ConfigError
from cv_platform.files import write_file
from cv_platform.maintenance.moved_home import LOCATION, settle_home, write_location
from cv_platform.settings import Settings, process_environment

REPOSITORY = Path(__file__).resolve().parents[2]
HOME_FORMAT = "1"
"""Layout of `CV_HOME`; a release that changes it raises this and says how to move."""

KEPT_RUN_LOGS = 20
"""Of each experiment; `cv-platform gc` deletes old ones of them, too."""
_RUN_LOG = re.compile(r"run-[a-z0-9_]+-[0-9]{8}T[0-9]{6}Z-[0-9a-f]{8}\.log")


def platform_environment(settings: Settings, *, database_url: str | None = None) -> dict[str, str]:
    """Returns the environment of every process of this installation, with absolute folders and no telemetry."""
    environment = {
        **process_environment(),
        "CV_HOME": str(settings.home),
        "CV_CONFIGS": str(settings.configs),
        "CV_STORAGE": settings.storage_url,
        "MLFLOW_TRACKING_URI": settings.mlflow_tracking_uri,
        "DAGSTER_HOME": str(settings.dagster_home),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH", "")])),
        "PYTHONUNBUFFERED": "1",
    }
    # Dagster gives up the start of a run after a minute, which a machine that trains may need to load the code.
    environment.setdefault("DAGSTER_GRPC_TIMEOUT_SECONDS", "300")
    # The service cannot tell by itself: a Bento elsewhere has the same defaults, and no MLflow beside it.
    if settings.mlflow_tracking_uri.startswith("sqlite:"):
        environment["MLFLOW_PUBLIC_URL"] = settings.mlflow_pages
    if not is_loopback(settings.mlflow_pages):
        # Behind a proxy MLflow's server gets requests for that name, which it refuses unless it was told.
        page = urlsplit(settings.mlflow_pages)
        hosts = f"{page.hostname},{page.hostname}:*,localhost:*,127.0.0.1:*"
        environment.setdefault("MLFLOW_SERVER_ALLOWED_HOSTS", hosts)
        environment.setdefault("MLFLOW_SERVER_CORS_ALLOWED_ORIGINS", f"{page.scheme}://{page.netloc}")
    url = database_url or (settings.database_url.get_secret_value() if settings.database_url else None)
    if url:
        environment["DATABASE_URL"] = url
    return environment


def prepare_home(settings: Settings) -> None:
    """Makes `$CV_HOME` and its Dagster instance (`dagster.yaml` from the repository's, with absolute folders).

    Raises:
        ConfigError: there is no such file, the format is another one, or it was moved and something uses it.
    """
    settings.home.mkdir(parents=True, exist_ok=True)
    (settings.home / "logs").mkdir(exist_ok=True)
    (settings.home / "run").mkdir(mode=0o700, exist_ok=True)
    version_file = settings.home / "FORMAT_VERSION"
    found = version_file.read_text().strip() if version_file.exists() else HOME_FORMAT
    if found != HOME_FORMAT:
        raise ConfigError(
            f"Expected an installation of format {HOME_FORMAT} at {settings.home}. Received: format {found}. "
            "Use the release that made it, or set CV_HOME to a new folder."
        )
    write_file(version_file, f"{HOME_FORMAT}\n")
    settle_home(settings)
    if not (settings.home / LOCATION).exists():
        write_location(settings.home)
    if settings.dagster_home != settings.home / "dagster":
        return  # Somebody's own instance: its dagster.yaml is theirs.
    try:
        template = (REPOSITORY / "dagster.yaml").read_text(encoding="utf-8")
    except FileNotFoundError as err:
        raise ConfigError(
            f"Expected cv_platform in a checkout of its repository, with dagster.yaml. Received: {REPOSITORY} without. "
            "Clone the repository, and run `make setup` there."
        ) from err

    def absolute(match: re.Match[str]) -> str:
        # Quoted: a folder's name may mean something in YAML.
        return match[1] + json.dumps(str(settings.home / match[2]))

    content = re.sub(r"(base_dir: )\.cv_platform/(\S+)", absolute, template)
    write_file(settings.dagster_home / "dagster.yaml", content)  # A running daemon may read it at any moment.


def new_run_log(folder: Path, name: str) -> Path:
    """Makes the empty log of a new run, `run-<name>-<UTC time>-<8 hex digits>.log`; of old ones the newest 19 stay."""
    folder.mkdir(parents=True, exist_ok=True)
    older = [path for path in folder.glob(f"run-{name}-*.log") if _RUN_LOG.fullmatch(path.name)]
    for path in sorted(older)[: -(KEPT_RUN_LOGS - 1)]:
        path.unlink(missing_ok=True)  # Two runs may start at once.
    log = folder / f"run-{name}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}.log"
    log.touch(exist_ok=False)
    return log
