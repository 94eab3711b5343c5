"""The round trip through a real Label Studio, which is installed into an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
from sqlalchemy import Engine

from cv_platform.local.http import free_port
from cv_platform.monitoring.label_exchange import (
    import_labels,
    label_studio_config,
    read_labels_file,
    read_queue,
    write_tasks,
)
from cv_platform_tests.integration.test_label_exchange import CONFIG, queued, said
from cv_platform_tests.support.waiting import wait_until

__all__ = ["queued"]
pytestmark = [pytest.mark.whole, pytest.mark.timeout(900)]

VERSION = "1.23.2"
TOKEN = "0123456789abcdef0123456789abcdef01234567"
USER = "anna@example.com"


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[httpx.Client]:
    """A client of a fresh Label Studio with one user."""
    environment = tmp_path / "environment"
    uv = Path(sys.executable).with_name("uv")
    python = environment / "bin" / "python"
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, environment], check=True)
    subprocess.run([uv, "pip", "install", "--quiet", "--python", python, f"label-studio=={VERSION}"], check=True)
    port = free_port()
    command = ["start", "--no-browser", "--internal-host", "127.0.0.1", "--port", str(port)]
    command += ["--data-dir", str(tmp_path / "data"), "--username", USER, "--password", "not-a-secret"]
    settings = {
        "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
        "LABEL_STUDIO_USER_TOKEN": TOKEN,
        "COLLECT_ANALYTICS": "false",
        "LATEST_VERSION_CHECK": "false",
        "HOME": str(tmp_path),
    }
    log = (tmp_path / "studio.log").open("wb")
    process = subprocess.Popen(
        [environment / "bin" / "label-studio", *command],
        env={**os.environ, **settings},
        stdout=log,
        stderr=log,
        stdin=subprocess.DEVNULL,
    )
    try:
        with httpx.Client(
            base_url=f"http://127.0.0.1:{port}",
            headers={"Authorization": f"Token {TOKEN}"},
            timeout=60,
            trust_env=False,
        ) as client:
            wait_until(lambda: is_up(client), seconds=400, process=process)
            yield client
    finally:
        process.terminate()
        process.wait(60)
        log.close()


def is_up(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def ask(client: httpx.Client, method: str, path: str, **options: Any) -> Any:
    response = client.request(method, path, **options)
    assert response.is_success, f"{method} {path}: {response.status_code} {response.text[:500]}"
    return response.json()


def test_the_queue_is_labelled_in_label_studio_and_comes_back(
    engine: Engine, queued: list[UUID], studio: httpx.Client
) -> None:
    project = ask(
        studio, "POST", "/api/projects/", json={"title": "pets", "label_config": label_studio_config(CONFIG.model)}
    )
    tasks = json.loads(write_tasks(engine, read_queue(engine, "pets"), CONFIG.model))
    made = ask(studio, "POST", f"/api/projects/{project['id']}/import", json=tasks)
    assert (made["task_count"], made["prediction_count"]) == (3, 3)
    listed = ask(studio, "GET", "/api/tasks", params={"project": project["id"], "fields": "all"})["tasks"]
    by_prediction = {task["data"]["prediction_id"]: task["id"] for task in listed}
    for prediction_id, choice in zip(queued, ("dog", "none of these"), strict=False):
        result = {
            "from_name": "class",
            "to_name": "image",
            "type": "choices",
            "value": {"choices": [choice]},
        }
        ask(studio, "POST", f"/api/tasks/{by_prediction[str(prediction_id)]}/annotations/", json={"result": [result]})
    export = studio.get(f"/api/projects/{project['id']}/export", params={"exportType": "JSON"})
    assert export.is_success, export.text[:500]
    added = import_labels(engine, CONFIG, read_labels_file(export.content, CONFIG.model, labeller="me"))
    assert (added.added, added.gone) == (2, ())
    names = {(prediction_id, label) for prediction_id, label, _ in said(engine)}
    assert names == {(queued[0], "dog"), (queued[1], "")}
    assert all(source.startswith("labeller:label-studio-") for *_, source in said(engine))
