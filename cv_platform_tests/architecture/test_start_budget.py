"""What the service imports before it is ready: each of these libraries takes longer than loading a small model."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
DATABASE = {"sqlalchemy", "psycopg2", "alembic"}
FRAMEWORKS = {"tensorflow", "keras", "onnxruntime"}
SERVING = {"fastapi", "uvicorn", "numpy", "cv2", "PIL", "prometheus_client", "cv_platform.images"}
IMPORT_SERVICE = "import bentos.image_classifier.service as service"
AS_WORKER = "import bentoml; bentoml.server_context.worker_index = 1"


def run(program: str, home: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a program in a process of its own, whose installation is `home`."""
    inherited = {n: v for n, v in os.environ.items() if not n.startswith("CV_") and n != "DATABASE_URL"}
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        env={**inherited, "CV_HOME": str(home), "BENTOML_HOME": str(home / "bentoml"), **variables},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def printed(program: str, home: Path, **variables: str) -> object:
    """Returns the value that the last line of a program's output spells."""
    done = run(program, home, **variables)
    assert done.returncode == 0, done.stderr[-3000:]
    return ast.literal_eval(done.stdout.strip().splitlines()[-1])


def loaded(names: set[str]) -> str:
    return f"import sys; print([name for name in sorted({names!r}) if name in sys.modules])"


def test_the_first_process_imports_nothing_that_serves(tmp_path: Path) -> None:
    program = f"{IMPORT_SERVICE}\n{loaded(DATABASE | FRAMEWORKS | SERVING)}"
    assert printed(program, tmp_path) == []


def test_a_worker_is_ready_without_the_databases_driver(tmp_path: Path) -> None:
    start, stop = "worker = service.ImageClassifier.inner()", "worker.stop()"
    program = "\n".join((AS_WORKER, IMPORT_SERVICE, start, loaded(DATABASE | FRAMEWORKS), stop))
    assert printed(program, tmp_path) == []


@pytest.mark.parametrize(
    ("variable", "value"),
    [("CV_SERVICE_WORKERS", "many"), ("DATABASE_URL", "mysql://db/log"), ("CV_STORAGE", "nowhere://bucket/models")],
)
def test_the_first_process_refuses_what_no_worker_could_start_with(variable: str, value: str, tmp_path: Path) -> None:
    done = run(IMPORT_SERVICE, tmp_path, **{variable: value})
    assert done.returncode != 0
    assert f"{variable}: " in done.stderr.strip().splitlines()[-1]
