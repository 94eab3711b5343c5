"""A data set of one's own, with several labels per image: imported, trained, and served by the built Bento alone."""

from __future__ import annotations

import csv
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import cv2
import httpx
import numpy as np
import pandas as pd
import pytest

from cv_platform.local.environment import platform_environment, prepare_home
from cv_platform.local.http import free_port, wait_for_http
from cv_platform.record_store import RecordStore
from cv_platform.records import DatasetVersion, DriftReport, Evaluation, ModelBundle, Record, ReferenceData
from cv_platform.settings import Settings

REPOSITORY = Path(__file__).parents[2]
# Not in the order of the alphabet: an output that is named by a sorted list gets the wrong name.
CLASSES = ("square", "circle", "stripe")
SPLITS = {"train": 120, "valid": 32, "test": 40, "reference": 48}
ASSETS = (
    "dataset",
    "embeddings",
    "validation_report",
    "packed_images",
    "model",
    "evaluation",
    "drift_detectors",
    "reference_data",
    "bento",
    "challenger_replay",
    "deployment",
    "drift_report",
    "production_metrics",
    "labeling_queue",
    "labelled_version",
)
SIZE = 16
THRESHOLD = 0.4
CONFIG = f"""
name: shapes
model:
  model_name: shapes_classifier
  classifier_type: multi-label
  classes: [{", ".join(CLASSES)}]
  input_size: {{h: {SIZE}, w: {SIZE}}}
  architecture: small_cnn
  threshold: {THRESHOLD}
  drift_detection: {{uae_encoding_dims: 8}}
dataset: {{ds_name: shapes, dvc_tag: v1.0.0}}
validate: {{deepchecks_suites: "off"}}
train: {{epochs: 12, batch_size: 16, init_lr: 0.003, seed: 3}}
evaluate: {{min_accuracy: 0.0, min_macro_f1: 0.0}}
monitor: {{min_samples: 20}}
"""
R = TypeVar("R", bound=Record)
pytestmark = [pytest.mark.whole, pytest.mark.xdist_group("multi_label"), pytest.mark.timeout(600)]


@dataclass(frozen=True)
class Shapes:
    """What importing and one run left."""

    folder: Path
    settings: Settings
    imported: str

    def record(self, kind: type[R]) -> R:
        found = RecordStore(self.settings.home, "shapes").latest(kind)
        assert found is not None
        return found


def draw(labels: tuple[bool, ...], generator: np.random.Generator) -> np.ndarray:
    """Draws a red square, a green circle and a blue stripe, each in a part of its own, on noise."""
    image = generator.integers(0, 60, (SIZE, SIZE, 3), dtype=np.uint8)
    if labels[0]:
        cv2.rectangle(image, (1, 1), (6, 6), (30, 30, 240), -1)
    if labels[1]:
        cv2.circle(image, (11, 4), 3, (30, 240, 30), -1)
    if labels[2]:
        cv2.rectangle(image, (0, 11), (SIZE - 1, 13), (240, 30, 30), -1)
    return image


