"""Real images with several labels of which 30 % are hidden: ignored, they teach no wrong answers."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

from cv_platform.config import ExperimentConfig, parse_experiment
from cv_platform.datasets.importing import ImportRules, import_dataset
from cv_platform.datasets.packing import pack_images
from cv_platform.datasets.versions import checkout_version
from cv_platform.evaluation.evaluate import evaluate_model
from cv_platform.records import Evaluation
from cv_platform.training.trainer import train_model

CLASSES = ("even", "five or more", "loop")
SPLITS = {"test": 600, "reference": 60, "valid": 250, "train": 400}
HIDDEN = 0.3
pytestmark = [pytest.mark.xdist_group("training"), pytest.mark.timeout(900)]


def write_digits(folder: Path) -> None:
    """Writes the digits with a CSV of their properties; but for test, three in ten cells are blank or −1."""
    digits, rng = load_digits(), np.random.default_rng(0)
    images, names = digits.images, digits.target  # pyright: ignore[reportAttributeAccessIssue]
    labels = np.stack([names % 2 == 0, names >= 5, np.isin(names, (0, 6, 8, 9))], axis=1)
    splits = [split for split, count in SPLITS.items() for _ in range(count)]
    folder.mkdir(parents=True)
    with (folder / "annotations.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "split", *CLASSES])
        for at, row in enumerate(np.random.default_rng(0).permutation(len(names))[: len(splits)]):
            pixels = cv2.resize((images[row] * (255 / 16)).astype(np.uint8), (16, 16), interpolation=cv2.INTER_LINEAR)
            assert cv2.imwrite(str(folder / f"{at:04d}.png"), pixels)
            hidden = (rng.random(len(CLASSES)) < HIDDEN) & (splits[at] != "test")
            cells = [
                ("", "-1")[at % 2] if is_hidden else str(int(value))
                for value, is_hidden in zip(labels[row], hidden, strict=True)
            ]
            writer.writerow([f"{at:04d}.png", splits[at], *cells])


@dataclass(frozen=True)
class Made:
    """What came of one way to read the blanks: ranks on test labels that are all known, and the evaluation."""

    auc: float
    evaluation: Evaluation


def make(home: Path, unknown: Literal["negative", "ignore"]) -> Made:
    write_digits(home / "source")
    rules = ImportRules(unknown=unknown)
    imported = import_dataset(home / "source", ds_name="digits", tag="v1", ds_root=home / "datasets", rules=rules)
    assert bool(imported.unknown_counts) == (unknown == "ignore")
    config = _config()
    version = checkout_version(config.dataset, config.model, home=home)
    packed = pack_images(version, config.model, quarantined=(), home=home)
    trained = train_model(packed, config, directory=home / "models")
    evaluation = evaluate_model(
        trained,
        packed,
        config,
        champion=None,
        directory=home / "evaluation",
        run=None,
        manifest=version.manifest_path,
    )
    predictions = pd.read_parquet(evaluation.predictions_path)
    truth = np.array([[name in label.split("|") for name in CLASSES] for label in predictions["label"]])
    return Made(float(roc_auc_score(truth, np.stack(list(predictions["probabilities"])))), evaluation)


def _config() -> ExperimentConfig:
    model = {
        "model_name": "properties",
        "classes": list(CLASSES),
        "classifier_type": "multi-label",
        "input_size": {"h": 16, "w": 16},
        "architecture": "small_cnn",
    }
    train = {"epochs": 40, "batch_size": 32, "init_lr": 0.003, "seed": 0}
    content = {"name": "properties", "model": model, "dataset": {"ds_name": "digits", "dvc_tag": "v1"}, "train": train}
    return parse_experiment(content, origin="test")


def test_ignored_labels_make_a_better_model_than_wrong_ones(tmp_path: Path) -> None:
    as_no, ignored = make(tmp_path / "negative", "negative"), make(tmp_path / "ignore", "ignore")
    assert ignored.auc > as_no.auc
    assert ignored.evaluation.metrics["accuracy"] > as_no.evaluation.metrics["accuracy"] + 0.03
    for made in (as_no, ignored):  # All labels of test are known.
        assert made.evaluation.metrics["auc_macro"] == pytest.approx(made.auc)
        assert "known_label_share" not in made.evaluation.metrics
    # A model that was told that three in ten of the labels are not there says so.
    assert ignored.evaluation.metrics["macro_recall"] > as_no.evaluation.metrics["macro_recall"] + 0.05
