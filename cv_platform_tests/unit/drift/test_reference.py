from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from cv_platform.config import DatasetConfig, ModelConfig, MonitorConfig
from cv_platform.drift.detectors import (
    FEWEST_FALSE_ALARM_IMAGES,
    DriftDetectors,
    build_detectors,
    false_alarm_bound,
    measure_false_alarms,
    seeded_rows,
)
from cv_platform.drift.extraction import extract
from cv_platform.drift.reference import (
    ReferenceData,
    build_reference_data,
    label_targets,
    one_hot,
    read_identity,
    read_reference,
    read_reference_labels,
)
from cv_platform.errors import InvalidSampleError, ReferenceMismatchError
from cv_platform.images import preprocessing_hash
from cv_platform.predictions import reference_schema
from cv_platform.properties import image_properties
from cv_platform.storage import CentralStorage
from cv_platform_tests.drift_samples import draw_sample
from cv_platform_tests.tiny_models import CLASS_NAMES, MODEL_NAME
from cv_platform_tests.unit.drift.conftest import VERSION, make_split


@pytest.fixture(scope="module")
def detectors(
    classifier_path: Path, model_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory
) -> DriftDetectors:
    return build_detectors(
        classifier_path,
        make_split(60),
        model_config,
        model_name=MODEL_NAME,
        version=VERSION,
        directory=tmp_path_factory.mktemp("models"),
        seed=0,
    )


@pytest.fixture(scope="module")
def reference(
    classifier_path: Path,
    detectors: DriftDetectors,
    model_config: ModelConfig,
    tmp_path_factory: pytest.TempPathFactory,
) -> ReferenceData:
    folder = tmp_path_factory.mktemp("reference")
    return build_reference_data(
        classifier_path,
        detectors,
        make_split(60),
        model_config,
        preprocessing_hash=preprocessing_hash((16, 16)),
        directory=folder / "models",
        storage=CentralStorage(folder / "storage"),
    )


def test_detectors_are_saved_complete_and_nothing_else(detectors: DriftDetectors) -> None:
    assert detectors.uae_path.name == f"{MODEL_NAME}_uae.keras"
    assert detectors.uae_path.parent.parts[-2:] == (MODEL_NAME, VERSION)
    assert [path.name for path in detectors.uae_path.parent.iterdir()] == [detectors.uae_path.name]
    assert (detectors.uae_dims, detectors.feature_dims) == (6, 5)


def test_false_alarm_rate_is_fully_stated(detectors: DriftDetectors) -> None:
    stated = (detectors.false_alarm_trials, detectors.false_alarm_alpha, detectors.false_alarm_rows)
    assert stated == (60, 0.05, 30)
    assert detectors.false_alarm_permutations == 99
    assert detectors.false_alarm_rate is not None
    assert detectors.false_alarm_rate <= false_alarm_bound(0.05, 60)
    assert DriftDetectors.model_validate_json(detectors.model_dump_json()) == detectors


def test_too_few_images_have_no_false_alarm_rate() -> None:
    alarms = measure_false_alarms(draw_sample(np.random.default_rng(0), 39), alpha=0.05, seed=0)
    assert (alarms.rate, alarms.trials) == (None, 0)
    assert false_alarm_bound(0.05, alarms.trials) == 1.0


def test_the_false_alarm_rate_is_told_in_words(detectors: DriftDetectors) -> None:
    measured = detectors.model_copy(update={"false_alarm_rate": 0.05})
    assert measured.is_calibrated
    # The 0.999 quantile of Binomial(60, 0.05) is 9: P(X <= 8) = 0.9977, P(X <= 9) = 0.9994.
    assert measured.false_alarm_summary(60) == (
        "Expected at most 0.150 (monitor.alpha 0.05). Measured: 0.050 in 60 trials, 30 images a side."
    )
    assert not detectors.model_copy(update={"false_alarm_rate": 0.16}).is_calibrated

    unmeasured = detectors.model_copy(
        update={"false_alarm_rate": None, "false_alarm_trials": 0, "false_alarm_rows": 0, "false_alarm_permutations": 0}
    )
    assert not unmeasured.is_calibrated
    assert unmeasured.false_alarm_summary(39).startswith(
        "Not measured: the reference split has 39 images, and at least 40 are needed."
    )


def test_the_configs_descriptions_name_the_fewest_images_of_the_false_alarm_rate() -> None:
    enough = draw_sample(np.random.default_rng(0), FEWEST_FALSE_ALARM_IMAGES)
    assert measure_false_alarms(enough, alpha=0.05, seed=0, trials=1).trials == 1
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


def test_limits_the_rows_to_a_seeded_sample(
    classifier_path: Path, detectors: DriftDetectors, model_config: ModelConfig, tmp_path: Path
) -> None:
    drift = model_config.drift_detection.model_copy(update={"reference_data_n_sample": 50})
    made = build_reference_data(
        classifier_path,
        detectors,
        make_split(60),
        model_config.model_copy(update={"drift_detection": drift}),
        preprocessing_hash=preprocessing_hash((16, 16)),
        directory=tmp_path / "models",
        storage=CentralStorage(tmp_path / "storage"),
    )
    paths = read_reference_labels(made.path)["path"].tolist()
    assert made.rows == len(set(paths)) == 50
    assert paths == sorted(paths)


def test_multi_label_names_all_classes_of_an_image(
    classifier_path: Path, detectors: DriftDetectors, model_config: ModelConfig, tmp_path: Path
) -> None:
    split = make_split(20, multi_label=True)
    made = build_reference_data(
        classifier_path,
        detectors,
        split,
        model_config.model_copy(update={"classifier_type": "multi-label"}),
        preprocessing_hash=preprocessing_hash((16, 16)),
        directory=tmp_path / "models",
        storage=CentralStorage(tmp_path / "storage"),
    )
    labels = read_reference_labels(made.path)["label"]
    assert label_targets(labels.tolist(), CLASS_NAMES).tolist() == split.targets.astype(bool).tolist()


def test_refuses_a_split_without_images(
    classifier_path: Path, detectors: DriftDetectors, model_config: ModelConfig, tmp_path: Path
) -> None:
    with pytest.raises(InvalidSampleError, match="Received: 1"):
        build_reference_data(
            classifier_path,
            detectors,
            make_split(1),
            model_config,
            preprocessing_hash=preprocessing_hash((16, 16)),
            directory=tmp_path,
            storage=CentralStorage(tmp_path / "storage"),
        )


def test_refuses_a_split_whose_parts_have_different_lengths(
    classifier_path: Path, detectors: DriftDetectors, model_config: ModelConfig, tmp_path: Path
) -> None:
    split = dataclasses.replace(make_split(5), targets=np.zeros(4, dtype=np.int64))
    with pytest.raises(InvalidSampleError, match=r"\[4, 5\]"):
        build_reference_data(
            classifier_path,
            detectors,
            split,
            model_config,
            preprocessing_hash=preprocessing_hash((16, 16)),
            directory=tmp_path,
            storage=CentralStorage(tmp_path / "storage"),
        )


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
