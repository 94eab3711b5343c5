"""`make up` for real: everything answers, what is killed comes back, and `make down` leaves nothing behind.

Its home has an odd name, and its environment names a proxy that leads nowhere. It is the installation of test_demo and
test_tour, which come first, by their names.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import bentoml
import httpx
import psutil
import pytest
from sqlalchemy import text

from benchmarks.servers import process_tree
from cv_platform.database.address import running_database_url
from cv_platform.database.connection import make_engine
from cv_platform.local.http import is_taken
from cv_platform.local.leftovers import leftover_pids, program_mark
from cv_platform.local.programs import programs
from cv_platform.local.supervisor import control
from cv_platform.settings import Settings
from cv_platform_tests.support.demo_run import REPOSITORY, Stack, cli
from cv_platform_tests.support.http_client import flat_image, png
from cv_platform_tests.support.waiting import wait_until

pytestmark = [pytest.mark.whole, pytest.mark.xdist_group("demo"), pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def variables(stack: Stack) -> dict[str, str]:
    return stack.variables


@pytest.fixture(scope="module")
def settings(stack: Stack) -> Settings:
    return stack.settings


def pid_of(settings: Settings, program: str) -> int:
    return int(control(settings, "pid", program))


def listens(pid: int, port: int) -> bool:
    """Whether a process or one of its children holds the port."""
    process = psutil.Process(pid)
    family = [process, *process.children(recursive=True)]
    found = (connection for member in family for connection in member.net_connections("tcp"))
    return any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in found)


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def test_every_program_runs_and_every_page_answers(variables: dict[str, str], settings: Settings) -> None:
    status = control(settings, "status")
    assert status.count("RUNNING") == len(programs(settings)) == 6
    for program in programs(settings):
        if program.port is not None:
            assert answers(f"http://127.0.0.1:{program.port}{program.health_path}")
    assert len(process_tree(pid_of(settings, "mlflow"))) == 1, "it is its server itself, and runs no helpers"
    rebound = httpx.get(f"http://127.0.0.1:{settings.mlflow_port}/", headers={"Host": "elsewhere.example"})
    assert rebound.status_code == 403, "MLflow's own check of the host stands before the server"
    again = cli(variables, "up")
    assert again.returncode == 1
    assert "it is running" in again.stderr
    demo = cli(variables, "demo")
    assert demo.returncode == 1
    assert "make down" in demo.stderr


def test_bentomls_clients_predict_and_their_answers_reach_the_database(settings: Settings, tmp_path: Path) -> None:
    url, image = f"http://127.0.0.1:{settings.service_port}", tmp_path / "grey.png"
    image.write_bytes(png(flat_image(90, 90, 90)))

    async def ask() -> dict[str, Any]:
        client: Any = bentoml.AsyncHTTPClient(url)
        async with client:
            return await client.predict(file=image, explain="none")

    client: Any = bentoml.SyncHTTPClient(url)
    with client:
        results = [client.predict(file=image), asyncio.run(ask())]
        client.feedback(prediction_id=results[0]["prediction_id"], none_of_these=True)
    ids = [result["prediction_id"] for result in results]
    address = running_database_url(settings)
    assert address is not None
    engine = make_engine(address)

    def count() -> int:
        query = text("SELECT count(*) FROM predictions WHERE CAST(prediction_id AS text) = ANY(:ids)")
        with engine.connect() as connection:
            return connection.execute(query, {"ids": ids}).scalar_one()

    wait_until(lambda: count() == len(ids))
    engine.dispose()


def test_the_readmes_example_prints_a_class(settings: Settings, tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    assert ":4242" in example
    (tmp_path / "seven.png").write_bytes(png(flat_image(90, 90, 90)))
    done = subprocess.run(
        [sys.executable, "-c", example.replace(":4242", f":{settings.service_port}")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.strip() in {str(digit) for digit in range(10)}


def test_a_killed_service_comes_back_on_its_port(settings: Settings) -> None:
    killed = pid_of(settings, "service")
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: pid_of(settings, "service") not in {0, killed})
    restarted = pid_of(settings, "service")
    wait_until(lambda: answers(f"http://127.0.0.1:{settings.service_port}/livez"))
    # A leftover that held the port would be killed, or answer in its place while it loops.
    wait_until(lambda: listens(restarted, settings.service_port))
    assert pid_of(settings, "service") == restarted


def test_a_killed_postgres_comes_back_with_its_rows(settings: Settings) -> None:
    url = running_database_url(settings)
    assert url is not None
    engine = make_engine(url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE kept (number int)"))
        connection.execute(text("INSERT INTO kept VALUES (42)"))
    engine.dispose()
    killed = pid_of(settings, "postgres")
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: pid_of(settings, "postgres") not in {0, killed} and running_database_url(settings) == url)
    engine = make_engine(url)
    with engine.connect() as connection:
        assert connection.execute(text("SELECT number FROM kept")).scalar_one() == 42
    engine.dispose()


def test_down_leaves_no_process_and_no_port(variables: dict[str, str], settings: Settings) -> None:
    stopped = cli(variables, "down")
    assert stopped.returncode == 0, stopped.stderr
    assert stopped.stdout.strip() == "Stopped."
    for program in programs(settings):
        assert leftover_pids(program_mark(settings.home, program.name)) == []
        assert program.port is None or not is_taken(program.port)
    assert running_database_url(settings) is None
    assert "Not running" in cli(variables, "status").stdout


def test_nothing_of_all_that_reached_a_proxy(stack: Stack) -> None:
    assert stack.proxy.asked == []
