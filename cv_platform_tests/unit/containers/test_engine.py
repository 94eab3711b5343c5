"""The stack's commands: docker/.env alone decides, only one-shots may have ended, and what each asks Docker for."""

from __future__ import annotations

from pathlib import Path

import pytest

from cv_platform.containers import backup, engine, restore, roll
from cv_platform.containers.__main__ import main
from cv_platform.containers.env_file import make_secrets, read_env, set_values
from cv_platform.errors import BackupError, ServiceError
from cv_platform.maintenance.archive_stream import packing
from cv_platform_tests.support.fake_docker import fake_docker

RECORD = 'echo "$*" >> "$SEEN/asked"; env >> "$SEEN/environment"'
EXPORTED = {
    "STACK_NAME": "exported",
    "SERVICE_PORT": "1",
    "TLS_CERTIFICATE": "exported.pem",
    "COMPOSE_PROFILES": "monitoring,notebook",
    "COMPOSE_PROJECT_NAME": "exported",
    "COMPOSE_FILE": "exported.yaml",
    "COMPOSE_ENV_FILES": "exported.env",
}


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the `docker` of these tests writes what it was asked, for the stack of a new docker/.env."""
    for name, value in EXPORTED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SEEN", str(tmp_path))
    monkeypatch.setattr(engine, "ENV_FILE", tmp_path / ".env")
    make_secrets(engine.EXAMPLE, engine.ENV_FILE)
    fake_docker(tmp_path, monkeypatch, RECORD)
    return tmp_path


def asked(seen: Path) -> list[str]:
    """What Docker was asked, without what every Compose command begins with."""
    files = f"compose --file {engine.COMPOSE_FILE} --env-file {engine.ENV_FILE} "
    return [line.replace(files, "compose ") for line in (seen / "asked").read_text().splitlines()]


def test_exported_variables_reach_no_compose_command(seen: Path) -> None:
    engine.compose("config")
    engine.docker("compose", "version")
    restore._quietly(engine.compose_command("run", "postgres", env_file=seen / ".env.restoring"))
    with pytest.raises(ServiceError, match="hold the volumes"), backup._held_volumes():
        pytest.fail("Nobody holds them.")
    with (
        (seen / "archive").open("wb") as file,
        pytest.raises(BackupError, match="the copy of names"),
        packing(file, kind="test", product_version="1") as writer,
    ):
        backup._copy(writer, "names")
    assert len(asked(seen)) == 5
    lines = (seen / "environment").read_text().splitlines()
    assert not [line for line in lines if line.partition("=")[0] in EXPORTED]
    assert lines.count(f"SEEN={seen}") == 5


def test_what_the_example_names_is_decided_by_the_env_file(seen: Path) -> None:
    assert set(read_env(engine.EXAMPLE)).isdisjoint(engine.environment())
    assert "PATH" in engine.environment()


def test_an_empty_setting_is_compose_yamls_default() -> None:
    assert engine.setting({"NGINX_IMAGE": "here/nginx:1"}, "NGINX_IMAGE") == "here/nginx:1"
    for values in ({}, {"STACK_NAME": ""}):
        assert engine.project_name(values) == engine.setting(values, "STACK_NAME") == "cv-platform"


@pytest.mark.parametrize("service", ["postgres", "nginx", "service", "dagster-daemon"])
def test_a_program_that_has_ended_is_not_well_whatever_its_status(service: str) -> None:
    ended = engine.Container("id", f"s-{service}-1", service, "exited", "Exited (0) 2 minutes ago")
    assert (ended.is_well, ended.is_lost) == (False, True)


@pytest.mark.parametrize("service", sorted(engine.ONE_SHOTS))
def test_a_one_shot_is_well_when_its_task_is_done(service: str) -> None:
    done = engine.Container("id", f"s-{service}-1", service, "exited", "Exited (0) 2 minutes ago")
    failed = engine.Container("id", f"s-{service}-1", service, "exited", "Exited (1) 2 minutes ago")
    assert (done.is_well, done.is_lost) == (True, False)
    assert (failed.is_well, failed.is_lost) == (False, True)


def test_a_postgres_that_was_stopped_is_not_backed_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_docker(tmp_path, monkeypatch, r"printf 'i\ts-postgres-1\tpostgres\texited\tExited (0) 1 minute ago\n'")
    with pytest.raises(ServiceError, match="PostgreSQL of s to run"):
        backup._running_server("s")


def test_nothing_is_rolled_behind_a_nginx_that_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = r"i\ts-nginx-1\tnginx\texited\tExited (0) 1 minute ago\nj\ts-service-1\tservice\trunning\tUp (healthy)\n"
    fake_docker(tmp_path, monkeypatch, f"printf '{rows}'")
    with pytest.raises(ServiceError, match="running stack with nginx"):
        roll.roll("s", lambda _: None)


def test_down_stops_the_daemon_then_its_runs_and_last_all_the_rest(seen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_docker(seen, monkeypatch, f'{RECORD}; case "$*" in *label=cv-platform.run) printf "r1\\nr2\\n" ;; esac')
    assert main(["down"]) == 0
    assert [line for line in asked(seen) if not line.startswith("ps ")] == [
        "compose stop dagster-daemon",
        "stop --time 60 r1 r2",
        "rm r1 r2",
        "compose --profile * down",
    ]
    assert any("label=com.docker.compose.project=cv-platform" in line for line in asked(seen))


def test_down_without_containers_of_runs_is_composes_matter(seen: Path) -> None:
    assert main(["down"]) == 0
    assert [line for line in asked(seen) if not line.startswith("ps ")] == ["compose --profile * down"]


@pytest.mark.parametrize(
    ("profiles", "built"),
    [
        ("", ["dagster-code", "service"]),
        ("monitoring,notebook", ["dagster-code", "service", "notebook"]),
        ("gpu", ["dagster-code", "service", "dagster-code-gpu"]),
    ],
)
def test_the_profiles_images_are_built_too(seen: Path, profiles: str, built: list[str]) -> None:
    set_values(engine.ENV_FILE, {"COMPOSE_PROFILES": profiles})
    assert main(["build"]) == 0
    assert [line.split()[-1] for line in asked(seen)] == built


def test_a_backup_says_that_the_certificate_is_not_in_it() -> None:
    assert backup._elsewhere({"CV_STORAGE": "/data/storage", "TLS_CERTIFICATE": ""}) == []
    assert backup._elsewhere({"CV_STORAGE": "s3://bucket", "TLS_CERTIFICATE": "own.pem", "TLS_KEY": "own.key"}) == [
        "central storage (s3://bucket)",
        "TLS certificate and key",
    ]
