"""What supervisord reads of the configuration that is written for it."""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from supervisor.options import ClientOptions, ServerOptions

from cv_platform.errors import ServiceError
from cv_platform.local.environment import prepare_home
from cv_platform.local.http import free_port
from cv_platform.local.programs import Program, programs
from cv_platform.local.supervisor import (
    _start_supervisor,
    _wait_until_up,
    _write_configuration,
    is_running,
    stop_stack,
)
from cv_platform.settings import Settings


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder with a short name, as Pytest's own leaves no room for a socket's."""
    with tempfile.TemporaryDirectory(prefix="cv-", dir="/tmp") as folder:
        yield Path(folder)


def written(home: Path) -> Path:
    settings = Settings.from_environment({"CV_HOME": str(home)})
    prepare_home(settings)
    return _write_configuration(settings, programs(settings))


@pytest.mark.parametrize("name", ["home", "100% é dir", "%(here)s", "a'b", "50%%"])
def test_supervisord_reads_folders_with_odd_names_as_they_are(short: Path, name: str) -> None:
    home = short / name
    configuration = written(home)
    options = ServerOptions()
    options.realize(["-c", str(configuration), "-n"])
    assert options.logfile == str(home / "logs" / "supervisord.log")
    assert options.pidfile == str(home / "run" / "supervisord.pid")
    processes = [process for group in options.process_group_configs for process in group.process_configs]
    assert {process.name: process.stdout_logfile for process in processes} == {
        program.name: str(home / "logs" / f"{program.name}.log")
        for program in programs(Settings.from_environment({"CV_HOME": str(home)}))
    }
    (mlflow,) = (process for process in processes if process.name == "mlflow")
    assert str(home / "mlflow" / "artifacts") in shlex.split(mlflow.command)
    client = ClientOptions()
    client.realize(["-c", str(configuration), "status"])
    assert client.serverurl == f"unix://{options.server_configs[0]['file']}"


@pytest.mark.parametrize("name", ["my #1 project", "a ;b"])
def test_a_folder_whose_name_begins_a_comment_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ServiceError, match="Expected no ' ;' or ' #'"):
        written(tmp_path / name)


def test_a_long_name_gets_a_socket_that_the_system_takes(monkeypatch: pytest.MonkeyPatch, short: Path) -> None:
    """Letters of two bytes each: 88 characters, which would do, and more than 107 bytes, which do not."""
    monkeypatch.setattr(tempfile, "tempdir", str(short))
    home = short / ("é" * (87 - len(f"{short}/run/supervisor.sock")))
    assert len(str(home / "run" / "supervisor.sock")) == 88
    assert len(os.fsencode(home / "run" / "supervisor.sock")) > 107
    options = ServerOptions()
    options.realize(["-c", str(written(home)), "-n"])
    assert len(os.fsencode(options.server_configs[0]["file"])) <= 107


@pytest.mark.parametrize("seconds", ["0", "3"])
def test_a_program_that_ends_again_and_again_is_not_waited_for(short: Path, seconds: str) -> None:
    """At once, which supervisord calls FATAL in the end, or later, which it takes for a start each time."""
    settings = Settings.from_environment({"CV_HOME": str(short / "home")})
    prepare_home(settings)
    broken = Program("broken", ("sh", "-c", f"echo no disk; sleep {seconds}; exit 1"), free_port(), "/health")
    _start_supervisor(settings, _write_configuration(settings, [broken]), dict(os.environ))
    try:
        with pytest.raises(ServiceError, match="Its process has ended") as caught:
            _wait_until_up(settings, broken)
    finally:
        stop_stack(settings)
    assert "no disk" in str(caught.value)


def test_a_home_that_was_moved_while_the_stack_runs_is_stopped_at_its_new_place(short: Path) -> None:
    old, new = (Settings.from_environment({"CV_HOME": str(short / name)}) for name in ("50% old", "new é"))
    prepare_home(old)
    _start_supervisor(old, _write_configuration(old, []), dict(os.environ))
    old.home.rename(new.home)
    assert is_running(new)
    assert stop_stack(new)
    assert not is_running(new)
