"""A dataset of drawings, and a request log in which people say what drawings show."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import cv2
import numpy as np
import pytest
from sqlalchemy import Engine, insert

from cv_platform.config import ExperimentConfig, parse_experiment
from cv_platform.database.schema import feedback, images, predictions
from cv_platform.datasets.importing import import_dataset

CLASSES = ("cat", "dog")
NOW = datetime(2026, 3, 1, tzinfo=UTC)
PER_CLASS = 30


def drawing(kind: str, seed: int) -> bytes:
    """Returns a JPEG of circles (cats) or bars (dogs) at random places: two of a kind are no near-copies."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 60 if kind == "cat" else 150, (64, 64, 3), dtype=np.uint8)
    for _ in range(4):
        x, y = (int(v) for v in generator.integers(8, 56, 2))
        colour = tuple(int(v) for v in generator.integers(150, 256, 3))
        if kind == "cat":
            cv2.circle(pixels, (x, y), int(generator.integers(4, 12)), colour, -1)
        else:
            cv2.rectangle(pixels, (x, 0), (x + 3, 63), colour, -1)
    return cv2.imencode(".jpg", pixels)[1].tobytes()


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CV_HOME with `pets` v1, class folders without splits, and its vectors; tests copy it."""
    home = tmp_path_factory.mktemp("growth")
    for kind in CLASSES:
        (home / "source" / kind).mkdir(parents=True)
        for seed in range(PER_CLASS):
            (home / "source" / kind / f"{seed}.jpg").write_bytes(drawing(kind, seed))
    import_dataset(home / "source", ds_name="pets", tag="v1", ds_root=home / "datasets")
    return home


@pytest.fixture
def home(tmp_path: Path, origin: Path) -> Path:
    shutil.copytree(origin, tmp_path / "home")
    return tmp_path / "home"


def experiment(tag: str = "v1", **labels: Any) -> ExperimentConfig:
    return parse_experiment(
        {
            "name": "pets",
            "model": {"model_name": "pets", "classes": list(CLASSES), "input_size": {"h": 8, "w": 8}},
            "dataset": {"ds_name": "pets", "dvc_tag": tag},
            "encoder": {"input_px": 32},
            "labels": labels,
        },
        origin="test",
    )


def answer(engine: Engine, content: bytes | None, **changes: Any) -> UUID:
    """Logs an answer on an upload, a minute after the one before."""
    prediction_id = uuid4()
    sha256 = hashlib.sha256(content).hexdigest() if content else None
    facts = {
        "prediction_id": prediction_id,
        "model_name": "pets",
        "model_version": "v",
        "predicted_class": "cat",
        "prediction_json": {"cat": 0.6, "dog": 0.4},
        "uae_feats": [],
        "bbsd_feats": [],
        "features": [],
        "properties": [],
        "image_sha256": sha256,
        "created_on": NOW,
        **changes,
    }
    facts.setdefault("logged_on", facts["created_on"])
    with engine.begin() as connection:
        if content is not None and not connection.scalar(images.select().where(images.c.sha256 == sha256)):
            values = {"sha256": sha256, "content": content, "bytes": len(content), "media_type": "image/jpeg"}
            connection.execute(insert(images).values(values))
        connection.execute(insert(predictions).values(facts))
    return prediction_id


def say(engine: Engine, prediction_id: UUID, true_class: str, source: str = "client", minute: int = 0) -> None:
    values = {"entry_id": uuid4(), "prediction_id": prediction_id, "true_class": true_class, "source": source}
    with engine.begin() as connection:
        connection.execute(insert(feedback).values(**values, created_on=NOW + timedelta(minutes=minute)))


def label(engine: Engine, kinds: Iterable[str], source: str = "client", *, first_seed: int = 100) -> list[UUID]:
    """Logs labelled drawings of these kinds, and returns their predictions."""
    ids: list[UUID] = []
    for seed, kind in enumerate(kinds, first_seed):
        ids.append(answer(engine, drawing(kind, seed), created_on=NOW + timedelta(seconds=seed)))
        say(engine, ids[-1], kind, source)
    return ids
