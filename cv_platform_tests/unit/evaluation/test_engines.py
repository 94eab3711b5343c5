"""What a network says of a split, to the bit: by this process, by others, and by Ray (`unit/compute/test_ray.py`)."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest

from cv_platform.compute import rows
from cv_platform.compute.carried import CarriedFile
from cv_platform.compute.engine import Engine
from cv_platform.compute.local import LocalEngine
from cv_platform.datasets.packing import open_split
from cv_platform.datasets.shards import writing
from cv_platform.drift.detectors import extract_samples, seeded_rows
from cv_platform.drift.encoders import build_uae
from cv_platform.drift.sample import REPRESENTATIONS
from cv_platform.encoders.encoder import open_encoder
from cv_platform.evaluation.classifier import Classifier, answer_split
from cv_platform.records import PackedImages
from cv_platform_tests.support.elsewhere import Elsewhere
from cv_platform_tests.support.tiny_models import build_classifier
from cv_platform_tests.support.tiny_training import pack_tiny
from cv_platform_tests.unit.encoders.test_encoder import own_file


def answers(folder: Path, packed: PackedImages, engine: Engine | None) -> dict[str, str]:
    """Returns the sha256 of all that a classifier, a UAE and an encoder say of the images of a pack."""
    keras_path, uae_path = folder / "classifier.keras", folder / "uae.keras"
    train, test = open_split(packed, "train"), open_split(packed, "test")
    classifier = Classifier(CarriedFile.of(keras_path), 3, rows.Device.here())
    probabilities, properties = answer_split(classifier, train, engine)
    wanted = [(train, seeded_rows(48, 20, 1)), (test, np.arange(6))]
    encoder = open_encoder(own_file(folder, ["N", 3]), folder)
    samples = extract_samples(keras_path, uae_path, wanted, encoder=encoder, engine=engine)
    of_samples = {
        f"{name} {at}": getattr(sample, name)
        for at, sample in enumerate(samples)
        for name in (*REPRESENTATIONS, "encoded")
    }
    arrays = {"probabilities": probabilities, "properties": properties, **of_samples}
    return {f"{name} {array.shape}": hashlib.sha256(array.tobytes()).hexdigest() for name, array in arrays.items()}


def require_same_answers(folder: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers 54 images in nine shards, of a pack in many files, by this process and by an engine."""
    monkeypatch.setattr(writing, "SHARD_BYTES", 5 * 16 * 16 * 3)
    monkeypatch.setattr(writing, "_LEAST_SHARD_BYTES", 0)
    monkeypatch.setattr(rows, "_SHARD_ROWS", 8)
    build_classifier(seed=1).save(folder / "classifier.keras")
    build_uae((16, 16), 6, seed=7).save(folder / "uae.keras")
    packed = pack_tiny(folder)
    alone = answers(folder, packed, None)
    assert len(alone) == 12
    monkeypatch.setattr(rows, "WORTH_SECONDS", 0.0)
    assert answers(folder, packed, engine) == alone


def test_other_processes_give_the_same_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Elsewhere()
    require_same_answers(tmp_path, engine, monkeypatch)
    assert engine.shards == 10


@pytest.mark.parametrize(
    ("is_gpu", "engine", "seconds"),
    [
        (False, Elsewhere(), rows.WORTH_SECONDS),
        (False, None, math.inf),
        (False, LocalEngine(2), math.inf),
        (True, Elsewhere(), math.inf),
    ],
)
def test_only_other_machines_are_asked_and_only_by_a_process_without_a_gpu(
    is_gpu: bool, engine: Engine | None, seconds: float
) -> None:
    assert rows.Device(is_gpu).alone_seconds(engine) == pytest.approx(seconds)
