"""Restoring the stack: what is refused before anything is touched, and what a failed or killed attempt leaves."""

from __future__ import annotations

import fcntl
import io
import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest

from cv_platform.containers import backup, engine, preflight, restore
from cv_platform.containers.__main__ import main
from cv_platform.containers.backup_contents import Contents, product_version, require_restorable
from cv_platform.containers.env_file import make_secrets, read_env, set_values
from cv_platform.errors import BackupError, ConfigError, DiskSpaceError, LockHeldError, ServiceError
from cv_platform.maintenance.archive import verify_archive, write_archive
from cv_platform_tests.support.fake_docker import fake_docker

CONTENTS = Contents("cv-platform", "1", 17, rows={"request_log": {}, "dagster": {}, "mlflow": {}})
DUMPS = ("databases/request_log.dump", "databases/dagster.dump", "databases/mlflow.dump")
IDLE = """
case "$*" in
  "info "*) echo '{"ServerVersion": "20.10.24", "DockerRootDir": "/nowhere"}' ;;
  "compose version"*) echo 2.26.1 ;;
  "image inspect"*) echo sha256:0 ;;
  "ps "*) ;;
  "volume ls"*) [ ! -e "$STATE/volumes" ] || cat "$STATE/volumes" ;;
  *" run --detach "*) echo cv-platform_postgres_new > "$STATE/volumes"; echo "no such image" >&2; exit 1 ;;
  "volume rm"*) echo "$*" >> "$STATE/removed" ;;
  *) echo "unexpected: $*" >&2; exit 2 ;;
esac
"""


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout's folder docker/, with the env file of a stack that is stopped."""
    folder = tmp_path / "docker"
    folder.mkdir()
    monkeypatch.setattr(engine, "DOCKER", folder)
    monkeypatch.setattr(engine, "ENV_FILE", folder / ".env")
    monkeypatch.setattr(engine, "RESTORING", folder / ".env.restoring")
    make_secrets(engine.EXAMPLE, engine.ENV_FILE)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("STATE", str(tmp_path))
    fake_docker(tmp_path / "bin", monkeypatch, IDLE)
    return folder


def write(
    folder: Path,
    *,
    details: dict[str, object] | None = None,
    kind: str = "stack in containers",
    version: str = "",
    members: tuple[str, ...] = ("docker.env", *DUMPS, "volumes/home/records/x.json", "configs/digits.yaml"),
) -> Path:
    path = folder / "backup.tar.gz"
    path.unlink(missing_ok=True)
    settings = engine.ENV_FILE.read_bytes() if engine.ENV_FILE.exists() else engine.EXAMPLE.read_bytes()
    with write_archive(path, kind=kind, product_version=version or product_version()) as writer:
        for name in members:
            content = settings if name == "docker.env" else b"content"
            writer.add_stream(io.BytesIO(content), name, size=len(content))
        writer.details = {**asdict(CONTENTS), **(details or {})}
    return path


def quiet(_: str) -> None:
    """Says nothing."""


def test_what_this_release_has_written_is_restorable(docker: Path, tmp_path: Path) -> None:
    archive = write(tmp_path)
    assert require_restorable(archive, verify_archive(archive)) == CONTENTS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "embedded installation"}, r"of an embedded installation\. Restore it with: make restore FILE="),
        ({"version": "99.0"}, r"release 0\.2\.0 or older\. Received: of 99\.0"),
        ({"details": {"volume_format": "2"}}, "volumes of format 1. Received: 2"),
        ({"details": {"postgres_major": 18}}, "PostgreSQL 17 or older. Received: of 18"),
        ({"details": {"surprise": 1}}, "expected details"),
        ({"details": {"rows": {"request_log": 5}}}, "expected details"),
        ({"details": {"rows": {"request_log": {}}}}, "expected the files"),
        ({"members": DUMPS}, "expected the files"),
        ({"members": ("docker.env", *DUMPS[1:])}, "expected the files"),
        ({"members": ("docker.env", *DUMPS, "volumes/postgres/pg_hba.conf/x")}, "expected the files"),
        ({"members": ("docker.env", *DUMPS, "compose.yaml")}, "expected the files"),
        ({"members": ("docker.env", *DUMPS, "volumes/other/x")}, "expected the files"),
    ],
)
def test_archives_of_something_else_are_refused_before_anything_is_touched(
    docker: Path, tmp_path: Path, changes: dict, message: str
) -> None:
    archive = write(tmp_path, **changes)
    before = engine.ENV_FILE.read_bytes()
    with pytest.raises(BackupError, match=message):
        restore.restore(archive, quiet)
    assert sorted(path.name for path in docker.iterdir()) == [".env"]
    assert engine.ENV_FILE.read_bytes() == before


