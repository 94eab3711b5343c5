"""Production metrics from real rows: whose feedback counts, what is compared, and what is said without any."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from scipy.stats import fisher_exact
from sqlalchemy import Engine, insert

from cv_platform.config import ExperimentConfig, parse_experiment
from cv_platform.database.schema import feedback, predictions
from cv_platform.monitoring.production_metrics import log_production, measure_production
from cv_platform.monitoring.sentences import production_figures, production_summary, version_row
from cv_platform.predictions import NONE_OF_THESE
from cv_platform.records import ProductionMetrics
from cv_platform.storage import BundleMetadata, CentralStorage
from cv_platform.tracking import start_run

NOW = datetime(2026, 2, 8, 12, tzinfo=UTC)
OLD, NEW = "20260101T000000Z-00000001", "20260201T000000Z-00000002"


def experiment(classes: tuple[str, ...] = ("cat", "dog"), **model: Any) -> ExperimentConfig:
    return parse_experiment(
        {
            "name": "pets",
            "model": {"model_name": "pets", "classes": list(classes), "input_size": {"h": 8, "w": 8}, **model},
            "dataset": {"ds_name": "pets", "dvc_tag": "v1"},
            "monitor": {"min_feedback": 20},
        },
        origin="test",
    )


@pytest.fixture
def storage(tmp_path: Path) -> CentralStorage:
    return CentralStorage(tmp_path / "storage")


def publish(storage: CentralStorage, folder: Path, version: str, metrics: dict[str, float], **changes: Any) -> None:
    (folder / version).mkdir()
    (folder / version / "model.onnx").write_text("weights")
    facts: dict[str, Any] = {
        "model_name": "pets",
        "version": version,
        "created_utc": NOW,
        "runtime": "onnx",
        "classifier_type": "multi-class",
        "class_names": ("cat", "dog"),
        "image_size": (8, 8),
        "uae_dims": 1,
        "feature_dims": 1,
        "preprocessing_hash": "p",
        "encoder_hash": "e",
        "ds_name": "pets",
        "dvc_tag": "v1",
        "dvc_md5": "0" * 32,
    }
    storage.publish_bundle(folder / version, BundleMetadata(**{**facts, "metrics": metrics, **changes}))


def predict(
    engine: Engine, predicted: str, count: int = 1, *, version: str = NEW, age_days: float = 1.0, **columns: str
) -> list[UUID]:
    rows = [
        {
            "prediction_id": uuid4(),
            "model_name": "pets",
            "model_version": version,
            "predicted_class": predicted,
            "prediction_json": {},
            "uae_feats": [],
            "bbsd_feats": [],
            "features": [],
            "properties": [],
            "created_on": NOW - timedelta(days=age_days),
            **columns,
        }
        for _ in range(count)
    ]
    with engine.begin() as connection:
        connection.execute(insert(predictions), rows)
    return [row["prediction_id"] for row in rows]


def say(engine: Engine, ids: list[UUID], true_class: str, *, minutes: int = 0, source: str = "page") -> None:
    rows = [
        {
            "entry_id": uuid4(),
            "prediction_id": prediction_id,
            "true_class": true_class,
            "source": source,
            "created_on": NOW + timedelta(minutes=minutes),
        }
        for prediction_id in ids
    ]
    with engine.begin() as connection:
        connection.execute(insert(feedback), rows)


def measure(
    engine: Engine, storage: CentralStorage, folder: Path, config: ExperimentConfig | None = None
) -> ProductionMetrics:
    return measure_production(
        config or experiment(),
        model_name="pets",
        engine=engine,
        storage=storage,
        now=NOW,
        directory=folder / "production_metrics",
    )


def test_without_feedback_it_says_so_and_draws_nothing(engine: Engine, storage: CentralStorage, tmp_path: Path) -> None:
    empty = measure(engine, storage, tmp_path)
    assert (empty.predictions, empty.versions, empty.plots, production_figures(empty)) == (0, (), {}, {})
    assert production_summary(empty).startswith("Insufficient feedback: 0 of 0 predictions of pets have feedback")

    predict(engine, "cat", 3)
    silent = measure(engine, storage, tmp_path)
    assert (silent.predictions, silent.with_feedback, silent.plots) == (3, 0, {})
    assert silent.versions[0].verdict == "insufficient feedback"
    assert silent.worse_versions == ()
    written = json.loads(silent.record_path.read_text())
    assert ProductionMetrics.model_validate({**written, "directory": silent.directory}) == silent


def test_what_shows_none_of_the_classes_is_wrong_and_counted_apart(
    engine: Engine, storage: CentralStorage, tmp_path: Path
) -> None:
    publish(storage, tmp_path, NEW, {"accuracy": 1.0, "images": 100.0})
    cats, dogs = predict(engine, "cat", 20), predict(engine, "dog", 20)
    say(engine, cats[:15], "cat")
    say(engine, cats[15:18], NONE_OF_THESE)
    say(engine, dogs[:6], "dog")
    say(engine, dogs[6:7], NONE_OF_THESE)
    say(engine, dogs[7:8], "cow")  # Of another model's classes: nobody knows what to count.

    metrics = measure(engine, storage, tmp_path)
    (version,) = metrics.versions

    assert (version.with_feedback, version.none_of_these) == (25, 4)
    assert version.right_share == version.accuracy == 21 / 25
    assert version.confusion == [[15, 0], [0, 6]]
    assert [row["precision"] for row in version.per_class] == [15 / 18, 6 / 7]
    assert [row["recall"] for row in version.per_class] == [1.0, 1.0]
    assert "1 predictions were left out" in " ".join(metrics.problems)
    assert "4 of them show none of its classes" in production_summary(metrics)
    assert version_row(version)["none_of_these"] == 4
    assert production_figures(metrics)["production_none_of_these"] == 4.0


def test_no_label_at_all_is_right_where_a_multi_label_model_found_none(
    engine: Engine, storage: CentralStorage, tmp_path: Path
) -> None:
    publish(storage, tmp_path, NEW, {"exact_match": 0.9, "images": 100.0}, classifier_type="multi-label")
    say(engine, predict(engine, "", 3), NONE_OF_THESE)
    say(engine, predict(engine, "cat|dog", 1), NONE_OF_THESE)
    say(engine, predict(engine, "dog", 4), "dog")

    (version,) = measure(engine, storage, tmp_path, experiment(classifier_type="multi-label")).versions

    assert (version.with_feedback, version.none_of_these, version.right_share) == (8, 4, 7 / 8)
    assert version.confusion == [[7, 1, 0, 0], [3, 1, 0, 4]]  # A row per class: TN, FP, FN, TP.


def test_counts_what_is_worked_by_hand(engine: Engine, storage: CentralStorage, tmp_path: Path) -> None:
    publish(storage, tmp_path, NEW, {"accuracy": 0.9, "images": 100.0})
    cats, dogs = predict(engine, "cat", 30), predict(engine, "dog", 20)
    say(engine, cats[:18], "cat")
    say(engine, cats[18:20], "dog")
    say(engine, dogs[:4], "dog")
    say(engine, dogs[4:5], "cat", source="audit")

    metrics = measure(engine, storage, tmp_path)
    (version,) = metrics.versions

    assert (version.predictions, version.with_feedback, version.coverage) == (50, 25, 0.5)
    assert version.accuracy == version.right_share == 22 / 25
    assert version.confusion == [[18, 1], [2, 4]]  # Row: the true class.
    cat, dog = version.per_class
    assert (cat["feedback"], cat["predicted"], cat["precision"], cat["recall"]) == (19, 20, 18 / 20, 18 / 19)
    assert (dog["feedback"], dog["predicted"], dog["precision"], dog["recall"]) == (6, 5, 4 / 5, 4 / 6)
    assert version.sources == {"audit": 1, "page": 24}
    # Wilson 1927 with p = .88, n = 25, z = 1.959964.
    z, n, p = 1.959964, 25, 0.88
    centre, half = (p + z * z / (2 * n)), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    assert version.interval == pytest.approx(
        ((centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)), abs=1e-6
    )
    assert version.verdict == "as on the test split"
    assert {name: path.read_bytes()[:4] for name, path in metrics.plots.items()} == {
        "accuracy": b"\x89PNG",
        "confusion_matrix": b"\x89PNG",
    }


def test_the_latest_feedback_of_a_prediction_counts_once_from_any_source(
    engine: Engine, storage: CentralStorage, tmp_path: Path
) -> None:
    (prediction,) = predict(engine, "cat")
    say(engine, [prediction], "cat", minutes=1)
    say(engine, [prediction], "dog", minutes=3, source="audit")
    say(engine, [prediction], "cat", minutes=2)

    (version,) = measure(engine, storage, tmp_path).versions

    assert (version.with_feedback, version.right_share, version.sources) == (1, 0.0, {"audit": 1})


def test_only_predictions_of_the_window_count(engine: Engine, storage: CentralStorage, tmp_path: Path) -> None:
    say(engine, predict(engine, "cat", age_days=7.5), "dog")
    say(engine, predict(engine, "cat", age_days=6.5), "cat")
    say(engine, [uuid4()], "cat")  # Of a prediction that is still in a spool.

    metrics = measure(engine, storage, tmp_path)

    assert (metrics.predictions, metrics.with_feedback, metrics.versions[0].right_share) == (1, 1, 1.0)


def test_a_version_that_is_right_less_often_than_on_its_test_split_is_named(
    engine: Engine, storage: CentralStorage, tmp_path: Path
) -> None:
    publish(storage, tmp_path, OLD, {"accuracy": 0.6, "images": 100.0})
    publish(storage, tmp_path, NEW, {"accuracy": 0.98, "images": 500.0})
    for version in (OLD, NEW):
        ids = predict(engine, "cat", 100, version=version)
        say(engine, ids[:60], "cat")
        say(engine, ids[60:], "dog")

    metrics = measure(engine, storage, tmp_path)

    assert [(v.model_version, v.verdict) for v in metrics.versions] == [
        (NEW, "worse than on the test split"),
        (OLD, "as on the test split"),
    ]
    assert [v.model_version for v in metrics.worse_versions] == [NEW]
    assert f"{NEW}: 0.600 right" in production_summary(metrics)
    assert "0.980 on the test split: worse than on the test split" in production_summary(metrics)


def test_the_tag_that_is_less_often_right_than_the_others_is_named(
    engine: Engine, storage: CentralStorage, tmp_path: Path
) -> None:
    publish(storage, tmp_path, NEW, {"accuracy": 0.98, "images": 500.0})
    for tag, right in (("line-1", 39), ("line-2", 28), ("line-3", 39)):
        ids = predict(engine, "cat", 40, tag=tag, client="0a1b2c3d")
        say(engine, ids[:right], "cat")
        say(engine, ids[right:], "dog")
    say(engine, predict(engine, "cat", 5, tag="rare"), "dog")
    (version,) = measure(engine, storage, tmp_path).versions
    assert {one.value for one in version.slices} == {"line-1", "line-2", "line-3", "0a1b2c3d"}
    worst = version.worst_slice
    assert worst
    assert (worst.value, worst.with_feedback, worst.right_share) == ("line-2", 40, pytest.approx(0.7))
    # 39 and 39 of 80, and none of the five, are right of the others; of four slices the p-value is four times its own.
    assert worst.rest_share == pytest.approx(78 / 85)
    result: Any = fisher_exact([[28, 12], [78, 7]], alternative="less")
    assert worst.adjusted_p_value == pytest.approx(4 * result.pvalue)
    assert "worst with tag line-2: 0.700 of 40, 0.918 of the others" in production_summary(
        measure(engine, storage, tmp_path)
    )


def test_a_flawless_small_test_split_does_not_condemn_the_first_mistake(
    engine: Engine, storage: CentralStorage, tmp_path: Path
) -> None:
    publish(storage, tmp_path, NEW, {"accuracy": 1.0, "images": 50.0})
    ids = predict(engine, "cat", 100)
    say(engine, ids[:99], "cat")
    say(engine, ids[99:], "dog")

    (version,) = measure(engine, storage, tmp_path).versions

    # Hypergeometric, by hand: the one mistake of 150 falls on production with 100/150.
    assert version.p_value == pytest.approx(100 / 150)
    assert version.verdict == "as on the test split"


def test_too_little_feedback_is_not_judged(engine: Engine, storage: CentralStorage, tmp_path: Path) -> None:
    publish(storage, tmp_path, NEW, {"accuracy": 1.0, "images": 1000.0})
    say(engine, predict(engine, "cat", 19), "dog")

    metrics = measure(engine, storage, tmp_path)

    assert metrics.versions[0].verdict == "insufficient feedback"
    assert metrics.versions[0].p_value is None
    assert "(at least 20 are needed)" in production_summary(metrics)


def test_a_version_without_a_bundle_is_counted_and_not_compared(
    engine: Engine, storage: CentralStorage, tmp_path: Path
) -> None:
    say(engine, predict(engine, "cat", 20), "cat")

    (version,) = measure(engine, storage, tmp_path).versions

    assert (version.right_share, version.test_right_share, version.verdict) == (1.0, None, "not comparable")


def test_a_class_that_the_model_does_not_have_is_left_out_and_said(
    engine: Engine, storage: CentralStorage, tmp_path: Path
) -> None:
    ids = predict(engine, "cat", 2)
    say(engine, ids[:1], "cat")
    say(engine, ids[1:], "horse")

    metrics = measure(engine, storage, tmp_path)

    assert (metrics.with_feedback, metrics.versions[0].right_share) == (1, 1.0)
    assert "1 predictions were left out" in metrics.problems[0]


def test_multi_label_is_judged_by_whole_answers_and_counted_by_label(
    engine: Engine, storage: CentralStorage, tmp_path: Path
) -> None:
    names = ("round", "red", "big")
    publish(
        storage,
        tmp_path,
        NEW,
        {"accuracy": 0.99, "exact_match": 0.95, "images": 200.0},
        class_names=names,
        classifier_type="multi-label",
    )
    say(engine, predict(engine, "round|red", 12), "round|red")
    say(engine, predict(engine, "", 3), "")
    say(engine, predict(engine, "round|big", 5), "round")

    (version,) = measure(engine, storage, tmp_path, experiment(names, classifier_type="multi-label")).versions

    assert (version.with_feedback, version.right_share) == (20, 15 / 20)
    assert version.accuracy == pytest.approx(55 / 60)
    assert version.test_right_share == 0.95
    assert version.confusion == [[3, 0, 0, 17], [8, 0, 0, 12], [15, 5, 0, 0]]
    big = version.per_class[2]
    assert (big["precision"], big["recall"], big["accuracy"]) == (0.0, None, 15 / 20)
    assert version.verdict == "worse than on the test split"


@pytest.mark.xdist_group("tracking")
def test_figures_plots_and_record_reach_mlflow(
    engine: Engine, storage: CentralStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    say(engine, predict(engine, "cat", 4)[:1], "cat")
    metrics = measure(engine, storage, tmp_path)
    uri = f"sqlite:///{tmp_path / 'mlflow' / 'mlflow.db'}"
    with start_run(uri, "pets", run_name="pets", artifact_root=tmp_path / "artifacts") as run:
        log_production(run, metrics)

    client = MlflowClient(uri)
    assert client.get_run(run.run_id).data.metrics == {
        "production_predictions": 4.0,
        "production_feedback": 1.0,
        "production_coverage": 0.25,
        "production_none_of_these": 0.0,
        "production_accuracy": 1.0,
        "production_right_share": 1.0,
    }
    assert {file.path for file in client.list_artifacts(run.run_id, "plots")} == {
        "plots/accuracy.png",
        "plots/confusion_matrix.png",
    }
    assert [file.path for file in client.list_artifacts(run.run_id, "production_metrics")] == [
        "production_metrics/production_metrics.json"
    ]


def test_a_test_split_with_unknown_labels_is_no_measure_of_whole_answers(
    engine: Engine, storage: CentralStorage, tmp_path: Path
) -> None:
    names = ("round", "red", "big")
    metrics = {"exact_match": 0.95, "images": 200.0, "known_label_share": 0.7}
    publish(storage, tmp_path, NEW, metrics, class_names=names, classifier_type="multi-label")
    say(engine, predict(engine, "round|red", 12), "round|red")
    say(engine, predict(engine, "round|big", 8), "round")
    measured = measure(engine, storage, tmp_path, experiment(names, classifier_type="multi-label"))
    (version,) = measured.versions
    assert (version.right_share, version.test_right_share, version.verdict) == (12 / 20, None, "not comparable")
    assert measured.problems == (f"{NEW}: not compared with its test split, of which labels are unknown.",)
