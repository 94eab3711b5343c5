"""Migrations against a real PostgreSQL."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine, inspect, make_url, text

from cv_platform.database.connection import make_engine
from cv_platform.database.migrate import alembic_config, check_schema, migrate, read_revision
from cv_platform.database.migrations import versions
from cv_platform.database.pg_binaries import find_binaries, server_user
from cv_platform.database.schema import SCHEMA_REVISION, metadata
from cv_platform.errors import DatabaseUnavailableError, SchemaMismatchError
from cv_platform.serving.log.entry import FeedbackEntry
from cv_platform.serving.log.request_log import RequestLog
from cv_platform.serving.log.tables import find_prediction
from cv_platform_tests.support.log_entries import answered, append_to, wait_until_drained


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_migrations_make_exactly_the_tables_of_the_schema(engine: Engine) -> None:
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, metadata) == []
        assert read_revision(connection) == SCHEMA_REVISION


def test_migrations_send_ascii_as_databases_of_the_locale_c_take_nothing_else() -> None:
    modules = sorted(Path(versions.__path__[0]).glob("*.py"))
    assert len(modules) > 5
    assert [path.name for path in modules if not path.read_text(encoding="utf-8").isascii()] == []


def test_a_database_without_tables_is_named_as_such_until_it_is_migrated(unmigrated_url: str) -> None:
    with pytest.raises(SchemaMismatchError, match=r"a database without tables\. Run: cv-platform migrate"):
        check_schema(unmigrated_url)
    assert migrate(unmigrated_url) == SCHEMA_REVISION
    assert migrate(unmigrated_url) == SCHEMA_REVISION
    check_schema(unmigrated_url)


def test_migrators_at_the_same_time_wait_for_each_other(unmigrated_url: str) -> None:
    outcomes: list[object] = []

    def run() -> None:
        try:
            outcomes.append(migrate(unmigrated_url))
        except Exception as err:
            outcomes.append(err)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert outcomes == [SCHEMA_REVISION] * 4


def test_a_large_log_is_not_written_anew(unmigrated_url: str) -> None:
    """0003 took two minutes for a million rows while it wrote each of them again, and nobody could use the table."""
    engine = make_engine(unmigrated_url)

    def upgrade(revision: str) -> None:
        with engine.begin() as connection:
            config = alembic_config()
            config.attributes["connection"] = connection
            command.upgrade(config, revision)

    def ask(statement: str) -> list[object]:
        with engine.begin() as connection:
            return list(connection.execute(text(statement)).scalars())

    upgrade("0002")
    add = (
        "INSERT INTO predictions (prediction_id, model_name, model_version, predicted_class, prediction_json,"
        " uae_feats, bbsd_feats, features, properties)"
        " VALUES (gen_random_uuid(), 'm', 'v', 'a', '{}', '{}', '{}', '{}', '{}') RETURNING xmin::text || ctid::text"
    )
    place = ask(add)
    upgrade("head")
    assert ask("SELECT xmin::text || ctid::text FROM predictions") == place
    ask(add)
    assert sorted(map(bool, ask("SELECT logged_on IS NULL FROM predictions"))) == [False, True]
    engine.dispose()


def test_what_an_older_release_has_logged_is_in_the_index_of_its_time(unmigrated_url: str) -> None:
    """What came since a vacuum was not, and each window by `logged_on` read all of it."""
    engine = make_engine(unmigrated_url)

    def upgrade(revision: str) -> None:
        with engine.begin() as connection:
            config = alembic_config()
            config.attributes["connection"] = connection
            command.upgrade(config, revision)

    def ask(statement: str) -> object:
        with engine.begin() as connection:
            return connection.execute(text(statement)).scalar_one()

    upgrade("0010")
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE predictions SET (autovacuum_enabled = off)"))
        connection.execute(
            text(
                "INSERT INTO predictions (prediction_id, model_name, model_version, predicted_class, prediction_json,"
                " uae_feats, bbsd_feats, features, properties)"
                " SELECT gen_random_uuid(), 'm', 'v', 'a', '{}', array_fill(1::real, ARRAY[400]), '{}', '{}', '{}'"
                " FROM generate_series(1, 2000)"
            )
        )
    assert ask("SELECT pg_relation_size('predictions') / 8192 > 3 * 128")
    upgrade("head")
    assert ask("SELECT reloptions FROM pg_class WHERE relname = 'ix_predictions_logged_on'") == ["autosummarize=on"]
    assert ask("SELECT brin_summarize_new_values('ix_predictions_logged_on')") == 0
    engine.dispose()


def test_a_newer_database_is_left_alone(database_url: str, engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    for action in (migrate, check_schema):
        with pytest.raises(SchemaMismatchError, match=r"9999\. The database is newer: upgrade cv_platform"):
            action(database_url)
    with engine.connect() as connection:
        assert read_revision(connection) == "9999"


def test_a_failing_migration_leaves_nothing_behind(unmigrated_url: str) -> None:
    engine = make_engine(unmigrated_url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE predictions (something int)"))
    with pytest.raises(Exception, match='relation "predictions" already exists'):
        migrate(unmigrated_url)
    assert inspect(engine).get_table_names() == ["predictions"]
    engine.dispose()


def test_downgrading_removes_every_table(database_url: str, engine: Engine) -> None:
    with engine.begin() as connection:
        config = alembic_config()
        config.attributes["connection"] = connection
        command.downgrade(config, "base")
    assert inspect(engine).get_table_names() == ["alembic_version"]
    with pytest.raises(SchemaMismatchError):
        check_schema(database_url)


def test_a_missing_table_is_a_schema_mismatch_and_a_missing_database_is_unavailable(unmigrated_url: str) -> None:
    engine = make_engine(unmigrated_url)
    with engine.connect() as connection, pytest.raises(SchemaMismatchError, match="cv-platform migrate"):
        connection.execute(text("SELECT * FROM predictions"))
    engine.dispose()
    away = make_url(unmigrated_url).set(database="nowhere").render_as_string(hide_password=False)
    with pytest.raises(DatabaseUnavailableError, match="nowhere"):
        check_schema(away)


@pytest.fixture(scope="module")
def older_server_url() -> Iterator[str]:
    """URL of a PostgreSQL 16, which the wheel brings too: what it takes, 17 takes."""
    folder = Path(tempfile.mkdtemp(prefix="cv-older-"))
    folder.chmod(0o711)
    data, password = folder / "data", folder / "password"
    user = server_user(data)
    binaries = find_binaries(user).parents[1] / "pginstall" / "bin"
    data.mkdir(mode=0o700)
    password.write_text("only for this test")
    for path in (data, password):
        os.chown(path, user.uid, user.gid)
    port = free_port()
    initdb = [binaries / "initdb", "-D", data, "-U", "cv", "-A", "scram-sha-256", "--pwfile", password]
    run = {"check": True, "timeout": 60, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    control = [binaries / "pg_ctl", "-w", "-D", data]
    try:
        subprocess.run([*initdb, "--locale=C", "-E", "UTF8"], **run, **user.popen_arguments())
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories=''"
        subprocess.run([*control, "-o", options, "start"], **run, **user.popen_arguments())
        try:
            yield f"postgresql://cv:only%20for%20this%20test@127.0.0.1:{port}/postgres"
        finally:
            subprocess.run([*control, "-m", "immediate", "stop"], **run, **user.popen_arguments())
    finally:
        shutil.rmtree(folder)


def test_schema_and_log_work_on_an_older_server(older_server_url: str, tmp_path: Path) -> None:
    assert migrate(older_server_url) == SCHEMA_REVISION
    engine = make_engine(older_server_url)
    with engine.connect() as connection:
        assert str(connection.execute(text("SHOW server_version")).scalar()).startswith("16.")
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, metadata) == []
    entry = answered()
    assert entry.prediction_id is not None
    with RequestLog(tmp_path, older_server_url) as log:
        append_to(log, entry)
        append_to(log, FeedbackEntry(prediction_id=entry.prediction_id, true_class="four", source="page"))
        wait_until_drained(log)
    found = find_prediction(engine, entry.prediction_id)
    assert found is not None
    assert (found.prediction_json, found.image) == (entry.prediction_json, entry.image)
    engine.dispose()


def test_sessions_speak_utc(engine: Engine) -> None:
    with engine.connect() as connection:
        assert connection.execute(text("SHOW timezone")).scalar() == "UTC"