def test_damaged_archives_are_refused_before_docker_is_asked(
    docker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_docker(tmp_path / "bin", monkeypatch, 'echo "$*" >> "$STATE/asked"')
    archive = write(tmp_path)
    content = archive.read_bytes()
    for damaged in (b"", content[: len(content) // 2], content[:-1], b"no archive"):
        archive.write_bytes(damaged)
        with pytest.raises(BackupError, match=r"[Uu]se another"):
            restore.restore(archive, quiet)
    with pytest.raises(BackupError, match="Cannot read"):
        restore.restore(tmp_path / "missing.tar.gz", quiet)
    assert not (tmp_path / "asked").exists()


def test_a_running_stack_is_not_restored_over(docker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running = IDLE.replace('"ps "*) ;;', '"ps "*) echo cv-platform-service-1 ;;')
    fake_docker(tmp_path / "bin", monkeypatch, running)
    with pytest.raises(BackupError, match=r"cv-platform-service-1 running\. Stop it \(make stack-down\)"):
        restore.restore(write(tmp_path), quiet)
    assert not engine.RESTORING.exists()


def test_what_does_not_fit_is_not_begun(docker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_docker(tmp_path / "bin", monkeypatch, IDLE.replace("/nowhere", str(tmp_path)))
    monkeypatch.setattr(backup, "SPARE_BYTES", 10**18)
    with pytest.raises(DiskSpaceError, match="the restored volumes"):
        restore.restore(write(tmp_path), quiet)
    assert not engine.RESTORING.exists()


def test_a_failed_restoration_leaves_the_stack_as_it_was(docker: Path, tmp_path: Path) -> None:
    before = engine.ENV_FILE.read_bytes()
    with pytest.raises(ServiceError, match="no such image"):
        restore.restore(write(tmp_path), quiet)
    assert not engine.RESTORING.exists()
    assert engine.ENV_FILE.read_bytes() == before


def killed(suffix: str) -> None:
    """Leaves what a restoration has written when it is killed while it fills its volumes."""
    engine.RESTORING.write_bytes(engine.ENV_FILE.read_bytes())
    engine.RESTORING.chmod(0o600)
    set_values(engine.RESTORING, {"VOLUME_SUFFIX": suffix})


def test_nothing_starts_beside_a_killed_restoration(docker: Path, capsys: pytest.CaptureFixture[str]) -> None:
    killed("_new")
    (problem,) = preflight.restoration_problems()
    assert problem in preflight.preflight()
    assert "make stack-restore FILE=" in problem
    assert "make stack-restore GIVE_UP=1" in problem
    assert main(["up"]) == 1
    assert "unfinished restoration" in capsys.readouterr().err
    engine.ENV_FILE.unlink()
    assert main(["up"]) == 1  # Nor with secrets that are made anew.
    assert "unfinished restoration" in capsys.readouterr().err
    assert not engine.ENV_FILE.exists()


def test_giving_up_removes_the_new_volumes_only(
    docker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed("_new")
    kept = ["cv-platform_home", "cv-platform_home_old", "cv-platform_prometheus"]
    (tmp_path / "volumes").write_text("\n".join([*kept, "cv-platform_home_new", "cv-platform_spool_new"]))
    assert main(["restore", "--give-up"]) == 0
    assert (tmp_path / "removed").read_text() == "volume rm --force cv-platform_home_new cv-platform_spool_new\n"
    assert not engine.RESTORING.exists()
    assert engine.ENV_FILE.exists()
    assert main(["restore", "--give-up"]) == 0
    assert "There is no unfinished restoration" in capsys.readouterr().out


def test_what_became_the_stack_is_never_cleared_away(docker: Path, tmp_path: Path) -> None:
    set_values(engine.ENV_FILE, {"VOLUME_SUFFIX": "_new"})
    killed("_new")
    (tmp_path / "volumes").write_text("cv-platform_home_new")
    assert restore.give_up()
    assert not (tmp_path / "removed").exists()


def test_only_one_restoration_works_at_a_time(docker: Path, tmp_path: Path) -> None:
    killed("_new")
    other = os.open(docker, os.O_RDONLY)
    try:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(LockHeldError, match="another one is running"):
            restore.restore(write(tmp_path), quiet)
        with pytest.raises(LockHeldError, match="another one is running"):
            restore.give_up()
    finally:
        os.close(other)
    assert engine.RESTORING.exists()


def test_unusable_settings_are_refused(docker: Path, tmp_path: Path) -> None:
    archive = write(tmp_path)
    set_values(engine.ENV_FILE, {"DAGSTER_DB_PASSWORD": "short"})
    with pytest.raises(ConfigError, match="DAGSTER_DB_PASSWORD"):
        restore.restore(archive, quiet)
    assert not engine.RESTORING.exists()


def test_without_settings_the_backups_become_the_stacks(docker: Path, tmp_path: Path) -> None:
    archive = write(tmp_path)
    archived = read_env(engine.ENV_FILE)
    engine.ENV_FILE.unlink()
    restore._prepare_settings(archive, verify_archive(archive), None)
    found = read_env(engine.RESTORING)
    assert {**found, "VOLUME_SUFFIX": ""} == archived
    assert found["VOLUME_SUFFIX"].startswith("_2")
    assert engine.RESTORING.stat().st_mode & 0o777 == 0o600


def test_configs_that_are_missing_come_back_and_changed_ones_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "REPOSITORY", tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "digits.yaml").write_bytes(b"mine")
    (tmp_path / "configs" / "same.yaml").write_bytes(b"same")
    configs = {"digits.yaml": b"theirs", "same.yaml": b"same", "more/other.yaml": b"other"}
    assert restore._put_back(configs) == ["configs/digits.yaml"]
    assert (tmp_path / "configs" / "digits.yaml").read_bytes() == b"mine"
    assert (tmp_path / "configs" / "more" / "other.yaml").read_bytes() == b"other"


def test_volumes_from_before_a_restoration_keep_nothing_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    label = "com.docker.compose.volume"
    described = [
        {"Name": "cv-platform_home", "Labels": {label: "home", "cv-platform.format": "0"}},
        {"Name": "cv-platform_home_new", "Labels": {label: "home", "cv-platform.format": "1"}},
        {"Name": "cv-platform_prometheus", "Labels": {label: "prometheus", "cv-platform.format": "1"}},
    ]
    names = "\\n".join(volume["Name"] for volume in described)
    script = f"case $2 in ls) printf '{names}\\n' ;; inspect) cat <<'E'\n{json.dumps(described)}\nE\n;; esac"
    fake_docker(tmp_path, monkeypatch, script)
    assert set(preflight.volume_labels({"VOLUME_SUFFIX": "_new"})) == {
        "cv-platform_home_new",
        "cv-platform_prometheus",
    }
    assert preflight.volume_problems(preflight.volume_labels({"VOLUME_SUFFIX": "_new"})) == []
    assert len(preflight.volume_problems(preflight.volume_labels({}))) == 1


def test_a_stack_without_postgres_is_not_backed_up(
    docker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["backup", "--output", str(tmp_path / "backups")]) == 1
    assert "Run: make stack-up" in capsys.readouterr().err
    assert not (tmp_path / "backups").exists()


def test_what_compose_says_of_its_progress_is_no_reason() -> None:
    error = b" Container x-run-1  Created\n Network x_back  Creating\nerror: Expected space.\n"
    assert backup.end_of(error) == "error: Expected space."
