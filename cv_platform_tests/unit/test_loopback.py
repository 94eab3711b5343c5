"""What goes past a proxy, and what does not: each client of the platform against a proxy that counts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from cv_platform.client import Client, ClientError
from cv_platform.client.loopback import direct_transport, is_loopback
from cv_platform.errors import CvPlatformError
from cv_platform.local.http import wait_for_http
from cv_platform.loopback import past_proxies
from cv_platform.monitoring.evidently_report import delete_run
from cv_platform.settings import prepare_process
from cv_platform_tests.support.proxies import Counted, counting_server, proxy_variables

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    with counting_server(status=502) as counted:
        for name, value in proxy_variables(counted.url).items():
            monkeypatch.setenv(name, value)
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        yield counted


@pytest.fixture
def server() -> Iterator[Counted]:
    with counting_server() as counted:
        yield counted


def health_check(url: str) -> None:
    wait_for_http(f"{url}/livez", seconds=10)


def python_client(url: str) -> None:
    with Client(url, retries=0) as client:
        client.health()


def mlflow_client(url: str) -> None:
    from mlflow import MlflowClient

    MlflowClient(url, registry_uri=url).search_experiments()


def evidently_client(url: str) -> None:
    delete_run(url, "digits", "b7c1")


def urllib_in_a_library(url: str) -> None:
    import urllib.request

    urllib.request.urlopen(url, timeout=10).close()


def container_probe(url: str) -> None:
    subprocess.run([sys.executable, str(REPOSITORY / "docker/health/url.py"), url], check=True, timeout=60)


def probe_of_nginx(url: str) -> None:
    script = (REPOSITORY / "docker/nginx/upstream.sh").read_text()
    (probe,) = (line.split(" || ")[0].strip() for line in script.splitlines() if ":8081/health" in line)
    subprocess.run(["sh", "-c", probe.replace("http://127.0.0.1:8081", url)], check=True, timeout=60)


CLIENTS = [
    *(health_check, python_client, mlflow_client, evidently_client, urllib_in_a_library, container_probe),
    probe_of_nginx,
]


@pytest.mark.parametrize("ask", CLIENTS, ids=lambda ask: ask.__name__)
def test_requests_to_loopback_do_not_reach_a_proxy(ask: Callable[[str], None], proxy: Counted, server: Counted) -> None:
    prepare_process()
    with suppress(CvPlatformError, ClientError):  # `{}` is no health report: what counts is whom it asked.
        ask(server.url)
    assert server.asked
    assert proxy.asked == []


@pytest.mark.parametrize("ask", [health_check, python_client], ids=lambda ask: ask.__name__)
@pytest.mark.parametrize(
    ("variable", "value"), [("ALL_PROXY", "socks://127.0.0.1:9"), ("NO_PROXY", "[::1]"), ("NO_PROXY", "example.org")]
)
def test_nor_do_those_of_a_process_that_prepared_nothing(
    monkeypatch: pytest.MonkeyPatch,
    ask: Callable[[str], None],
    variable: str,
    value: str,
    proxy: Counted,
    server: Counted,
) -> None:
    """What httpx makes of these, it raises when a client is made: a scheme and an address that it does not know."""
    monkeypatch.setenv(variable, value)
    with suppress(CvPlatformError, ClientError):
        ask(server.url)
    assert server.asked
    assert proxy.asked == []


def test_other_machines_are_reached_through_the_proxy(proxy: Counted) -> None:
    prepare_process()
    with pytest.raises(ClientError), Client("http://vision.invalid:4242", retries=0) as client:
        client.health()
    assert proxy.asked == ["GET http://vision.invalid:4242/health_check HTTP/1.1"]


@pytest.mark.parametrize(
    ("environ", "value"),
    [
        ({}, "localhost,127.0.0.1,::1"),
        ({"NO_PROXY": "example.org"}, "example.org,localhost,127.0.0.1,::1"),
        ({"no_proxy": "a.org, b.org", "NO_PROXY": "b.org,c.org"}, "a.org,b.org,c.org,localhost,127.0.0.1,::1"),
        ({"NO_PROXY": "127.0.0.1"}, "127.0.0.1,localhost,::1"),
        ({"NO_PROXY": "*"}, "*"),
        ({"NO_PROXY": "", "no_proxy": " , "}, "localhost,127.0.0.1,::1"),
    ],
)
def test_no_proxy_keeps_what_it_has(environ: dict[str, str], value: str) -> None:
    assert past_proxies(environ) == {"NO_PROXY": value, "no_proxy": value}
    assert past_proxies(past_proxies(environ)) == past_proxies(environ)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:4242", True),
        ("https://localhost/predict", True),
        ("http://vision.localhost", True),
        ("http://[::1]:4242", True),
        ("http://127.8.9.10", True),
        ("http://127.0.0.1.example.org", False),
        ("http://10.0.0.1", False),
        ("http://example.org/?to=http://127.0.0.1", False),
        ("nothing", False),
        ("http://[::1", False),
    ],
)
def test_knows_this_machine_by_its_names(url: str, expected: bool) -> None:
    assert is_loopback(url) is expected
    assert isinstance(direct_transport(url), httpx.HTTPTransport) is expected
