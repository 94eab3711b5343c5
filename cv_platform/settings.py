"""Where an installation keeps its state and what its service allows, read from environment variables (`Settings`).

This module is the only reader of the environment and the only place where a default of it is written down; experiments
are `config`'s part. `reference` writes `.env.example` and a page of the documentation from the fields.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit, urlunsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from cv_platform.errors import ConfigError
from cv_platform.loopback import past_proxies


def checkout() -> Path:
    """Returns the repository that this code lies in, wherever a command is typed; without one, where that is."""
    folder = Path(__file__).resolve().parents[1]
    return folder if (folder / "workspace.yaml").is_file() else Path.cwd()


def _absolute(path: Path) -> Path:
    return path.expanduser().absolute()


def _split(value: object) -> object:
    """Takes text with commas for the parts between them."""
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _never_for_zero(value: object) -> object:
    return None if str(value).strip() == "0" else value


def _address(uri: str) -> str | None:
    """Returns a web address without the name and password in it; None for what is no web address."""
    parts = urlsplit(uri)
    if parts.scheme not in {"http", "https"}:
        return None
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


Folder = Annotated[Path, AfterValidator(_absolute)]
Port = Annotated[int, Field(ge=1, le=65535)]
Days = Annotated[Annotated[int, Field(ge=1)] | None, BeforeValidator(_never_for_zero)]
Listed = BeforeValidator(_split)


class Settings(BaseModel):
    """Where this installation keeps its state; read once from the environment by `Settings.from_environment`.

    The alias of a field is its variable; a variable that is set to nothing counts as not set.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_by_name=True, validate_by_alias=True)

    home: Folder = Field(
        validation_alias="CV_HOME",
        default_factory=lambda: checkout() / ".cv_platform",
        examples=["/srv/cv_platform"],
        description="Everything embedded lives here; deleting it resets the installation. By default `.cv_platform` in "
        "the checkout, wherever a command is typed.",
    )
    configs: Folder = Field(
        validation_alias="CV_CONFIGS",
        default_factory=lambda: checkout() / "configs",
        examples=["/srv/configs"],
        description="One YAML, or a folder of them. By default `configs` in the checkout.",
    )
    strict_configs: bool = Field(
        default=False,
        validation_alias="CV_STRICT_CONFIGS",
        description="Refuse to load the definitions where a config is broken, as a check does; otherwise it becomes an "
        "asset that shows its error, and the other experiments go on.",
    )
    storage_url: str = Field(
        validation_alias="CV_STORAGE",
        default_factory=lambda data: str(data["home"] / "storage"),
        examples=["s3://bucket/prefix"],
        description="Central storage: a folder, or `s3://bucket/prefix` (extra `s3`). By default `$CV_HOME/storage`.",
    )
    share_packs: bool = Field(
        default=False,
        validation_alias="CV_SHARE_PACKS",
        description="Packed images are published to `CV_STORAGE`, in its folder shards, and taken from there if "
        "another installation has made them: the index at once, a shard when it is first used, and verified then. In "
        "a folder they are read where they lie. `cv-platform gc` leaves them alone. Images of a version are sent to "
        "its folder images where a Ray node does not see them otherwise; of those `cv-platform gc` removes what no "
        "version needs.",
    )
    dagster_home: Folder = Field(
        validation_alias="DAGSTER_HOME",
        default_factory=lambda data: data["home"] / "dagster",
        description="Dagster's instance. By default `$CV_HOME/dagster`.",
    )
    compute: Literal["local", "ray"] = Field(
        default="local",
        validation_alias="CV_COMPUTE",
        description="Who works on manifests, packed pixels, embeddings, batch scores and replays: processes of this "
        "machine, or a cluster of Ray (extra `ray`), which evaluates, answers for reference data and drift detectors, "
        "and does trials of a search and `train.workers`, too.",
    )
    ray_address: str | None = Field(
        default=None,
        validation_alias="CV_RAY_ADDRESS",
        examples=["192.168.1.10:6379"],
        description="With `CV_COMPUTE=ray`: a running cluster, whose nodes see `CV_HOME` and `CV_STORAGE` where this "
        "machine does, or read and write `CV_STORAGE` alone (`CV_SHARE_PACKS`). Without it, one is started on this "
        "machine.",
    )
    ray_jobs_url: str | None = Field(
        default=None,
        validation_alias="CV_RAY_JOBS_URL",
        examples=["http://192.168.1.10:8265"],
        description="The server of jobs of a Ray cluster, where its dashboard is: for `train.job_gpus`, and for runs "
        "as jobs (`docker/dagster/dagster-ray.yaml`).",
    )
    database_url: SecretStr | None = Field(
        default=None,
        validation_alias="DATABASE_URL",
        examples=["postgresql://user:password@host:5432/request_log"],
        description="PostgreSQL of the request log. Without it, an embedded one.",
    )
    mlflow_tracking_uri: str = Field(
        validation_alias="MLFLOW_TRACKING_URI",
        default_factory=lambda data: f"sqlite:///{data['home'] / 'mlflow' / 'mlflow.db'}",
        examples=["http://mlflow:5050"],
        description="MLflow's server. By default SQLite below `CV_HOME`.",
    )
    mlflow_public_url: str | None = Field(
        validation_alias="MLFLOW_PUBLIC_URL",
        default_factory=lambda data: _address(data["mlflow_tracking_uri"]),
        pattern=r"^https?://",
        examples=["https://vision.example.org:5050"],
        description="Where links to MLflow lead, as people open it. By default the server's address, or the MLflow of "
        "`make up`.",
    )
    evidently_url: str | None = Field(
        default=None,
        validation_alias="EVIDENTLY_URL",
        examples=["http://evidently:8000"],
        description="Evidently's server. Without it, a folder below `CV_HOME`.",
    )
    revision: str | None = Field(
        default=None,
        validation_alias="CV_REVISION",
        description="The code's commit where there is no git repository; images have it.",
    )
    admin_token: SecretStr | None = Field(
        default=None,
        validation_alias="CV_ADMIN_TOKEN",
        description="Opens `PUT /update_model`, `POST /rollback` and `DELETE /predictions/{id}`, which are closed "
        "without it.",
    )
    api_keys: Annotated[tuple[SecretStr, ...], Listed] = Field(
        default=(),
        validation_alias="CV_API_KEYS",
        description="Comma-separated. Close predictions and feedback to requests without one of them in the header "
        "`X-API-Key`, or as a Bearer token.",
    )
    labeller_keys: Annotated[tuple[SecretStr, ...], Listed] = Field(
        default=(),
        validation_alias="CV_LABELLER_KEYS",
        description="Comma-separated `name=key`, keys of at least 8 characters. Open the labelling page (`/labelling`) "
        "to people, whose labels carry their name; `CV_ADMIN_TOKEN` opens it as well.",
    )
    alert_urls: Annotated[tuple[SecretStr, ...], Listed] = Field(
        default=(),
        validation_alias="CV_ALERT_URLS",
        description="Where alerts go: [apprise](https://github.com/caronc/apprise) URLs, comma-separated.",
    )
    prometheus_url: str | None = Field(
        default=None,
        validation_alias="PROMETHEUS_URL",
        pattern=r"^https?://",
        examples=["http://prometheus:9090"],
        description="Whose firing alerts go there, too. Without it, what the service says of itself.",
    )
    service_name: str = Field(
        default="image_classifier",
        validation_alias="CV_SERVICE",
        description="Whose production pointer the service follows.",
    )
    service_workers: int = Field(
        default=2, ge=1, le=64, validation_alias="CV_SERVICE_WORKERS", description="Processes of the service."
    )
    service_port: Port = Field(default=4242, validation_alias="CV_SERVICE_PORT", description="Of the service.")
    dagster_port: Port = Field(default=3001, validation_alias="CV_DAGSTER_PORT", description="Of Dagster's pages.")
    mlflow_port: Port = Field(default=5050, validation_alias="CV_MLFLOW_PORT", description="Of MLflow.")
    evidently_port: Port = Field(default=8000, validation_alias="CV_EVIDENTLY_PORT", description="Of Evidently.")
    postgres_port: Port | None = Field(
        default=None,
        validation_alias="CV_POSTGRES_PORT",
        description="Of the embedded PostgreSQL. By default a free one, which is remembered.",
    )
    max_upload_bytes: int = Field(
        default=10_000_000, ge=1024, validation_alias="CV_MAX_UPLOAD_BYTES", description="Of one image; more get 413."
    )
    max_upload_pixels: int = Field(
        default=40_000_000,
        ge=64,
        validation_alias="CV_MAX_UPLOAD_PIXELS",
        description="Height × width of one image; more get 413, before decoding.",
    )
    request_memory_bytes: int | None = Field(
        default=None,
        ge=2**24,
        validation_alias="CV_REQUEST_MEMORY_BYTES",
        description="What a worker's uploads and decoded images take together; more get 429. By default 5/8 of the "
        "memory, divided by the workers.",
    )
    max_batch_files: int = Field(
        default=32, ge=1, le=256, validation_alias="CV_MAX_BATCH_FILES", description="Of one `POST /predict/batch`."
    )
    predict_threads: int | None = Field(
        default=None,
        ge=1,
        le=256,
        validation_alias="CV_PREDICT_THREADS",
        description="Predictions that a worker computes at the same time. By default the cores' share.",
    )
    predict_timeout_seconds: float = Field(
        default=30.0,
        gt=0.0,
        le=600.0,
        validation_alias="CV_PREDICT_TIMEOUT_SECONDS",
        description="Longest time of one prediction; then 504.",
    )
    max_in_flight: int | None = Field(
        default=None,
        ge=1,
        le=10_000,
        validation_alias="CV_MAX_IN_FLIGHT",
        description="Predictions that a worker takes on; more get 429. By default 16 for each thread and one batch.",
    )
    rate_limit_per_minute: int | None = Field(
        default=None,
        ge=1,
        validation_alias="CV_RATE_LIMIT_PER_MINUTE",
        description="Images per minute of each API key; more get 429. By default there is no limit.",
    )
    trusted_proxies: Annotated[tuple[str, ...], Listed] = Field(
        default=(),
        validation_alias="CV_TRUSTED_PROXIES",
        examples=["172.16.0.0/12"],
        description="Comma-separated addresses or networks of proxies whose `X-Real-IP` is the client's address. Then "
        "the client's network, its /24 (IPv4) or /48 (IPv6) and never the address, is in the request log, for drift "
        "and accuracy by part of the traffic. By default nobody is believed, and no network is kept.",
    )
    allowed_hosts: Annotated[tuple[str, ...], Listed] = Field(
        default=(),
        validation_alias="CV_ALLOWED_HOSTS",
        description="Comma-separated `Host` headers that are answered. By default any.",
    )
    cors_origins: Annotated[tuple[str, ...], Listed] = Field(
        default=(),
        validation_alias="CV_CORS_ORIGINS",
        examples=["https://app.example.org"],
        description="Comma-separated origins whose pages may call the service. By default only its own page.",
    )
    log_images: Literal["all", "sampled", "none"] = Field(
        default="all",
        validation_alias="CV_LOG_IMAGES",
        description="Which uploads are stored; sampled: one in ten, chosen by its content.",
    )
    log_retention_days: Days = Field(
        default=365,
        validation_alias="CV_LOG_RETENTION_DAYS",
        description="Older rows of the request log are deleted (0: never).",
    )
    image_retention_days: Days = Field(
        default=90,
        validation_alias="CV_IMAGE_RETENTION_DAYS",
        description="Older stored uploads are deleted (0: never).",
    )
    gc_keep_days: int = Field(
        default=30,
        ge=0,
        validation_alias="CV_GC_KEEP_DAYS",
        description="`cv-platform gc` deletes nothing that is younger.",
    )
    gc_keep_versions: int = Field(
        default=3,
        ge=1,
        validation_alias="CV_GC_KEEP_VERSIONS",
        description="Newest versions of each model that `cv-platform gc` keeps anyway.",
    )
    mlflow_artifacts: Path | None = Field(
        default=None,
        validation_alias="CV_MLFLOW_ARTIFACTS",
        description="Where an MLflow server's artifacts lie on this machine, for `cv-platform gc`. Without it, they "
        "are left alone.",
    )
    spare_disk_bytes: int = Field(
        default=256 * 2**20,
        ge=0,
        validation_alias="CV_SPARE_DISK_BYTES",
        description="Left free by large writes, which refuse to start otherwise, and by the request log (at least "
        "32 MiB).",
    )
    spool_max_bytes: int = Field(
        default=10_000_000_000,
        ge=1_000_000,
        validation_alias="CV_SPOOL_MAX_BYTES",
        description="Log entries of each worker that wait for the database; beyond, 503, or see `CV_SPOOL_ARCHIVE`.",
    )
    spool_archive: Path | None = Field(
        default=None,
        validation_alias="CV_SPOOL_ARCHIVE",
        description="Where there is no database: folder for the oldest entries of a full spool. Without it, they are "
        "dropped.",
    )
    log_format: Literal["text", "json"] = Field(
        default="json", validation_alias="CV_LOG_FORMAT", description="Of the service's log."
    )
    otlp_endpoint: str | None = Field(
        default=None,
        validation_alias="OTEL_EXPORTER_OTLP_ENDPOINT",
        examples=["http://collector:4318"],
        description="Where OpenTelemetry traces are sent. By default nowhere.",
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
                raise ValueError(f"Expected origins such as https://app.example.org, without a path, not {origin}")
        return tuple(origin.lower() for origin in origins)

    @field_validator("trusted_proxies")
    @classmethod
    def _are_networks(cls, proxies: tuple[str, ...]) -> tuple[str, ...]:
        for proxy in proxies:
            try:
                ipaddress.ip_network(proxy)
            except ValueError as err:
                raise ValueError(f"Expected addresses or networks such as 172.16.0.0/12: {err}") from err
        return proxies

    @field_validator("labeller_keys")
    @classmethod
    def _have_names(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        given = [key.get_secret_value().partition("=")[::2] for key in keys]
        if any(re.fullmatch(r"[A-Za-z0-9_.-]{1,40}", name) is None or len(key) < 8 for name, key in given):
            raise ValueError(
                "Expected name=key, with a key of at least 8 characters, of letters and digits in the name"
            )
        for position, what in enumerate(("names", "keys")):
            if len({pair[position] for pair in given}) < len(given):
                raise ValueError(f"Expected different {what}. Received: one twice")
        if "admin" in {name for name, _ in given}:
            raise ValueError("Expected other names than admin, which is who has CV_ADMIN_TOKEN")
        return keys

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
        placeholders = [
            variable
            for variable in ("DATABASE_URL", "CV_ADMIN_TOKEN", "CV_API_KEYS", "CV_LABELLER_KEYS")
            if any(word in env.get(variable, "").lower() for word in _PLACEHOLDERS)
        ]
        if placeholders:
            raise ConfigError(
                f"Expected real secrets. Received placeholders in: {', '.join(placeholders)}. "
                'Write a random value, as from: python -c "import secrets; print(secrets.token_urlsafe(32))"'
            )
        try:
            return cls.model_validate({name: env[name] for name in cls.variables().values() if env.get(name)})
        except ValidationError as err:
            lines = [
                f"  {e['loc'][0]}: {e['msg'].removeprefix('Value error, ')}. Received: {e['input']!r}"
                for e in err.errors()
                if e["type"] != "default_factory_not_called"  # What is derived from a wrong value is no mistake itself.
            ]
            raise ConfigError("The environment is wrong:\n" + "\n".join(lines)) from err

    @classmethod
    def variables(cls) -> dict[str, str]:
        """Returns the variable of each field."""
        return {name: str(field.validation_alias) for name, field in cls.model_fields.items()}


def home_here(home: Path) -> Path:
    """Returns where a process on any machine has what the installation in `home` has: there, else in its own `CV_HOME`.

    Raises:
        ConfigError: the environment is wrong.
    """
    try:
        is_here = home.is_dir()
    except OSError:  # Another user's folder.
        is_here = False
    return home if is_here else Settings.from_environment().home


def overlooked_home() -> Path | None:
    """Returns an installation in the folder where a command is typed, which it does not use; None: there is none.

    Up to release 0.1 that was the default, and a second one appeared wherever somebody typed.
    """
    here = Path.cwd() / ".cv_platform"
    is_used = os.environ.get("CV_HOME") or here == checkout() / ".cv_platform"
    return here if not is_used and (here / "FORMAT_VERSION").is_file() else None


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
        "ORT_DISABLE_TELEMETRY": "1",
        # Helpers of MLflow's server for language models: seven processes, 1.4 GB.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "DISABLE_LATEST_VERSION_CHECK": "True",
        "DISABLE_DEEPCHECKS_ANONYMOUS_TELEMETRY": "True",
        "DVC_NO_ANALYTICS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_raylet_start_wait_time_s": "180",
        # Without end by default: an image that needs too much memory would hold its work for ever.
        "RAY_task_oom_retries": "2",
        "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "300",
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


def prepare_worker() -> None:
    """As `prepare_process`, for one of several: TensorFlow computes by one thread, unless the user says more."""
    prepare_process()
    for name in ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
        os.environ.setdefault(name, "1")
