"""URLs and typed errors, without a server."""

from __future__ import annotations

import logging
import socket
from pathlib import Path

import pytest
from pydantic import SecretStr
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from cv_platform.database.address import running_database_url
from cv_platform.database.connection import database_url, make_engine, normalise_url
from cv_platform.errors import ConfigError, DatabaseUnavailableError
from cv_platform.settings import Settings


def settings(home: Path, url: str | None) -> Settings:
    return Settings.from_environment({"CV_HOME": str(home)} | ({"DATABASE_URL": url} if url else {}))


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg2"])
def test_understands_every_usual_scheme(scheme: str) -> None:
    url = normalise_url(f" {scheme}://me:p%40ss@db.example:5433/log?sslmode=require\n")
    assert url.drivername == "postgresql+psycopg2"
    assert (url.username, url.password, url.host, url.port, url.database) == ("me", "p@ss", "db.example", 5433, "log")
    assert url.query == {"sslmode": "require"}


@pytest.mark.parametrize("url", ["mysql://me:s3cret@db/log", "postgresql+asyncpg://me:s3cret@db/log", "s3cret", ""])
def test_refuses_other_urls_without_repeating_their_password(url: str) -> None:
    with pytest.raises(ConfigError, match="DATABASE_URL: expected postgresql://") as caught:
        normalise_url(url)
    assert "s3cret" not in str(caught.value)


def test_a_server_that_is_away_is_a_database_unavailable_error() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        engine = make_engine(f"postgresql://me:s3cret@127.0.0.1:{port}/log")
        with pytest.raises(DatabaseUnavailableError, match=f"127.0.0.1:{port}/log") as caught:
            engine.connect()
    assert "s3cret" not in str(caught.value)
    engine.dispose()


def test_database_url_is_the_one_of_the_environment(tmp_path: Path) -> None:
    configured = settings(tmp_path, "postgres://me:s3cret@db/log")
    with database_url(configured) as url:
        assert url == "postgresql+psycopg2://me:s3cret@db/log"
    assert running_database_url(configured) == url
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_database_url_is_refused_before_anything_starts(tmp_path: Path) -> None:
    configured = settings(tmp_path, None).model_copy(update={"database_url": SecretStr("mysql://db/log")})
    with pytest.raises(ConfigError, match="mysql://"), database_url(configured):
        pytest.fail("It must not get here.")


def test_asking_for_a_running_database_makes_no_file(tmp_path: Path) -> None:
    assert running_database_url(settings(tmp_path / "home", None)) is None
    assert not (tmp_path / "home").exists()


def test_a_pool_whose_connections_all_wait_is_a_database_unavailable_error(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine("postgresql://me:s3cret@127.0.0.1:9/log", pool_size=1, pool_timeout_seconds=0.01)

    def out(_: object) -> None:
        raise PoolTimeoutError("QueuePool limit of size 1 overflow 1 reached")

    for pool in (engine.pool, engine.pool.recreate()):
        monkeypatch.setattr(type(pool), "_do_get", out)
        with pytest.raises(DatabaseUnavailableError, match="free connection"):
            engine.connect()


def test_a_pool_that_is_disposed_of_says_nothing_in_the_platforms_name(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "cv_platform")
    make_engine("postgresql://me@127.0.0.1:1/log").dispose()
    logging.getLogger("cv_platform.database.connection").info("what the platform says itself")
    assert caplog.messages == ["what the platform says itself"]


def test_a_pool_speaks_to_whoever_asks(caplog: pytest.LogCaptureFixture) -> None:
    pool_log = "cv_platform.database.connection._TypedPool"
    caplog.set_level(logging.INFO, pool_log)
    make_engine("postgresql://me@127.0.0.1:1/log").dispose()
    assert caplog.messages[0].startswith("Pool disposed.")