def make_source(folder: Path) -> None:
    generator = np.random.default_rng(5)
    # All eight label sets, none included, equally often in every split.
    label_sets = list(itertools.product((False, True), repeat=3))
    (folder / "pictures").mkdir(parents=True)
    with (folder / "annotations.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "split", *CLASSES])
        for split, count in SPLITS.items():
            for number in range(count):
                labels = label_sets[number % len(label_sets)]
                path = f"pictures/{split}_{number:03}.png"
                assert cv2.imwrite(str(folder / path), draw(labels, generator))
                writer.writerow([path, split, *map(int, labels)])


@pytest.fixture(scope="module")
def shapes() -> Iterator[Shapes]:
    # Not below pytest's own folder, which is closed to the unprivileged user that runs PostgreSQL for root.
    folder = Path(tempfile.mkdtemp(prefix="cv-shapes-"))
    try:
        folder.chmod(0o711)
        make_source(folder / "source")
        (folder / "shapes.yaml").write_text(CONFIG)
        settings = Settings.from_environment(
            {"CV_HOME": str(folder / "home"), "CV_CONFIGS": str(folder / "shapes.yaml")}
        )
        prepare_home(settings)
        environment = platform_environment(settings)
        environment.pop("DATABASE_URL", None)
        options: dict[str, Any] = {"cwd": REPOSITORY, "env": environment, "capture_output": True, "text": True}
        command = [sys.executable, "-m", "cv_platform.cli", "import-dataset", str(folder / "source")]
        imported = subprocess.run(
            [*command, "--name", "shapes", "--tag", "v1.0.0"], check=False, timeout=120, **options
        )
        assert imported.returncode == 0, imported.stderr
        command = [sys.executable, "-m", "cv_platform.defs.materialize", "cv_platform.definitions", "key:shapes/*"]
        run = subprocess.run(command, check=False, timeout=400, **options)
        assert run.returncode == 0, (run.stdout + run.stderr)[-6000:]
        yield Shapes(folder, settings, imported.stdout)
    finally:
        shutil.rmtree(folder)


def test_the_import_names_the_classes_in_the_order_of_the_columns(shapes: Shapes) -> None:
    assert 'classes: ["square", "circle", "stripe"]' in shapes.imported
    assert 'classifier_type: "multi-label"' in shapes.imported
    assert "classes are the columns square, circle, stripe: every value is 0 or 1" in shapes.imported
    counts = next(line for line in shapes.imported.splitlines() if line.startswith("  images: "))
    found = dict(part.rsplit(" ", 1) for part in counts.removeprefix("  images: ").split(", "))
    assert {split: int(count) for split, count in found.items()} == SPLITS


def test_all_ten_assets_leave_their_record(shapes: Shapes) -> None:
    names = {path.stem for path in (shapes.settings.home / "records" / "shapes").glob("*.json")}
    assert names == set(ASSETS)
    assert shapes.record(DriftReport).verdict == "insufficient data"


def test_the_evaluation_is_that_of_several_labels(shapes: Shapes) -> None:
    evaluation = shapes.record(Evaluation)
    metrics, predictions = evaluation.metrics, pd.read_parquet(evaluation.predictions_path)
    for name in ("accuracy", "exact_match", "macro_f1", "auc_macro", "ece", "brier", "mean_confidence"):
        assert 0 <= metrics[name] <= 1, name
    assert metrics["accuracy"] > 0.7  # Guessing gives 0.5.
    assert [row["support"] for row in evaluation.per_class] == [20, 20, 20]
    decisions = np.stack(list(predictions["probabilities"])) >= np.float32(THRESHOLD)
    named = ["|".join(itertools.compress(CLASSES, row)) for row in decisions]
    assert list(predictions["predicted_class"]) == named
    assert any("|" in name for name in named)
    truth = np.array([[name in label.split("|") for name in CLASSES] for label in predictions["label"]])
    assert metrics["accuracy"] == pytest.approx((truth == decisions).mean())
    assert metrics["exact_match"] == pytest.approx((truth == decisions).all(axis=1).mean())


def test_the_reference_is_the_reference_split_with_its_labels(shapes: Shapes) -> None:
    manifest = pd.read_parquet(shapes.record(DatasetVersion).manifest_path)
    reference = pd.read_parquet(shapes.record(ReferenceData).path)
    split = manifest[manifest["split"] == "reference"].set_index("path")["labels"]
    assert len(reference) == SPLITS["reference"]
    assert list(reference["path"]) == sorted(split.index)
    wanted = ["|".join(name for name in CLASSES if name in split[path]) for path in reference["path"]]
    assert list(reference["label"]) == wanted
    assert wanted.count("") == SPLITS["reference"] // 8


def test_the_bento_answers_alone_as_the_evaluation_did(shapes: Shapes) -> None:
    bento, elsewhere = shapes.record(ModelBundle), shapes.folder / "elsewhere"
    (elsewhere / "home").mkdir(parents=True)
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in {"DATABASE_URL", "PYTHONPATH"} and not name.startswith(("CV_", "DAGSTER_", "MLFLOW_"))
    }
    environment |= {
        "BENTOML_HOME": str(shapes.settings.home / "bentoml"),
        "BENTOML_DO_NOT_TRACK": "True",
        "CV_HOME": str(elsewhere / "home"),
        "CV_SERVICE_WORKERS": "1",
    }
    port, log = free_port(), elsewhere / "service.log"
    command = [sys.executable, "-m", "bentoml", "serve", bento.bento_tag, "--host", "127.0.0.1"]
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            cwd=elsewhere,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        try:
            wait_for_http(f"{url}/health_check", seconds=120, alive=lambda: process.poll() is None)
        except Exception as err:
            err.add_note(log.read_text()[-4000:])
            raise
        with httpx.Client(base_url=url, timeout=60) as client:
            health = client.get("/health_check").json()
            assert health["status"] == "ready"
            assert health["model"]["model_source"] == "bundled"
            assert health["model_version"] == bento.model.version
            offline = pd.read_parquet(shapes.record(Evaluation).predictions_path)
            directory = shapes.record(DatasetVersion).directory
            for _, row in offline.iterrows():
                data = (directory / row["path"]).read_bytes()
                answer = client.post("/predict", params={"explain": "none"}, files={"file": ("x.png", data)})
                assert answer.status_code == 200, answer.text
                body = answer.json()
                assert list(body["prediction"]) == list(CLASSES)
                served = np.array(list(body["prediction"].values()))
                assert np.abs(served - row["probabilities"]).max() <= 1e-5
                assert body["predicted_classes"] == [n for n, p in body["prediction"].items() if p >= THRESHOLD]
                assert body["predicted_class"] == row["predicted_class"]
    finally:
        process.terminate()
        process.wait(timeout=60)
