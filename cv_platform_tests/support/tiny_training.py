"""A tiny experiment and its packed dataset: 3 classes, 16×16 pixels, through the real manifest and packing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import cv2
import numpy as np

from cv_platform.config import ExperimentConfig, parse_experiment
from cv_platform.datasets.manifest import build_manifest
from cv_platform.datasets.packing import pack_images
from cv_platform.records import DatasetVersion, PackedImages, Provenance

CLASSES = ("blue", "green", "red")
COUNTS = {"train": 16, "valid": 6, "test": 2, "reference": 2}


def experiment(**changes: Any) -> ExperimentConfig:
    """Returns the tiny experiment; `changes` are dotted fields with `__` for the dot (`train__seed=1`)."""
    content: dict[str, Any] = {
        "name": "tiny",
        "model": {
            "model_name": "tiny_model",
            "classes": list(CLASSES),
            "input_size": {"h": 16, "w": 16},
            "architecture": "small_cnn",
            "dropout": 0.2,
        },
        "dataset": {"ds_name": "tiny", "dvc_tag": "v1"},
        "train": {
            "epochs": 3,
            "batch_size": 16,
            "init_lr": 0.003,
            "schedule": "one_cycle",
            "label_smoothing": 0.05,
            "weight_decay": 0.0001,
            "seed": 3,
            "augment": {"flip_horizontal": 0.5, "brightness_fraction": 0.1},
        },
    }
    for name, value in changes.items():
        *sections, field = name.split("__")
        section = content
        for part in sections:
            section = section[part]
        section[field] = value
    return parse_experiment(content, origin="tiny")


def pack_tiny(root: Path, config: ExperimentConfig | None = None) -> PackedImages:
    """Packs noise with one brighter channel, as `config` says: learned in a few steps."""
    model = (config or experiment()).model
    return pack_images(tiny_version(root), model, quarantined=(), home=root / "home")


def tiny_version(root: Path, counts: Mapping[str, int] = MappingProxyType(COUNTS), *, seed: int = 0) -> DatasetVersion:
    """Makes `root/version`: noise with one brighter channel, so many images per split and class."""
    rng = np.random.default_rng(seed)
    for split, count in counts.items():
        for channel, name in enumerate(CLASSES):  # OpenCV writes BGR, so channel 0 is blue.
            folder = root / "version" / "images" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                image = rng.integers(0, 120, (16, 16, 3), dtype=np.uint8)
                image[:, :, channel] += 120
                assert cv2.imwrite(str(folder / f"{index:02d}.png"), image)
    config, directory = experiment(), root / "version"
    manifest = build_manifest(
        directory, data_path="images", annotations=None, model=config.model, dataset=config.dataset
    )
    return DatasetVersion(
        provenance=Provenance(ds_name="tiny", dvc_tag="v1", dvc_md5=f"{seed:032d}.dir"),
        git_commit="0" * 40,
        directory=directory,
        manifest=manifest.name,
        class_names=CLASSES,
    )
