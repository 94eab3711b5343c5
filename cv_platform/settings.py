"""Where an installation keeps its state and what its service allows, read from environment variables (`Settings`).

This module is the only reader of the environment and the only place where a default of it is written down; experiments
are `config`'s part.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit, urlunsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, ValidationInfo, field_validator

from cv_platform.errors import ConfigError
from cv_platform.loopback import past_proxies


class Settings(BaseModel):
    """Where this installation keeps its state; read once from the environment by `Settings.from_environment`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    home: Path = Field(description="CV_HOME: everything embedded lives here; by default .cv_platform in the checkout")
    dagster_home: Path = Field(description="DAGSTER_HOME: Dagster's instance; by default below CV_HOME")
    configs: Path = Field(description="CV_CONFIGS: one YAML or a folder of them")
    storage_url: str = Field(description="CV_STORAGE: central storage, a folder or s3://bucket/prefix")
    database_url: SecretStr | None = Field(
        default=None, description="DATABASE_URL: request log; none: embedded PostgreSQL"
    )
    mlflow_tracking_uri: str = Field(description="MLFLOW_TRACKING_URI; by default SQLite below CV_HOME")
    mlflow_public_url: str | None = Field(
        default=None,
        pattern=r"^https?://",
        description="MLFLOW_PUBLIC_URL: where people open MLflow; by default MLFLOW_TRACKING_URI if that is an address",
    )
    revision: str | None = Field(
        default=None, description="CV_REVISION: the code's commit where there is no repository; images have it"
    )
    evidently_url: str | None = Field(
        default=None, description="EVIDENTLY_URL: Evidently server; none: a workspace folder"
    )
    admin_token: SecretStr | None = Field(default=None, description="CV_ADMIN_TOKEN: opens the service's admin routes")
    api_keys: tuple[SecretStr, ...] = Field(
        default=(), description="CV_API_KEYS: comma-separated; closes /predict to others"
    )
    alert_urls: tuple[SecretStr, ...] = Field(default=(), description="CV_ALERT_URLS: apprise URLs, comma-separated")
    service_workers: int = Field(default=2, ge=1, le=64, description="CV_SERVICE_WORKERS")
    service_name: str = Field(
        default="image_classifier", description="CV_SERVICE: whose production pointer the service follows"
    )
    service_port: int = Field(default=4242, ge=1, le=65535, description="CV_SERVICE_PORT")
    dagster_port: int = Field(default=3001, ge=1, le=65535, description="CV_DAGSTER_PORT")
    mlflow_port: int = Field(default=5050, ge=1, le=65535, description="CV_MLFLOW_PORT")
    evidently_port: int = Field(default=8000, ge=1, le=65535, description="CV_EVIDENTLY_PORT")
    postgres_port: int | None = Field(
        default=None, ge=1, le=65535, description="CV_POSTGRES_PORT; none: a free port, kept"
    )
    max_upload_bytes: int = Field(default=10_000_000, ge=1024, description="CV_MAX_UPLOAD_BYTES")
    max_upload_pixels: int = Field(default=40_000_000, ge=64, description="CV_MAX_UPLOAD_PIXELS")
    request_memory_bytes: int | None = Field(
        default=None,
        ge=2**24,
        description="CV_REQUEST_MEMORY_BYTES of a worker's uploads and decoded images; none: from the memory there is",
    )
    max_batch_files: int = Field(default=32, ge=1, le=256, description="CV_MAX_BATCH_FILES: of one POST /predict/batch")
    predict_threads: int | None = Field(
        default=None, ge=1, le=256, description="CV_PREDICT_THREADS of each worker; none: the cores' share"
    )
    predict_timeout_seconds: float = Field(
        default=30.0, gt=0.0, le=600.0, description="CV_PREDICT_TIMEOUT_SECONDS: then 504"
    )
    max_in_flight: int | None = Field(
        default=None, ge=1, le=10_000, description="CV_MAX_IN_FLIGHT: predictions a worker takes; more get 429"
    )
    rate_limit_per_minute: int | None = Field(
        default=None, ge=1, description="CV_RATE_LIMIT_PER_MINUTE: images of each API key; none: no limit"
    )
    allowed_hosts: tuple[str, ...] = Field(
        default=(), description="CV_ALLOWED_HOSTS: comma-separated Host headers that are answered; none: any"
    )
    cors_origins: tuple[str, ...] = Field(
        default=(), description="CV_CORS_ORIGINS: comma-separated origins whose pages may call; none: only its own page"
    )
    log_images: Literal["all", "sampled", "none"] = Field(
        default="all", description="CV_LOG_IMAGES: which uploads are stored; sampled: one in ten, chosen by its content"
    )
    log_retention_days: int | None = Field(
        default=365, ge=1, description="CV_LOG_RETENTION_DAYS: older rows of the request log are deleted; 0: never"
    )
    image_retention_days: int | None = Field(
        default=90, ge=1, description="CV_IMAGE_RETENTION_DAYS: older stored uploads are deleted; 0: never"
    )
    gc_keep_days: int = Field(
        default=30, ge=0, description="CV_GC_KEEP_DAYS: `cv-platform gc` deletes nothing that is younger"
    )
    gc_keep_versions: int = Field(
        default=3, ge=1, description="CV_GC_KEEP_VERSIONS: newest versions of each model that `gc` keeps anyway"
    )
    mlflow_artifacts: Path | None = Field(
        default=None,
        description="CV_MLFLOW_ARTIFACTS: folder of an MLflow server's artifacts, for `gc`; none: it leaves them alone",
    )
    spare_disk_bytes: int = Field(
        default=256 * 2**20,
        ge=0,
        description="CV_SPARE_DISK_BYTES: left free by every large write, and by the log's spool (at least 32 MiB)",
    )
    spool_max_bytes: int = Field(
        default=10_000_000_000,
        ge=1_000_000,
        description="CV_SPOOL_MAX_BYTES: of each worker's log entries that wait for the database; then 503",
    )
    spool_archive: Path | None = Field(
        default=None,
        description="CV_SPOOL_ARCHIVE: folder for a full spool's oldest entries where there is no database; "
        "none: they are dropped",
    )
    log_format: Literal["text", "json"] = Field(default="json", description="CV_LOG_FORMAT of the service's log")
    otlp_endpoint: str | None = Field(
        default=None, description="OTEL_EXPORTER_OTLP_ENDPOINT: where traces go; none: no traces"
    )

    @field_validator("spool_archive")
    @classmethod
    def _is_no_spool(cls, archive: Path | None, info: ValidationInfo) -> Path | None:
        spool = info.data["home"] / "spool"
        if archive is not None and archive.expanduser().absolute() == spool:
            raise ValueError(f"Expected another folder than {spool}, whose entries are to leave it")
        return archive

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            parts = urlsplit(origin)
            if (
                parts.scheme not in {"http", "https"}
                or f"{parts.scheme}://{parts.netloc}" != origin
                or not parts.hostname
            ):
                raise ValueError(
                    f"Expected origins such as https://app.example.org, without a path. Received: {origin}"
                )
        return tuple(origin.lower() for origin in origins)

    @field_validator("storage_url")
    @classmethod
    def _has_known_scheme(cls, url: str) -> str:
        # A chain such as simplecache::s3://bucket names its storage last.
        scheme = url.partition("://")[0].rpartition("::")[2]
        if "://" in url:
            # Late: fsspec is of no use to an installation in a folder. A scheme without its driver is storage's part.
            from fsspec import available_protocols  # pyright: ignore[reportMissingTypeStubs]

            if scheme not in available_protocols():
                raise ValueError("Expected a folder, or a URL of a known scheme, such as s3://bucket/prefix")
        return url

    @property
    def mlflow_pages(self) -> str:
        """Where links to MLflow lead: `mlflow_public_url`, or the server that `cv-platform up` starts."""
        return self.mlflow_public_url or f"http://127.0.0.1:{self.mlflow_port}"

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Self:
        """Reads the environment (or `environ`).

        Raises:
            ConfigError: a variable has a wrong value, or a secret is a placeholder; all of them are named.
        """
        env = os.environ if environ is None else environ
        home = Path(env.get("CV_HOME") or checkout() / ".cv_platform").expanduser().absolute()
        values: dict[str, Any] = {
            "home": home,
            "dagster_home": Path(env.get("DAGSTER_HOME") or home / "dagster").expanduser().absolute(),
            "configs": Path(env.get("CV_CONFIGS") or checkout() / "configs").expanduser().absolute(),
            "storage_url": env.get("CV_STORAGE") or str(home / "storage"),
            "mlflow_tracking_uri": env.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home / 'mlflow' / 'mlflow.db'}",
            "mlflow_public_url": env.get("MLFLOW_PUBLIC_URL") or _address(env.get("MLFLOW_TRACKING_URI", "")),
            "api_keys": tuple(part.strip() for part in env.get("CV_API_KEYS", "").split(",") if part.strip()),
            "allowed_hosts": tuple(part.strip() for part in env.get("CV_ALLOWED_HOSTS", "").split(",") if part.strip()),
            "cors_origins": tuple(part.strip() for part in env.get("CV_CORS_ORIGINS", "").split(",") if part.strip()),
            "alert_urls": tuple(part.strip() for part in env.get("CV_ALERT_URLS", "").split(",") if part.strip()),
        }
        for field, variable in _PLAIN_VARIABLES.items():
            if env.get(variable):
                values[field] = env[variable]
        for field in ("log_retention_days", "image_retention_days"):
            if str(values.get(field, "")).strip() == "0":
                values[field] = None
        placeholders = [
            variable
            for variable in ("DATABASE_URL", "CV_ADMIN_TOKEN", "CV_API_KEYS")
            if any(word in env.get(variable, "").lower() for word in _PLACEHOLDERS)
        ]
        if placeholders:
            raise ConfigError(
                f"Expected real secrets. Received placeholders in: {', '.join(placeholders)}. "
                'Write a random value, as from: python -c "import secrets; print(secrets.token_urlsafe(32))"'
            )
        try:
            return cls(**values)
        except ValidationError as err:
            variables = {
                **_PLAIN_VARIABLES,
                "mlflow_public_url": "MLFLOW_PUBLIC_URL",
                "home": "CV_HOME",
                "configs": "CV_CONFIGS",
                "storage_url": "CV_STORAGE",
                "cors_origins": "CV_CORS_ORIGINS",
            }
            lines = [
                f"  {variables.get(str(e['loc'][0]), str(e['loc'][0]))}: {e['msg'].removeprefix('Value error, ')}. "
                f"Received: {e['input']!r}"
                for e in err.errors()
            ]
            raise ConfigError("The environment is wrong:\n" + "\n".join(lines)) from err


