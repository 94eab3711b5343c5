from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from cv_platform.config import DatasetConfig, EncoderConfig, ExperimentConfig, MonitorConfig
from cv_platform.datasets.packing import PackedSplit
from cv_platform.drift.detectors import (
    FEWEST_FALSE_ALARM_IMAGES,
    build_detectors,
    extract_samples,
    false_alarm_bound,
    false_alarm_summary,
    is_calibrated,
    seeded_rows,
)
from cv_platform.drift.extraction import extract
from cv_platform.drift.reference import (
    build_reference_data,
    label_targets,
    one_hot,
    read_identity,
    read_reference,
    read_reference_labels,
)
from cv_platform.encoders.encoder import open_encoder
from cv_platform.errors import InvalidSampleError, ReferenceMismatchError
from cv_platform.images import preprocessing_hash, resize
from cv_platform.predictions import reference_schema
from cv_platform.properties import image_properties
from cv_platform.records import DetectionRate, DriftDetectors, ReferenceData, TrainedModel
from cv_platform.storage import CentralStorage
from cv_platform_tests.support.away import away_for_a_moment
from cv_platform_tests.support.record_samples import task
from cv_platform_tests.support.tiny_models import CLASS_NAMES, MODEL_NAME
from cv_platform_tests.support.tiny_split import VERSION, make_split
from cv_platform_tests.unit.drift.conftest import trained_in


