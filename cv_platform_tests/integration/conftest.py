"""Fixtures that several modules of this folder share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

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


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    """A real S3 API over HTTP."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_url(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Central storage in a bucket of its own."""
    from s3fs import S3FileSystem

    for name, value in (
        ("AWS_ENDPOINT_URL", s3_endpoint),
        ("AWS_ACCESS_KEY_ID", "key"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("NO_PROXY", "127.0.0.1"),
    ):
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()
    bucket = f"bucket-{uuid4().hex}"
    S3FileSystem().mkdir(bucket)
    yield f"s3://{bucket}/storage"
    S3FileSystem.clear_instance_cache()
