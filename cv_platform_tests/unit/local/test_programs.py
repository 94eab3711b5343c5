"""Which programs the local stack runs, and what their configuration says."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from dagster._grpc.utils import default_grpc_timeout

from cv_platform.errors import ConfigError
from cv_platform.local.environment import platform_environment, prepare_home
from cv_platform.local.programs import programs
from cv_platform.settings import Settings
from cv_platform_tests.support.stack_files import SERVICES


def settings(home: Path, **variables: str) -> Settings:
    return Settings.from_environment({"CV_HOME": str(home), **variables})


def names(home: Path, **variables: str) -> list[str]:
    return [program.name for program in programs(settings(home, **variables))]


def test_everything_is_embedded_by_default(tmp_path: Path) -> None:
    assert names(tmp_path) == ["postgres", "mlflow", "evidently", "dagster", "dagster-daemon", "service"]


@pytest.mark.parametrize(
    ("variable", "value", "missing"),
    [
        ("DATABASE_URL", "postgresql://me:secret@db/log", "postgres"),
        ("EVIDENTLY_URL", "http://evidently:8000", "evidently"),
        ("MLFLOW_TRACKING_URI", "http://mlflow:5050", "mlflow"),
    ],
)
def test_what_is_on_a_server_is_not_started_here(tmp_path: Path, variable: str, value: str, missing: str) -> None:
    assert missing not in names(tmp_path, **{variable: value})


def test_everything_listens_on_loopback_only(tmp_path: Path) -> None:
    for program in programs(settings(tmp_path)):
        if program.port is not None:
            host = program.command[program.command.index("--host") + 1]
            assert host == "127.0.0.1"


@pytest.mark.parametrize(
    ("variables", "address"),
    [
        ({}, "http://127.0.0.1:5050"),
        ({"CV_MLFLOW_PORT": "6060"}, "http://127.0.0.1:6060"),
        ({"MLFLOW_PUBLIC_URL": "https://vision.example.org:5050"}, "https://vision.example.org:5050"),
        ({"MLFLOW_TRACKING_URI": "http://me:s3cr3t@mlflow:5050"}, "http://mlflow:5050"),
        ({"MLFLOW_TRACKING_URI": "postgresql://u:p@db/mlflow"}, None),
    ],
)
def test_the_service_knows_where_its_training_runs_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], address: str | None
) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_PUBLIC_URL", "CV_MLFLOW_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    environment = platform_environment(settings(tmp_path, **variables))
    assert Settings.from_environment(environment).mlflow_public_url == address


@pytest.mark.parametrize(
    ("public_url", "hosts", "origins"),
    [
        (None, None, None),
        ("http://localhost:9999", None, None),
        (
            "https://vision.example.org:5050/mlflow",
            "vision.example.org,vision.example.org:*,localhost:*,127.0.0.1:*",
            "https://vision.example.org:5050",
        ),
    ],
)
def test_mlflow_answers_to_the_name_by_which_people_open_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, public_url: str | None, hosts: str | None, origins: str | None
) -> None:
    for name in ("MLFLOW_SERVER_ALLOWED_HOSTS", "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"):
        monkeypatch.delenv(name, raising=False)
    given = {"MLFLOW_PUBLIC_URL": public_url} if public_url else {}
    environment = platform_environment(settings(tmp_path, **given))
    assert environment.get("MLFLOW_SERVER_ALLOWED_HOSTS") == hosts
    assert environment.get("MLFLOW_SERVER_CORS_ALLOWED_ORIGINS") == origins
    monkeypatch.setenv("MLFLOW_SERVER_ALLOWED_HOSTS", "mine")
    assert platform_environment(settings(tmp_path, **given))["MLFLOW_SERVER_ALLOWED_HOSTS"] == "mine"


def test_a_run_may_take_minutes_to_load_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in platform_environment(settings(tmp_path)).items():
        monkeypatch.setenv(name, value)
    assert default_grpc_timeout() >= 300
    assert SERVICES["dagster-daemon"]["environment"]["DAGSTER_GRPC_TIMEOUT_SECONDS"] == "300"


def test_postgres_is_stopped_by_its_fast_shutdown(tmp_path: Path) -> None:
    postgres = programs(settings(tmp_path))[0]
    assert postgres.stop_signal == "INT"


def test_the_dagster_instance_has_absolute_folders_even_with_odd_names(tmp_path: Path) -> None:
    home = tmp_path / "a: b #c"
    prepare_home(settings(home))
    instance = yaml.safe_load((home / "dagster" / "dagster.yaml").read_text())
    assert instance["storage"]["sqlite"]["base_dir"] == str(home / "dagster")
    assert instance["telemetry"]["enabled"] is False


def test_an_installation_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "FORMAT_VERSION").write_text("99\n")
    with pytest.raises(ConfigError, match="format 99"):
        prepare_home(settings(tmp_path))
