"""Fixtures that several modules of this folder share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cv_platform.serving.log.request_log import RequestLog
from cv_platform_tests.support.demo_run import Demo, Stack, finished_demo, running_stack


@pytest.fixture(scope="session")
def demo() -> Iterator[Demo]:
    """A finished demo; who uses it is in the xdist_group "demo", so that there is one."""
    with finished_demo() as demo:
        yield demo


@pytest.fixture(scope="session")
def stack(demo: Demo) -> Iterator[Stack]:
    """`make up` on what the demo left; test_tour looks around in it, then test_up kills its parts and stops it."""
    with running_stack(demo) as stack:
        yield stack


@pytest.fixture
def log(tmp_path: Path, database_url: str) -> Iterator[RequestLog]:
    with RequestLog(tmp_path / "spool", database_url) as log:
        yield log
