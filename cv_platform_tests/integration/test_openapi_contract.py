"""Schemathesis on a running service with a real model and a real database: its answers are those that it documents."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest

from benchmarks.servers import serving
from cv_platform.local.http import free_port
from cv_platform.local.programs import service_command
from cv_platform.settings import quiet_variables
from cv_platform.storage import CentralStorage, ProductionPointer
from cv_platform_tests.support.hand_made import hand_made_export
from cv_platform_tests.support.http_client import flat_image, png
from cv_platform_tests.support.tiny_models import MODEL_NAME, publish_tiny

REPOSITORY = Path(__file__).parents[2]
SERVICE = "image_classifier"
TOKEN = "schemathesis-is-the-admin-here"
CHECKS = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")
EXAMPLES = 25
LOOK_UPS = (
    "GET /predictions/{prediction_id}",
    "GET /predictions/{prediction_id}/passport",
    "POST /feedback/{prediction_id}",
)
_OPERATION = """
[[operations]]
include-name = "{name}"
parameters = {{ prediction_id = "{id}" }}
"""

pytestmark = pytest.mark.timeout(400)


@pytest.fixture
def base_url(tmp_path: Path, database_url: str) -> Iterator[str]:
    home = tmp_path / "home"
    storage = CentralStorage(home / "storage")
    metadata = publish_tiny(storage, hand_made_export(tmp_path / "export"))
    storage.write_pointer(
        SERVICE, ProductionPointer(model_name=MODEL_NAME, version=metadata.version, since_utc=datetime.now(UTC))
    )
    port = free_port()
    environment = {
        **os.environ,
        **quiet_variables(),
        "CV_HOME": str(home),
        "CV_ADMIN_TOKEN": TOKEN,
        "CV_SERVICE_WORKERS": "1",
        "DATABASE_URL": database_url,
        "BENTOML_HOME": str(tmp_path / "bentoml"),
    }
    with serving(
        "service",
        service_command(port),
        environment=environment,
        base_url=f"http://127.0.0.1:{port}",
        health_path="/readyz",
        log=tmp_path / "service.log",
    ) as server:
        yield server.base_url


def test_every_answer_is_one_that_the_openapi_document_describes(base_url: str):
    # An id that exists, so that what is looked up is found; the deletion keeps to ids of its own.
    answered = httpx.post(f"{base_url}/predict", files={"file": ("a.png", png(flat_image(9, 99, 199)))}, timeout=30)
    assert answered.status_code == 200
    with tempfile.TemporaryDirectory() as folder:  # Schemathesis keeps its examples where it runs.
        known = "".join(_OPERATION.format(name=name, id=answered.json()["prediction_id"]) for name in LOOK_UPS)
        (Path(folder) / "schemathesis.toml").write_text(known, encoding="utf-8")
        done = subprocess.run(
            [
                *(sys.executable, "-m", "schemathesis.cli", "run", f"{base_url}/openapi.json"),
                *("--checks", ",".join(CHECKS), "--max-examples", str(EXAMPLES), "--seed", "20260131"),
                *("--header", f"Authorization: Bearer {TOKEN}", "--phases", "examples,coverage,fuzzing"),
                *("--continue-on-failure", "--request-timeout", "30", "--no-color", "--suppress-health-check", "all"),
            ],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]
    assert "No issues found" in done.stdout or "passed" in done.stdout
    assert httpx.get(f"{base_url}/health_check", timeout=30).json()["status"] == "ready"
