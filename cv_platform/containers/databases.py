"""The stack's databases as dumps, by PostgreSQL's own programs within its container.

A dump has neither owners nor rights: it is loaded by the role that owns the database, whose rights and those of the
others docker/postgres/10-databases.sh has set. https://www.postgresql.org/docs/17/app-pgdump.html
"""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path
from typing import IO

from cv_platform.containers import engine
from cv_platform.errors import BackupError, DatabaseUnavailableError, ServiceError
from cv_platform.maintenance.archive_stream import CHUNK_BYTES, Readable

OWNERS = {"request_log": "request_log", "dagster": "dagster", "mlflow": "mlflow"}
"""The role that owns each database."""
_START_SECONDS = 180.0
_LOGIN = "--host 127.0.0.1 --username postgres --no-password"
_PSQL = f"--no-psqlrc --set ON_ERROR_STOP=1 --quiet --no-align --tuples-only {_LOGIN}"
# Counts each table's rows in the transaction whose snapshot pg_dump uses, then says that it is done.
_COUNT = (
    "SELECT format('SELECT %L, count(*) FROM %I.%I', tablename, schemaname, tablename) FROM pg_tables "
    "WHERE schemaname = 'public' ORDER BY tablename \\gexec\n\\echo .\n"
)


class Server:
    """A running PostgreSQL of the stack; its superuser's password is in the container's environment.

    Args:
        container_id: Docker's.
    """

    def __init__(self, container_id: str) -> None:
        self._id = container_id

    def wait(self) -> None:
        """Waits until it answers by the network: before, the image is still setting it up.

        Raises:
            DatabaseUnavailableError: it has ended, or does not answer.
        """
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                self._execute("pg_isready --quiet --host 127.0.0.1 --username postgres")
                return
            except ServiceError as err:
                running = engine.docker("inspect", "--format", "{{.State.Running}}", self._id) == "true"
                if not running or time.monotonic() > deadline:
                    log = engine.log_end(self._id)
                    raise DatabaseUnavailableError(
                        f"Expected PostgreSQL to start. Received: {err}\nThe end of its log:\n{log}"
                    ) from err
            time.sleep(0.5)

    def major(self) -> int:
        """Returns PostgreSQL's major version."""
        return int(self._value("SHOW server_version_num")) // 10_000

    def bytes(self) -> int:
        """Returns the size of all databases of the stack on the server's disk."""
        names = ", ".join(f"'{name}'" for name in OWNERS)
        return int(self._value(f"SELECT sum(pg_database_size(datname)) FROM pg_database WHERE datname IN ({names})"))

    def dump(self, database: str, target: Path) -> dict[str, int]:
        """Writes one consistent state of a database to `target` while others use it; returns the rows by table.

        Raises:
            BackupError: PostgreSQL refuses.
        """
        with _Session(self._command(f"psql {_PSQL} --dbname {database}")) as session:
            session.send("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY;\nSELECT pg_export_snapshot();\n")
            snapshot = session.line()
            rows = session.rows()
            # Both see the same rows, whatever is written meanwhile.
            command = self._command(
                f"pg_dump {_LOGIN} --format custom --compress 0 --no-owner "
                f"--no-privileges --snapshot '{snapshot}' --dbname {database}"
            )
            with target.open("wb") as file:
                done = subprocess.run(command, stdout=file, stderr=subprocess.PIPE, check=False)
        if done.returncode != 0:
            raise BackupError(f"Expected pg_dump of {database} to succeed. Received: {_tail(done.stderr)}")
        return rows

    def load(self, database: str, dump: Readable, expected: dict[str, int]) -> None:
        """Loads a dump into an empty database, all or nothing, and compares the rows by table.

        Raises:
            BackupError: the dump does not load, or has other rows.
        """
        command = self._command(
            f"pg_restore {_LOGIN} --no-owner --no-privileges --exit-on-error "
            f"--single-transaction --role {OWNERS[database]} --dbname {database}"
        )
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as run:
            assert run.stdin is not None
            assert run.stderr is not None
            try:
                shutil.copyfileobj(dump, run.stdin, CHUNK_BYTES)
                run.stdin.close()
            except BrokenPipeError:
                pass  # Its reason follows.
            error = run.stderr.read()
        if run.returncode != 0:
            raise BackupError(f"Expected pg_restore of {database} to succeed. Received: {_tail(error)}")
        with _Session(self._command(f"psql {_PSQL} --dbname {database}")) as session:
            rows = session.rows()
        if rows != expected:
            raise BackupError(f"{database}: expected rows by table: {expected}. Received: {rows}. Use another backup.")

    def _value(self, statement: str) -> str:
        return self._execute(f'psql {_PSQL} --dbname postgres --command "{statement}"')

    def _execute(self, command: str) -> str:
        return engine.docker(*self._command(command)[1:])

    def _command(self, command: str) -> list[str]:
        # Within the container, so that the password is on no command line.
        script = f'PGPASSWORD="$POSTGRES_PASSWORD" PGCONNECT_TIMEOUT=10 exec {command}'
        return ["docker", "exec", "--interactive", self._id, "sh", "-c", script]


class _Session:
    """A psql that is asked line by line."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def __enter__(self) -> _Session:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # Its input ends, and so does it.

    def send(self, text: str) -> None:
        self._stream(self._process.stdin).write(text)
        self._stream(self._process.stdin).flush()

    def line(self) -> str:
        line = self._stream(self._process.stdout).readline()
        if not line:
            raise BackupError(
                f"Expected PostgreSQL to answer. Received: {self._stream(self._process.stderr).read().strip()[-2000:]}"
            )
        return line.rstrip("\n")

    def rows(self) -> dict[str, int]:
        self.send(_COUNT)
        rows: dict[str, int] = {}
        while (line := self.line()) != ".":
            table, _, count = line.rpartition("|")
            rows[table] = int(count)
        return rows

    def _stream(self, stream: IO[str] | None) -> IO[str]:
        assert stream is not None
        return stream


def _tail(error: bytes) -> str:
    return error.decode(errors="replace").strip()[-2000:]
