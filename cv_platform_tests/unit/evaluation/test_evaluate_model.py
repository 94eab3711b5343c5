"""`evaluate_model` with a real Keras model whose answers are worked out by hand: it reads an image's mean colour."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cv_platform.config import ClassifierType, ExperimentConfig, InputSize, ModelConfig, parse_experiment
from cv_platform.datasets.manifest import MANIFEST_SCHEMA
from cv_platform.datasets.packing import PackedSplit, pack_images
from cv_platform.errors import DatasetError, InvalidDatasetError, TrainingError, VerdictError
from cv_platform.evaluation.evaluate import evaluate_model, worst_errors
from cv_platform.evaluation.gate import Champion
from cv_platform.evaluation.neighbours import Neighbours
from cv_platform.records import DatasetVersion, Embeddings, Evaluation, PackedImages, Provenance
from cv_platform_tests.support.record_samples import identity, trained_model

CLASSES = ("blue", "green", "red")
CHANNELS = {"red": 0, "green": 1, "blue": 2}
SCALE = 8.0
VERSION = "20260131T060000Z-1f3c9a2e"


def _model(path: Path, activation: str, outputs: int = 3, scale: float = SCALE) -> Path:
    """Saves `path/colours.keras`: the logit of a class is `scale` × (mean of its channel, 0–1), halved for sigmoid."""
    import keras

    inputs = keras.Input((8, 8, 3), dtype="uint8", name="image")
    means = keras.layers.GlobalAveragePooling2D()(keras.layers.Rescaling(1 / 255)(inputs))
    dense = keras.layers.Dense(outputs, activation=activation, name="probabilities")
    model = keras.Model(inputs, dense(means))
    weights = np.zeros((3, outputs), np.float32)
    for index, name in enumerate(CLASSES[:outputs]):
        weights[CHANNELS[name], index] = scale
    dense.set_weights([weights, np.full(outputs, -scale / 2 if activation == "sigmoid" else 0.0, np.float32)])
    path.mkdir(parents=True, exist_ok=True)
    model.save(path / "colours.keras")
    return path


@pytest.fixture(scope="module")
def softmax_model(tmp_path_factory) -> Path:
    return _model(tmp_path_factory.mktemp("softmax"), "softmax")


@pytest.fixture(scope="module")
def sigmoid_model(tmp_path_factory) -> Path:
    return _model(tmp_path_factory.mktemp("sigmoid"), "sigmoid")


def _image(colours: tuple[str, ...], seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    image = generator.integers(0, 90, (8, 8, 3), dtype=np.uint8)
    for colour in colours:
        image[..., CHANNELS[colour]] += np.uint8(generator.integers(60, 160))
    return image


def _pack(folder: Path, test: Sequence[tuple[Any, ...]], kind: ClassifierType = "multi-class") -> PackedImages:
    """Packs `(path, labels, image)`, with unknown labels if any, as the test split, beside train of one per class."""
    rows = []
    train = [(f"train/{name}.png", (name,), _image((name,), 900 + i)) for i, name in enumerate(CLASSES)]
    for split, entries in (("train", train), ("test", test)):
        for path, labels, image, *unknown in entries:
            target = folder / "checkout" / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(cv2.imencode(".png", image[..., ::-1])[1].tobytes())
            rows.append(
                {
                    "path": path,
                    "sha256": hashlib.sha256(target.read_bytes()).hexdigest(),
                    "split": split,
                    "split_origin": "given",
                    "labels": list(labels),
                    "unknown_labels": list(*unknown),
                    "width_px": 8,
                    "height_px": 8,
                    "bytes": target.stat().st_size,
                    "status": "used",
                    "is_readable": True,
                    "problem": None,
                }
            )
    manifest = folder / "checkout" / "manifest.parquet"
    manifest.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(sorted(rows, key=lambda row: row["path"]), schema=MANIFEST_SCHEMA), manifest)
    version = DatasetVersion(
        provenance=Provenance(ds_name="colours", dvc_tag="v1.0.0", dvc_md5="0123456789abcdef0123456789abcdef.dir"),
        git_commit="c" * 40,
        directory=folder / "checkout",
        manifest=manifest.name,
        class_names=CLASSES,
    )
    model = ModelConfig(model_name="colours", classes=CLASSES, classifier_type=kind, input_size=InputSize(h=8, w=8))
    return pack_images(version, model, quarantined=(), home=folder)


def _config(**changes: Any) -> ExperimentConfig:
    content = {
        "name": "colours",
        "model": {"model_name": "colours", "classes": list(CLASSES), "input_size": {"h": 8, "w": 8}},
        "dataset": {"ds_name": "colours", "dvc_tag": "v1.0.0"},
        "evaluate": {"worst_errors": 2},
    }
    return parse_experiment({**content, **changes}, origin="test")


def _evaluate(model: Path, packed: PackedImages, folder: Path, config=None, *, champion=None, run=None) -> Evaluation:
    """Evaluates the model in the folder `model`."""
    record = trained_model(
        model,
        model=identity("colours", VERSION),
        provenance=packed.provenance,
        task=packed.task,
        pack=packed.directory.name,
    )
    directory = folder / "evaluation"
    return evaluate_model(record, packed, config or _config(), champion=champion, directory=directory, run=run)


def _test_images(count: int = 30) -> list[tuple[str, tuple[str, ...], np.ndarray]]:
    """Images of each class in an order unlike that of classes and labels; three may have a wrong label."""
    entries = []
    for number in range(count):
        colour = CLASSES[number * 7 % 3]
        label = "red" if number in (4, 11, 18) and colour != "red" else colour
        entries.append(
            (f"test/{hashlib.md5(str(number).encode()).hexdigest()[:8]}.png", (label,), _image((colour,), number))
        )
    return entries


@pytest.fixture(scope="module")
def colours(tmp_path_factory) -> tuple[PackedImages, dict[str, tuple[tuple[str, ...], np.ndarray]]]:
    entries = _test_images()
    packed = _pack(tmp_path_factory.mktemp("colours"), entries)
    return packed, {path: (labels, image) for path, labels, image in entries}


def _softmax(image: np.ndarray) -> np.ndarray:
    means = image.reshape(-1, 3).mean(axis=0) / 255
    odds = np.exp(SCALE * np.array([means[CHANNELS[name]] for name in CLASSES]))
    return odds / odds.sum()


def test_each_row_has_the_label_and_the_probabilities_of_its_own_image(colours, softmax_model, tmp_path):
    packed, images = colours
    evaluation = _evaluate(softmax_model, packed, tmp_path)
    rows = pq.read_table(evaluation.predictions_path).to_pylist()
    assert [row["path"] for row in rows] == sorted(images)
    for row in rows:
        labels, image = images[row["path"]]
        expected = _softmax(image)
        assert row["probabilities"] == pytest.approx(expected.tolist(), abs=1e-5)
        assert row["label"] == labels[0]
        assert row["predicted_class"] == CLASSES[int(expected.argmax())]
        assert row["correct"] is (row["label"] == row["predicted_class"])
        assert row["confidence"] == pytest.approx(expected.max(), abs=1e-5)
        stored = cv2.imencode(".png", image[..., ::-1])[1].tobytes()
        assert row["sha256"] == hashlib.sha256(stored).hexdigest()
    wrong = sum(not row["correct"] for row in rows)
    assert wrong > 0
    assert evaluation.metrics["accuracy"] == pytest.approx(1 - wrong / len(rows))
    assert evaluation.metrics["images"] == len(rows)
    assert evaluation.metrics["temperature"] == 1.0
    assert evaluation.metrics["ece_uncalibrated"] == pytest.approx(evaluation.metrics["ece"], abs=1e-6)
    assert np.trace(np.array(evaluation.confusion)) == len(rows) - wrong
    assert [row["class"] for row in evaluation.per_class] == list(CLASSES)
    for name in ("accuracy", "balanced_accuracy", "macro_precision", "macro_recall", "macro_f1"):
        low, high = evaluation.intervals[name]
        assert 0 <= low <= evaluation.metrics[name] <= high <= 1
    assert evaluation.robustness[0].accuracy == pytest.approx(evaluation.metrics["accuracy"])


def test_writes_one_folder_with_plots_and_a_page_of_its_own(colours, softmax_model, tmp_path):
    evaluation = _evaluate(softmax_model, colours[0], tmp_path)
    folder = tmp_path / "evaluation" / "colours" / VERSION
    written = json.loads((folder / "evaluation.json").read_text())
    assert Evaluation(**written, directory=folder) == evaluation
    assert set(evaluation.plots) == {"confusion_matrix", "reliability", "worst_errors"}
    for path in evaluation.plots.values():
        assert path.parent == folder
        assert cv2.imread(str(path)) is not None
    page = evaluation.report_path.read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "http" not in page
    assert "<script" not in page
    assert evaluation.parameters is not None
    assert f"{evaluation.parameters:,} parameters" in page
    assert evaluation.cpu_ms is not None
    assert f"{evaluation.cpu_ms:.2f} ms of CPU time" in page
    schema = pq.read_schema(evaluation.predictions_path)
    assert schema.field("probabilities").type == pa.list_(pa.float32(), 3)


def test_the_training_image_that_looks_most_like_an_image_is_found_by_its_vector(tmp_path: Path):
    vectors = np.array([[1, 0], [0, 2], [3, 3], [np.nan, np.nan], [5, 4]], np.float16)
    names = ["train/a.png", "train/b.png", "train/c.png", "test/blind.png", "test/x.png"]
    table = pa.table({"path": names, "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 2)})
    pq.write_table(table.filter(pa.array(~np.isnan(vectors[:, 0]))), tmp_path / Embeddings.FILE)
    provenance = Provenance(ds_name="colours", dvc_tag="v1", dvc_md5="0" * 32)
    embeddings = Embeddings(provenance=provenance, manifest="m", encoder="e", features=2, images=4, directory=tmp_path)
    train = PackedSplit(np.zeros((3, 2, 2, 3), np.uint8), np.arange(3), names[:3], ["0" * 64] * 3)
    found = Neighbours(train, embeddings, "m")
    assert found.nearest(["test/x.png", "test/blind.png", "train/b.png"]) == [2, None, 1]  # By direction, not length.
    with pytest.raises(DatasetError, match="Materialise embeddings"):
        Neighbours(train, embeddings, "another").nearest(["test/x.png"])


def test_a_model_that_misses_a_limit_is_evaluated_and_does_not_pass(colours, softmax_model, tmp_path):
    evaluation = _evaluate(
        softmax_model, colours[0], tmp_path, _config(evaluate={"min_accuracy": 1.0, "worst_errors": 0})
    )
    assert not evaluation.passed
    assert "is below min_accuracy 1.0000" in evaluation.reasons[0]
    assert "worst_errors" not in evaluation.plots
    assert evaluation.reasons[0] in evaluation.report_path.read_text()
    again = _evaluate(softmax_model, colours[0], tmp_path)
    assert again.passed
    assert "worst_errors" in json.loads((again.directory / "evaluation.json").read_text())["plot_names"]


def test_multi_label_sets_are_joined_and_right_only_as_a_whole(sigmoid_model, tmp_path):
    sets = [(), ("blue",), ("green", "red"), ("blue", "green", "red"), ("red",), ("blue", "red")]
    entries = []
    for number, labels in enumerate(sets * 3):
        image = np.full((8, 8, 3), 20, np.uint8)
        for name in labels:
            image[..., CHANNELS[name]] = 230
        entries.append((f"test/{number:02d}.png", labels if number else ("green",), image))
    packed = _pack(tmp_path, entries, "multi-label")
    evaluation = _evaluate(sigmoid_model, packed, tmp_path)
    rows = pq.read_table(evaluation.predictions_path).to_pylist()
    assert (rows[0]["label"], rows[0]["predicted_class"], rows[0]["correct"]) == ("green", "", False)
    assert [row["predicted_class"] for row in rows[1:]] == ["|".join(labels) for labels in (sets * 3)[1:]]
    assert all(row["correct"] for row in rows[1:])
    assert evaluation.metrics["exact_match"] == pytest.approx(17 / 18)
    assert evaluation.metrics["accuracy"] == pytest.approx(1 - 1 / 54)
    assert len(evaluation.confusion[0]) == 4
    assert set(evaluation.plots) == {"per_class", "reliability", "worst_errors"}
    # The highest probability that the colours give is sigmoid(8 × 230/255 − 4) = .961.
    model = {**_config().model_dump(mode="json")["model"], "threshold": 0.97}
    strict = _evaluate(sigmoid_model, packed, tmp_path, _config(model=model))
    assert strict.threshold == 0.97
    assert set(pq.read_table(strict.predictions_path)["predicted_class"].to_pylist()) == {""}


def test_a_class_without_test_images_gives_finite_metrics(softmax_model, tmp_path):
    entries = [entry for entry in _test_images() if entry[1] != ("green",)]
    evaluation = _evaluate(softmax_model, _pack(tmp_path, entries), tmp_path)
    green = evaluation.per_class[1]
    assert (green["support"], green["recall"], green["auc"]) == (0.0, None, None)
    assert all(np.isfinite(value) for value in evaluation.metrics.values())


def test_refuses_a_test_split_without_images(softmax_model, tmp_path):
    with pytest.raises(InvalidDatasetError, match="test split of colours"):
        _evaluate(softmax_model, _pack(tmp_path, []), tmp_path)


def test_a_champion_that_is_better_keeps_its_place(colours, softmax_model, tmp_path):
    labels = [colours[1][path][0][0] for path in sorted(colours[1])]
    truth = np.array([[name == label for name in CLASSES] for label in labels])
    champion = Champion("20260101T000000Z-00000001", truth)
    wrong = _model(tmp_path / "wrong", "softmax", scale=-SCALE)
    refused = _evaluate(wrong, colours[0], tmp_path, champion=champion)
    assert not refused.passed
    assert refused.comparison is not None
    assert (refused.comparison.images, refused.comparison.only_challenger_right) == (len(labels), 0)
    assert "more than max_regression 0.0100" in refused.reasons[0]
    assert refused.reasons[0] in refused.report_path.read_text()
    lenient = _config(evaluate={"undecided": "promote"})
    assert _evaluate(softmax_model, colours[0], tmp_path, lenient, champion=champion).passed


def test_refuses_images_that_the_model_was_not_trained_beside(colours, softmax_model, tmp_path):
    other = colours[0].model_copy(update={"directory": colours[0].directory.with_name("other")})
    record = trained_model(softmax_model, pack=colours[0].directory.name)
    with pytest.raises(VerdictError, match=r"Received: other\. Materialise model"):
        evaluate_model(record, other, _config(), champion=None, directory=tmp_path, run=None)


def test_refuses_a_model_with_another_number_of_outputs(colours, tmp_path):
    model = _model(tmp_path / "two", "softmax", outputs=2)
    with pytest.raises(TrainingError, match="3 outputs"):
        _evaluate(model, colours[0], tmp_path)


def test_refuses_a_model_that_has_diverged(colours, tmp_path):
    model = _model(tmp_path / "nan", "softmax", scale=float("nan"))
    with pytest.raises(TrainingError, match="30 of them not finite"):
        _evaluate(model, colours[0], tmp_path)
    assert not (tmp_path / "evaluation" / "colours" / VERSION).exists()


def test_refuses_a_file_that_is_no_model(colours, tmp_path):
    (tmp_path / "colours.keras").write_bytes(b"nothing")
    with pytest.raises(TrainingError, match="expected a Keras model"):
        _evaluate(tmp_path, colours[0], tmp_path)


def test_worst_errors_are_the_most_confident_mistakes_in_order():
    correct = np.array([True, False, False, True, False])
    confidence = np.array([0.99, 0.5, 0.9, 0.98, 0.5])
    assert worst_errors(correct, confidence, 16) == [2, 1, 4]
    assert worst_errors(correct, confidence, 1) == [2]
    assert worst_errors(np.ones(3, bool), np.ones(3), 16) == []


def test_logs_metrics_plots_and_report_to_the_mlflow_run(colours, softmax_model, tmp_path):
    from mlflow import MlflowClient

    from cv_platform.tracking import start_run

    uri = f"sqlite:///{tmp_path / 'mlflow' / 'mlflow.db'}"
    with start_run(uri, "colours", run_name="evaluation", artifact_root=tmp_path / "artifacts") as run:
        evaluation = _evaluate(softmax_model, colours[0], tmp_path, run=run)
    assert evaluation.mlflow_run_id == run.run_id
    client = MlflowClient(uri)
    assert client.get_run(run.run_id).data.metrics == pytest.approx(evaluation.metrics)
    assert {file.path for file in client.list_artifacts(run.run_id, "plots")} == {
        f"plots/{path.name}" for path in evaluation.plots.values()
    }
    assert {file.path for file in client.list_artifacts(run.run_id, "evaluation")} == {
        "evaluation/predictions.parquet",
        "evaluation/report.html",
    }


def test_unknown_labels_are_neither_right_nor_wrong_in_an_evaluation(sigmoid_model, tmp_path):
    image = np.full((8, 8, 3), 20, np.uint8)
    image[..., CHANNELS["blue"]] = 230  # The model says blue.
    given = [(("blue",), ()), ((), ("blue",)), (("blue", "red"), ("green",)), ((), CLASSES)]
    entries = [(f"test/{at}.png", labels, image + np.uint8(at), unknown) for at, (labels, unknown) in enumerate(given)]
    packed = _pack(tmp_path, entries, "multi-label")
    decisions = np.tile([name == "blue" for name in CLASSES], (4, 1))
    champion = Champion("v0", decisions, np.array([False, False, True, False]))
    evaluation = _evaluate(sigmoid_model, packed, tmp_path, champion=champion)
    assert evaluation.metrics["images"] == 3  # Of the fourth nothing is known.
    assert evaluation.metrics["known_label_share"] == pytest.approx(7 / 9)
    assert evaluation.metrics["accuracy"] == pytest.approx(6 / 7)
    assert evaluation.metrics["exact_match"] == pytest.approx(2 / 3)
    assert [(row["class"], row["support"], row["known"]) for row in evaluation.per_class] == [
        ("blue", 2, 2),
        ("green", 0, 2),
        ("red", 1, 3),
    ]
    rows = pq.read_table(evaluation.predictions_path).to_pylist()
    assert [row["correct"] for row in rows] == [True, True, False, None]
    assert [row["unknown_labels"] for row in rows] == ["", "blue", "green", "blue|green|red"]
    assert evaluation.comparison is not None
    assert (evaluation.comparison.images, evaluation.comparison.champion_accuracy) == (2, 1.0)
    assert "known_label_share" in evaluation.report_path.read_text()


def test_a_test_split_of_which_nothing_is_known_is_refused(sigmoid_model, tmp_path):
    entries = [("test/0.png", (), np.full((8, 8, 3), 20, np.uint8), CLASSES)]
    with pytest.raises(InvalidDatasetError, match="Received: 1 images, of which no label is known"):
        _evaluate(sigmoid_model, _pack(tmp_path, entries, "multi-label"), tmp_path)