def checkout() -> Path:
    """Returns the repository that this code lies in, wherever a command is typed; without one, where that is."""
    folder = Path(__file__).resolve().parents[1]
    return folder if (folder / "workspace.yaml").is_file() else Path.cwd()


def overlooked_home() -> Path | None:
    """Returns an installation in the folder where a command is typed, which it does not use; None: there is none.

    Up to release 0.1 that was the default, and a second one appeared wherever somebody typed.
    """
    here = Path.cwd() / ".cv_platform"
    is_used = os.environ.get("CV_HOME") or here == checkout() / ".cv_platform"
    return here if not is_used and (here / "FORMAT_VERSION").is_file() else None


def _address(uri: str) -> str | None:
    """Returns a web address without the name and password in it; None for what is no web address."""
    parts = urlsplit(uri)
    if parts.scheme not in {"http", "https"}:
        return None
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


_PLAIN_VARIABLES = {
    "revision": "CV_REVISION",
    "database_url": "DATABASE_URL",
    "evidently_url": "EVIDENTLY_URL",
    "admin_token": "CV_ADMIN_TOKEN",
    "service_workers": "CV_SERVICE_WORKERS",
    "service_name": "CV_SERVICE",
    "service_port": "CV_SERVICE_PORT",
    "dagster_port": "CV_DAGSTER_PORT",
    "mlflow_port": "CV_MLFLOW_PORT",
    "evidently_port": "CV_EVIDENTLY_PORT",
    "postgres_port": "CV_POSTGRES_PORT",
    "max_upload_bytes": "CV_MAX_UPLOAD_BYTES",
    "max_upload_pixels": "CV_MAX_UPLOAD_PIXELS",
    "request_memory_bytes": "CV_REQUEST_MEMORY_BYTES",
    "max_batch_files": "CV_MAX_BATCH_FILES",
    "predict_threads": "CV_PREDICT_THREADS",
    "predict_timeout_seconds": "CV_PREDICT_TIMEOUT_SECONDS",
    "max_in_flight": "CV_MAX_IN_FLIGHT",
    "rate_limit_per_minute": "CV_RATE_LIMIT_PER_MINUTE",
    "log_images": "CV_LOG_IMAGES",
    "log_retention_days": "CV_LOG_RETENTION_DAYS",
    "image_retention_days": "CV_IMAGE_RETENTION_DAYS",
    "gc_keep_days": "CV_GC_KEEP_DAYS",
    "gc_keep_versions": "CV_GC_KEEP_VERSIONS",
    "mlflow_artifacts": "CV_MLFLOW_ARTIFACTS",
    "spare_disk_bytes": "CV_SPARE_DISK_BYTES",
    "spool_max_bytes": "CV_SPOOL_MAX_BYTES",
    "spool_archive": "CV_SPOOL_ARCHIVE",
    "log_format": "CV_LOG_FORMAT",
    "otlp_endpoint": "OTEL_EXPORTER_OTLP_ENDPOINT",
}
_PLACEHOLDERS = (
    "user:password@",
    "changeme",
    "change-me",
    "change_me",
    "placeholder",
    "your-secret",
    "yourpassword",
    "<",
    "example-secret",
)


def quiet_variables() -> dict[str, str]:
    """Returns what every process of the platform exports unless the user has: no telemetry, chatter or idle helpers."""
    return {
        "DAGSTER_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "BENTOML_DO_NOT_TRACK": "True",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # Helpers of MLflow's server for language models: seven processes, 1.4 GB.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "DISABLE_LATEST_VERSION_CHECK": "True",
        "DISABLE_DEEPCHECKS_ANONYMOUS_TELEMETRY": "True",
        "DVC_NO_ANALYTICS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "TF_ENABLE_ONEDNN_OPTS": "1",
    }


def process_environment(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Returns the environment (or `environ`) with `quiet_variables`, and without a proxy before this machine."""
    env = os.environ if environ is None else environ
    return {**quiet_variables(), **env, **past_proxies(env)}


def prepare_process() -> None:
    """Makes `process_environment` that of this process: before libraries are imported, as they read it then."""
    os.environ.update(process_environment())
