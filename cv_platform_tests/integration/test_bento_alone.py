"""A Bento on a machine with nothing else: an empty environment with its requirements only, and a home of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import bentoml
import cv2
import httpx
import numpy as np
import pytest

from cv_platform.deployment.bento import SHIPPED, build_bento
from cv_platform.local.http import free_port, wait_for_http
from cv_platform.serving.model.runtime import load_folder
from cv_platform.storage import CentralStorage, ProductionPointer
from cv_platform_tests.support.app_fixtures import spooled_at
from cv_platform_tests.support.hand_made import hand_made_export
from cv_platform_tests.support.http_client import png
from cv_platform_tests.support.tiny_models import (
    CLASS_NAMES,
    MODEL_NAME,
    TinyExport,
    publish_tiny,
    tiny_images,
    tiny_metadata,
)

REPOSITORY = Path(__file__).parents[2]
SERVICE = REPOSITORY / "bentos" / "image_classifier"
pytestmark = [pytest.mark.xdist_group("bento_alone"), pytest.mark.timeout(300)]


@dataclass(frozen=True)
class Alone:
    """The Bento in its environment."""

    export: TinyExport
    python: Path
    environment: dict[str, str]
    tag: str
    folder: Path


def bare_environment(folder: Path) -> dict[str, str]:
    """Returns an environment that names nothing of this installation, with `folder` as home."""
    kept = {"LANG", "LC_ALL", "TMPDIR"}
    home = folder / "home"
    home.mkdir()
    return {name: value for name, value in os.environ.items() if name in kept} | {
        "PATH": "/usr/bin:/bin",
        "HOME": str(home),
        "CV_HOME": str(home / "cv"),
        "BENTOML_HOME": str(folder / "bentoml"),
        "BENTOML_DO_NOT_TRACK": "True",
        "CV_SERVICE_WORKERS": "1",
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Alone:
    folder = tmp_path_factory.mktemp("alone")
    export = hand_made_export(folder / "export")
    tag = build_bento(export.folder, tiny_metadata(), bentoml_home=folder / "bentoml")
    venv.create(folder / "venv")
    python = folder / "venv" / "bin" / "python"
    requirements = folder / "bentoml" / "bentos" / tag.replace(":", "/") / "env" / "python" / "requirements.txt"
    # Pinned indirectly too, so that a release of tomorrow does not decide.
    constraints = folder / "constraints.txt"
    lines = (REPOSITORY / "requirements.lock").read_text().splitlines()
    constraints.write_text("\n".join(m[1] for line in lines if (m := re.match(r"([A-Za-z0-9_.-]+==[^\s;\\]+)", line))))
    install = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", str(python)]
    subprocess.run([*install, "-r", str(requirements), "-c", str(constraints)], check=True, timeout=240)
    return Alone(export, python, bare_environment(folder), tag, folder)


@contextmanager
def serving(alone: Alone, tag: str, **variables: str) -> Iterator[str]:
    """Serves a Bento by its tag, as its user would, and yields the address."""
    port, log = free_port(), alone.folder / "service.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [str(alone.python), "-m", "bentoml", "serve", tag, "--host", "127.0.0.1", "--port", str(port)],
            cwd=alone.environment["HOME"],
            env={**alone.environment, **variables},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        address = f"http://127.0.0.1:{port}"
        try:
            wait_for_http(f"{address}/health_check", seconds=120, alive=lambda: process.poll() is None)
        except Exception as err:
            err.add_note(log.read_text()[-4000:])
            raise
        yield address
    finally:
        process.terminate()
        process.wait(timeout=60)


@pytest.fixture(scope="module")
def url(alone: Alone) -> Iterator[str]:
    with serving(alone, alone.tag) as url:
        yield url


def test_its_environment_holds_no_framework_of_training(alone: Alone) -> None:
    code = (
        "from importlib.util import find_spec\n"
        "print(*(n for n in ('tensorflow', 'keras', 'tf2onnx', 'onnx', 'pandas', 'sklearn', 'mlflow', 'dagster', "
        "'cv_platform') if find_spec(n)))"
    )
    command = [str(alone.python), "-c", code]
    done = subprocess.run(
        command, cwd=alone.environment["HOME"], env=alone.environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def test_it_answers_as_the_model_that_was_exported(alone: Alone, url: str) -> None:
    model = load_folder(alone.export.folder, tiny_metadata())
    with httpx.Client(base_url=url, timeout=60) as client:
        health = client.get("/health_check").json()
        assert (health["status"], health["model"]["model_source"]) == ("ready", "bundled")
        for image in tiny_images(5, seed=6):
            done, data = cv2.imencode(".png", image[:, :, ::-1])
            assert done
            answer = client.post("/predict", files={"file": ("x.png", data.tobytes())})
            assert answer.status_code == 200, answer.text
            body = answer.json()
            expected = model.predict(image).probabilities
            np.testing.assert_allclose([body["prediction"][name] for name in CLASS_NAMES], expected, atol=1e-6)
            assert body["predicted_class"] == CLASS_NAMES[int(expected.argmax())]
            assert body["overlaid_img"]


def build_by_hand(alone: Alone, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bentoml", "build", *arguments, "--output", "tag"],
        cwd=folder,
        env={**os.environ, "BENTOML_HOME": alone.environment["BENTOML_HOME"], "CV_HOME": alone.environment["CV_HOME"]},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("folder", "arguments"),
    [
        (SERVICE, ("-f", "../../bentofile.yaml", "../..")),
        (SERVICE, (".", "--name", "image_classifier")),
        (REPOSITORY, ("bentos/image_classifier",)),
    ],
)
def test_typed_by_hand_a_build_takes_the_whole_service(
    alone: Alone, folder: Path, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PWD", str(folder))
    done = build_by_hand(alone, folder, *arguments)
    assert done.returncode == 0, done.stderr
    name, _, version = done.stdout.strip().splitlines()[-1].removeprefix("__tag__:").partition(":")
    built = Path(alone.environment["BENTOML_HOME"], "bentos", name, version, "src")
    assert {path.name for path in (built / "cv_platform").iterdir()} == set(SHIPPED)
    assert (built / "bentos" / "image_classifier" / "service.py").is_file()


def test_a_build_of_the_folder_alone_says_where_to_build(alone: Alone, tmp_path: Path) -> None:
    shutil.copytree(SERVICE, tmp_path / "bentos" / "image_classifier", ignore=shutil.ignore_patterns("__pycache__"))
    done = build_by_hand(alone, tmp_path / "bentos" / "image_classifier")
    assert done.returncode != 0
    said = " ".join((done.stdout + done.stderr).split())
    assert "Expected a checkout, with bentofile.yaml, around" in said
    assert "Run `bentoml build` in a checkout." in said


def test_built_by_hand_it_serves_what_storage_names_and_logs_it(alone: Alone) -> None:
    done = build_by_hand(alone, SERVICE)
    assert done.returncode == 0, done.stderr
    tag = done.stdout.strip().splitlines()[-1].removeprefix("__tag__:")
    assert tag.startswith("image_classifier:")
    storage, home = CentralStorage(alone.folder / "storage"), alone.folder / "by_hand"
    metadata = publish_tiny(storage, alone.export)
    storage.write_pointer(
        "image_classifier",
        ProductionPointer(model_name=MODEL_NAME, version=metadata.version, since_utc=datetime.now(UTC)),
    )
    image = alone.folder / "image.png"
    image.write_bytes(png(tiny_images(1, seed=6)[0]))
    with serving(alone, tag, CV_HOME=str(home), CV_STORAGE=str(alone.folder / "storage")) as url:
        client: Any = bentoml.SyncHTTPClient(url)
        with client:
            answer = client.predict(file=image, explain="none")
        assert answer["model_version"] == metadata.version
        assert answer["prediction_id"] in {record.get("prediction_id") for record in spooled_at(home)}
