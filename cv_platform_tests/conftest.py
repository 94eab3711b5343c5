"""Fixtures that several suites share: a real PostgreSQL per session, and a fresh migrated database per test."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from cv_platform.loopback import past_proxies
from cv_platform_tests.support.postgres import make_database, named, own_database

_TEMPLATE = "cv_template"
_TRACKING = "MLFLOW_TRACKING_URI"
_GIVEN_TRACKING = os.environ.get(_TRACKING)
os.environ.update(past_proxies(os.environ))  # Tests ask servers of their own, in children too.
# ONNX Runtime reads it once, in the first test that uses it; else it asks another test's proxy for its maker's server.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# So that no test that is slow once finds MLflow's metrics of the machine among its own.
os.environ.setdefault("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "3600")


@pytest.hookimpl(tryfirst=True)  # Before pytest-xdist looks for groups.
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Lets one worker run a module, so that its libraries and fixtures load once; named groups, the longest, begin."""
    grouped = [item for item in items if item.get_closest_marker("xdist_group")]
    alone = [item for item in items if not item.get_closest_marker("xdist_group")]
    for item in alone:
        item.add_marker(pytest.mark.xdist_group(item.path.stem))
    items[:] = grouped + alone


@pytest.fixture(autouse=True)
def _process_as_found() -> Iterator[None]:
    """Gives the next test the environment and the handling of SIGTERM that this one found: children inherit both.

    MLflow writes the tracking address of each run into the environment, also from a module's fixture, which this one
    cannot look behind: that address is again what the session began with.
    """
    environment = dict(os.environ)
    handler, mask = signal.getsignal(signal.SIGTERM), signal.pthread_sigmask(signal.SIG_BLOCK, [])
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    signal.signal(signal.SIGTERM, handler)
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
    os.environ.pop(_TRACKING, None)
    if _GIVEN_TRACKING is not None:
        os.environ[_TRACKING] = _GIVEN_TRACKING
    if absl := sys.modules.get("absl.logging"):
        # Loaded after tqdm, whose colorama wraps standard error, it has the wrapper, and closes through it what pytest
        # captures: Dagster closes all handlers when it begins a run.
        absl.get_absl_handler().python_handler.stream = sys.stderr


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """URL of an embedded PostgreSQL of this session (under pytest-xdist: of this worker), to make databases in."""
    from cv_platform.database.embedded import embedded_database

    # Not below pytest's own folder, which is closed to the unprivileged user that runs the server for root.
    home = Path(tempfile.mkdtemp(prefix="cv-tests-"))
    home.chmod(0o711)
    try:
        with embedded_database(home) as url:
            yield url
    finally:
        shutil.rmtree(home)


@pytest.fixture(scope="session")
def _template_url(postgres_url: str) -> str:
    from cv_platform.database.migrate import migrate

    make_database(postgres_url, _TEMPLATE)
    migrate(named(postgres_url, _TEMPLATE))
    return postgres_url


@pytest.fixture
def database_url(_template_url: str) -> Iterator[str]:
    """URL of a migrated, empty database of this test's own."""
    with own_database(_template_url, template=_TEMPLATE) as url:
        yield url


@pytest.fixture
def unmigrated_url(postgres_url: str) -> Iterator[str]:
    """URL of a database of this test's own without any table."""
    with own_database(postgres_url) as url:
        yield url


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """An engine on `database_url`."""
    from cv_platform.database.connection import make_engine

    engine = make_engine(database_url)
    yield engine
    engine.dispose()
