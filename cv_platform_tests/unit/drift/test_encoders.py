from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cv_platform.drift.encoders import build_uae, encoder_hash
from cv_platform.drift.extraction import extract, load_model
from cv_platform.errors import InvalidModelError
from cv_platform_tests.support.tiny_models import tiny_images


def test_the_same_seed_gives_the_same_encoder_in_any_state_of_the_global_generator() -> None:
    import keras

    keras.utils.set_random_seed(1)
    first = encoder_hash(build_uae((16, 16), 6, seed=7))
    keras.utils.set_random_seed(2)
    assert encoder_hash(build_uae((16, 16), 6, seed=7)) == first


def test_another_seed_size_or_width_gives_another_hash() -> None:
    hashes = {encoder_hash(build_uae(*args)) for args in [((16, 16), 6, 7), ((16, 16), 6, 8), ((16, 16), 5, 7)]}
    # 16 and 15 pixels end in the same weights: only the input shape tells these encoders apart.
    hashes.add(encoder_hash(build_uae((15, 16), 6, 7)))
    assert len(hashes) == 4


def test_a_saved_encoder_loads_in_safe_mode_with_the_same_hash_and_answers(tmp_path: Path) -> None:
    encoder = build_uae((16, 20), 6, seed=7)
    encoder.save(tmp_path / "uae.keras")
    loaded = load_model(tmp_path / "uae.keras")
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 20, 3), dtype=np.uint8)
    assert encoder_hash(loaded) == encoder_hash(encoder)
    assert np.asarray(loaded(images)) == pytest.approx(np.asarray(encoder(images)), abs=1e-5)
    assert loaded.output_shape == (None, 6)


def test_photos_do_not_make_the_encoder_large() -> None:
    assert build_uae((224, 224), 32, seed=7).count_params() < 100_000


def test_extracts_each_image_as_if_it_were_alone(classifier_path: Path, tmp_path: Path) -> None:
    build_uae((16, 16), 6, seed=7).save(tmp_path / "uae.keras")
    images = tiny_images(11)
    together = extract(classifier_path, tmp_path / "uae.keras", [images[:4], images[4:9], images[9:]])
    alone = extract(classifier_path, tmp_path / "uae.keras", [images[i : i + 1] for i in range(11)])
    assert [part.shape for part in together] == [(11, 3), (11, 5), (11, 6)]
    for left, right in zip(together, alone, strict=True):
        assert left.dtype == np.float32
        assert left == pytest.approx(right, abs=1e-5)
    # The oracle: the model called directly.
    assert together[0] == pytest.approx(np.asarray(load_model(classifier_path)(images)), abs=1e-5)


def test_extracting_no_images_gives_no_rows(classifier_path: Path, tmp_path: Path) -> None:
    build_uae((16, 16), 6, seed=7).save(tmp_path / "uae.keras")
    assert [part.shape for part in extract(classifier_path, tmp_path / "uae.keras", [])] == [(0, 3), (0, 5), (0, 6)]


def test_refuses_a_model_without_its_layers_and_another_image_size(classifier_path: Path, tmp_path: Path) -> None:
    build_uae((16, 16), 6, seed=7).save(tmp_path / "uae.keras")
    build_uae((8, 8), 6, seed=7).save(tmp_path / "small.keras")
    with pytest.raises(InvalidModelError, match='a layer "probabilities"'):
        extract(tmp_path / "uae.keras", tmp_path / "uae.keras", [])
    with pytest.raises(InvalidModelError, match="one image size"):
        extract(classifier_path, tmp_path / "small.keras", [])
    with pytest.raises(InvalidModelError, match="Train or export it again"):
        load_model(tmp_path / "missing.keras")
    (tmp_path / "broken.keras").write_bytes(b"not a model")
    with pytest.raises(InvalidModelError, match="safe mode"):
        load_model(tmp_path / "broken.keras")


def test_refuses_a_model_that_has_diverged(tmp_path: Path) -> None:
    from cv_platform_tests.support.tiny_models import build_classifier

    build_classifier(seed=1, sharpness=float("nan")).save(tmp_path / "model.keras")
    build_uae((16, 16), 6, seed=7).save(tmp_path / "uae.keras")
    with pytest.raises(InvalidModelError, match="probabilities that are not"):
        extract(tmp_path / "model.keras", tmp_path / "uae.keras", [tiny_images(2)])