@pytest.fixture(scope="module")
def shared_model(classifier_path: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    return trained_in(tmp_path_factory.mktemp("models") / VERSION, classifier_path)


@pytest.fixture(scope="module")
def detectors(shared_model: TrainedModel, config: ExperimentConfig) -> DriftDetectors:
    return build_detectors(shared_model, make_split(60), make_split(80), config, home=shared_model.directory.parent)


@pytest.fixture(scope="module")
def reference(shared_model: TrainedModel, detectors: DriftDetectors, config: ExperimentConfig) -> ReferenceData:
    storage = CentralStorage(shared_model.directory.parent / "storage")
    return build_reference_data(shared_model, detectors, make_split(60), config.model, storage=storage)


def test_the_encoder_is_saved_complete_beside_the_model(trained: TrainedModel, config: ExperimentConfig) -> None:
    made = build_detectors(trained, make_split(20), make_split(20), config, home=trained.directory.parent)
    assert made.uae_path.name == f"{MODEL_NAME}_uae.keras"
    assert {path.name for path in trained.directory.iterdir()} == {
        made.uae_path.name,
        made.plot_path.name,
        trained.keras_path.name,
    }
    assert (made.model, made.uae_dims, made.feature_dims) == (trained.model, 6, 5)


def test_false_alarms_and_power_are_measured_on_windows_of_the_test_split(detectors: DriftDetectors) -> None:
    rows = {(row.shift, row.images): row for row in detectors.detection}
    unchanged = rows["none", 10]
    assert (unchanged.windows, unchanged.independent) == (40, 8)
    assert unchanged.low <= unchanged.rate <= unchanged.high
    assert unchanged.rate <= false_alarm_bound(0.05, 8)
    assert ("none", 50) not in rows  # Of 80 images there are no four such windows.
    assert rows["darker", 10].strength == "by 30%"
    assert rows["darker", 10].rate > 0.5
    assert rows["a class missing", 10].independent < 8


def test_with_an_encoder_the_samples_have_its_vectors_of_the_same_images(
    shared_model: TrainedModel, detectors: DriftDetectors, tmp_path: Path
) -> None:
    encoder, split = open_encoder(EncoderConfig(input_px=32), tmp_path), make_split(6)
    rows = np.array([4, 0, 5])
    (sample,) = extract_samples(shared_model.keras_path, detectors.uae_path, [(split, rows)], encoder=encoder)
    expected = encoder.embed(np.stack([resize(image, (32, 32)) for image in np.asarray(split.images)[rows]]))
    np.testing.assert_allclose(sample.encoded_rows, expected, rtol=1e-4, atol=1e-4)


def test_too_few_images_of_either_split_have_no_false_alarm_rate(
    trained: TrainedModel, config: ExperimentConfig
) -> None:
    few, enough = make_split(39), make_split(40)
    assert build_detectors(trained, few, enough, config, home=trained.directory.parent).detection == ()
    assert build_detectors(trained, few, enough, config, home=trained.directory.parent).plot_path.exists()
    assert build_detectors(trained, enough, few, config, home=trained.directory.parent).detection == ()
    assert not is_calibrated((), 0.05)
    assert false_alarm_summary((), 0.05).startswith("Not measured: at least 40 images are needed in the test split")


def test_the_false_alarm_rate_is_told_in_words() -> None:
    row = DetectionRate(shift="none", strength="", images=50, windows=60, independent=60, rate=0.05, low=0.0, high=0.1)
    noise = row.model_copy(update={"shift": "noise", "rate": 1.0})
    assert is_calibrated([row, noise], 0.05)
    # The 0.999 quantile of Binomial(60, 0.05) is 9: P(X <= 8) = 0.9977, P(X <= 9) = 0.9994.
    assert false_alarm_summary([row, noise], 0.05) == (
        "Windows of the test split are taken for drift (monitor.alpha 0.05): 0.050 with 50 images, at most 0.150 "
        "expected."
    )
    other = row.model_copy(update={"images": 100, "independent": 4, "rate": 0.76})
    assert not is_calibrated([row, other], 0.05)
    assert "The test split differs from the reference split" in false_alarm_summary([row, other], 0.05)


def test_the_configs_descriptions_name_the_fewest_images_of_the_false_alarm_rate() -> None:
    for section, field in ((MonitorConfig, "alpha"), (DatasetConfig, "reference_fraction")):
        assert f" {FEWEST_FALSE_ALARM_IMAGES} images" in str(section.model_fields[field].description)


def test_false_alarm_bound_by_hand() -> None:
    # Binomial(1, .05): one alarm has probability .05 > .001; Binomial(100, 0) has none.
    assert false_alarm_bound(0.05, 1) == 1.0
    assert false_alarm_bound(0.0001, 1) == 0.0


def test_seeded_rows_are_distinct_and_in_order() -> None:
    assert seeded_rows(4, None, seed=0).tolist() == [0, 1, 2, 3]
    assert seeded_rows(4, 9, seed=0).tolist() == [0, 1, 2, 3]
    rows = seeded_rows(100, 10, seed=1)
    assert len(set(rows.tolist())) == 10
    assert rows.tolist() == sorted(rows.tolist()) == seeded_rows(100, 10, seed=1).tolist()


def test_every_row_belongs_to_its_image(
    reference: ReferenceData, classifier_path: Path, detectors: DriftDetectors
) -> None:
    split = make_split(60)
    sample, labels = read_reference(reference.path), read_reference_labels(reference.path)
    assert len(sample) == reference.rows == 60
    for row in (0, 17, 59):
        alone = extract(classifier_path, detectors.uae_path, [split.images[row : row + 1]])
        for stored, computed in zip((sample.bbsd, sample.features, sample.uae), alone, strict=True):
            assert stored[row] == pytest.approx(computed[0], abs=1e-5)
        assert sample.properties[row] == pytest.approx(image_properties(split.images[row]))
        assert labels["label"][row] == CLASS_NAMES[split.targets[row]]
        assert labels["predicted_class"][row] == CLASS_NAMES[int(sample.bbsd[row].argmax())]
        assert (labels["path"][row], labels["sha256"][row]) == (split.paths[row], split.sha256[row])


def test_file_has_the_shared_schema_and_says_what_made_it(reference: ReferenceData, detectors: DriftDetectors) -> None:
    assert pq.read_schema(reference.path).remove_metadata() == reference_schema(uae_dims=6, classes=3, feature_dims=5)
    identity = read_identity(reference.path)
    assert (identity.model_name, identity.model_version) == (MODEL_NAME, VERSION)
    assert identity.preprocessing_hash == preprocessing_hash((16, 16))
    assert identity.encoder_hash == detectors.encoder_hash
    assert identity.class_names == CLASS_NAMES
    columns = pq.ParquetFile(reference.path).metadata.row_group(0)
    vectors = [columns.column(i) for i in range(columns.num_columns) if "element" in columns.column(i).path_in_schema]
    assert all("BYTE_STREAM_SPLIT" in column.encodings and column.compression == "ZSTD" for column in vectors)


def test_the_published_copy_is_the_same_file(reference: ReferenceData) -> None:
    assert Path(reference.url.removeprefix("file://")).read_bytes() == reference.path.read_bytes()


@pytest.mark.parametrize(
    "other",
    [
        {"model_version": "20260131T060000Z-00000000"},
        {"model_name": "another"},
        {"preprocessing_hash": "0" * 16},
        {"encoder_hash": "0" * 16},
    ],
    ids=lambda other: next(iter(other)),
)
def test_refuses_reference_data_of_another_origin(reference: ReferenceData, other: dict[str, str]) -> None:
    with pytest.raises(ReferenceMismatchError, match=f"{next(iter(other))} .* instead of"):
        read_reference(reference.path, **other)


def test_refuses_files_that_are_no_reference_data(tmp_path: Path, reference: ReferenceData) -> None:
    (tmp_path / "text.parquet").write_text("no parquet")
    pq.write_table(pq.read_table(reference.path).replace_schema_metadata(None), tmp_path / "anonymous.parquet")
    for name in ("text.parquet", "anonymous.parquet", "missing.parquet"):
        with pytest.raises(ReferenceMismatchError, match="with their origin"):
            read_identity(tmp_path / name)


def made_by(
    trained: TrainedModel, detectors: DriftDetectors, split: PackedSplit, config: ExperimentConfig, **drift: Any
) -> ReferenceData:
    changed = config.model.drift_detection.model_copy(update=drift)
    model = config.model.model_copy(update={"drift_detection": changed})
    return build_reference_data(
        trained, detectors, split, model, storage=CentralStorage(trained.directory.parent / "storage")
    )


def test_limits_the_rows_to_a_seeded_sample(
    trained: TrainedModel, detectors: DriftDetectors, config: ExperimentConfig
) -> None:
    made = made_by(trained, detectors, make_split(60), config, reference_data_n_sample=50)
    paths = read_reference_labels(made.path)["path"].tolist()
    assert made.rows == len(set(paths)) == 50
    assert paths == sorted(paths)


def test_central_storage_that_is_away_when_all_have_answered_is_waited_for(
    trained: TrainedModel,
    detectors: DriftDetectors,
    config: ExperimentConfig,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    storage = trained.directory.parent / "storage"
    with away_for_a_moment(storage, monkeypatch, caplog):
        made = made_by(trained, detectors, make_split(20), config)
    (published,) = storage.rglob("*.parquet")
    assert published.read_bytes() == made.path.read_bytes()
    assert "The upload of tiny_ref_data.parquet is tried again in" in caplog.text


def test_multi_label_names_all_classes_of_an_image(
    trained: TrainedModel, detectors: DriftDetectors, config: ExperimentConfig
) -> None:
    split = make_split(20, multi_label=True)
    several = trained.model_copy(update={"task": task(classifier_type="multi-label")})
    labels = read_reference_labels(made_by(several, detectors, split, config).path)["label"]
    assert label_targets(labels.tolist(), CLASS_NAMES).tolist() == split.targets.astype(bool).tolist()


def test_refuses_a_split_without_images(
    trained: TrainedModel, detectors: DriftDetectors, config: ExperimentConfig
) -> None:
    with pytest.raises(InvalidSampleError, match="Received: 1"):
        made_by(trained, detectors, make_split(1), config)


def test_refuses_a_split_whose_parts_have_different_lengths(
    trained: TrainedModel, detectors: DriftDetectors, config: ExperimentConfig
) -> None:
    split = dataclasses.replace(make_split(5), targets=np.zeros(4, dtype=np.int64))
    with pytest.raises(InvalidSampleError, match=r"\[4, 5\]"):
        made_by(trained, detectors, split, config)


def test_label_texts_and_targets_are_each_others_inverse() -> None:
    names = ("a", "b", "a|b")
    assert label_targets(["a", "b", "a|b", "", "c"], names).tolist() == [
        [True, False, False],
        [False, True, False],
        [False, False, True],
        [False, False, False],
        [False, False, False],
    ]
    assert one_hot(np.array([2, 0]), 3).tolist() == [[False, False, True], [True, False, False]]


def test_unknown_labels_have_a_column_of_their_own_where_there_are_any(
    trained: TrainedModel, detectors: DriftDetectors, config: ExperimentConfig
) -> None:
    split = make_split(20, multi_label=True)
    hidden = np.zeros(split.targets.shape, bool)
    hidden[3, 1] = hidden[4] = True
    doubtful = dataclasses.replace(split, targets=np.where(hidden, np.nan, split.targets))
    several = trained.model_copy(update={"task": task(classifier_type="multi-label")})
    path = made_by(several, detectors, doubtful, config).path
    rows = read_reference_labels(path)
    assert label_targets(rows["unknown_labels"].tolist(), CLASS_NAMES).tolist() == hidden.tolist()
    assert label_targets(rows["label"].tolist(), CLASS_NAMES).tolist() == ((split.targets > 0.5) & ~hidden).tolist()
    whole = made_by(several, detectors, split, config).path
    assert "unknown_labels" not in pq.read_schema(whole).names
    assert set(read_reference_labels(whole)["unknown_labels"]) == {""}
