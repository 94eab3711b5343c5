"""What people said about the predictions of a window: production accuracy by model version, against the test split's.

A prediction has one true class: its latest feedback, whichever source it came from (people correct themselves and each
other; the history stays in the database). Where that is none of the model's classes, a multi-class prediction is wrong,
and counted apart besides. Predictions belong to the window by their own time, not by their feedback's.

People choose what they comment on, mistakes more often than hits. The figures are of the predictions with feedback, and
only where those are a random sample (a labelling campaign, say) are they of all predictions.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import binomtest, fisher_exact
from sqlalchemy import Engine, func, select

from cv_platform.config import ExperimentConfig
from cv_platform.database.schema import feedback, is_request, labeling_items, predictions
from cv_platform.drift.reference import label_targets
from cv_platform.drift.slices import SLICE_COLUMNS, frequent
from cv_platform.drift.two_sample import holm
from cv_platform.errors import BundleNotFoundError, CorruptBundleError
from cv_platform.evaluation.plots import Interval, save_confusion_matrix, save_intervals
from cv_platform.files import write_file
from cv_platform.monitoring.sentences import production_figures, production_summary
from cv_platform.monitoring.window import WindowBounds, default_window, window_bounds
from cv_platform.predictions import LABEL_SEPARATOR, LABELLER, NONE_OF_THESE
from cv_platform.records import FeedbackVerdict, ProductionMetrics, SliceAccuracy, SliceColumn, VersionMetrics
from cv_platform.storage import BundleMetadata, CentralStorage
from cv_platform.tracking import MlflowRun

logger = logging.getLogger(__name__)

_STATEMENT = ["version", "predicted", "true", "source", *SLICE_COLUMNS, "count"]


def measure_production(
    config: ExperimentConfig,
    *,
    model_name: str,
    engine: Engine,
    storage: CentralStorage,
    now: datetime,
    directory: Path,
) -> ProductionMetrics:
    """Measures the predictions of the monitor's window against the feedback on them, by model version.

    Args:
        config: the experiment; `monitor` has the window, `alpha` and `min_feedback`.
        model_name: whose predictions.
        engine: of the request log.
        storage: has the bundles, whose metadata say what a version reached on its test split.
        now: end of the default window, with its zone.
        directory: receives plots and JSON; earlier ones are replaced.

    Returns:
        The figures; without any feedback they say so.

    Raises:
        ConfigError: the window's bounds are wrong.
        DatabaseUnavailableError, SchemaMismatchError, StorageError: see there.
    """
    bounds = window_bounds(config.monitor, now)
    if (
        bounds.by == "logged"
    ):  # Asked by the schedule or the sensor, whose windows may be minutes; feedback takes longer.
        start, _ = default_window(bounds.end, config.monitor.window_days)
        bounds = replace(bounds, start=min(start, bounds.start))
    totals, late_rows, statements = _read(engine, model_name, bounds)
    drawn = _read_drawn(engine, config, model_name, bounds)
    problems: list[str] = []
    versions = [
        _measure(
            config, storage, model_name, version, total, statements.loc[statements["version"] == version], problems
        )
        for version, total in totals.items()
    ]
    versions = [_estimated(version, drawn, config.monitor.alpha) for version in versions]
    metrics = ProductionMetrics(
        experiment=config.name,
        model_name=model_name,
        window_start_utc=bounds.start,
        window_end_utc=bounds.end,
        late_rows=late_rows,
        predictions=sum(version.predictions for version in versions),
        with_feedback=sum(version.with_feedback for version in versions),
        alpha=config.monitor.alpha,
        min_feedback=config.monitor.min_feedback,
        directory=directory,
        versions=_judged(versions, config.monitor.alpha, config.monitor.min_feedback),
        problems=tuple(problems),
    )
    directory.mkdir(parents=True, exist_ok=True)
    metrics = metrics.model_copy(update={"plot_names": _draw(metrics)})
    write_file(metrics.record_path, metrics.local_json())
    logger.info("%s", production_summary(metrics))
    return metrics


def log_production(run: MlflowRun, metrics: ProductionMetrics) -> None:
    """Logs the figures of the newest version with feedback, the plots and the JSON.

    Raises:
        TrackingError: MLflow cannot be reached.
    """
    run.log_metrics(production_figures(metrics))
    for path in metrics.plots.values():
        run.log_artifact(path, "plots")
    run.log_artifact(metrics.record_path, "production_metrics")


def _read(engine: Engine, model_name: str, bounds: WindowBounds) -> tuple[dict[str, int], int, pd.DataFrame]:
    """Returns the predictions per version, the newest first; how many are late; and how often each pair was said."""
    inside = (predictions.c.model_name == model_name) & bounds.holds() & is_request()
    totals = (
        select(predictions.c.model_version, func.count(), func.count().filter(bounds.is_late()))
        .where(inside)
        .group_by(predictions.c.model_version)
        .order_by(predictions.c.model_version.desc())  # Versions sort by time.
    )
    latest = (
        select(
            predictions.c.model_version,
            predictions.c.predicted_class,
            feedback.c.true_class,
            feedback.c.source,
            *(predictions.c[name] for name in SLICE_COLUMNS),
        )
        .join(feedback, feedback.c.prediction_id == predictions.c.prediction_id)
        .where(inside)
        .distinct(feedback.c.prediction_id)
        .order_by(feedback.c.prediction_id, feedback.c.created_on.desc(), feedback.c.id.desc())
        .subquery()
    )
    counted = select(*latest.c, func.count()).group_by(*latest.c)
    with bounds.snapshot(engine) as connection:
        known = [tuple(row) for row in connection.execute(totals)]
        rows = [tuple(row) for row in connection.execute(counted)]
    statements = pd.DataFrame(rows, columns=pd.Index(_STATEMENT))
    return {version: count for version, count, _ in known}, sum(late for *_, late in known), statements


def _read_drawn(engine: Engine, config: ExperimentConfig, model_name: str, bounds: WindowBounds) -> pd.DataFrame:
    """Returns what labellers said of predictions that were drawn at random; a row each, by the latest of them."""
    said, item = feedback.c, labeling_items.c
    wanted = (
        select(predictions.c.model_version, predictions.c.predicted_class, said.true_class, item.chance)
        .join(labeling_items, item.prediction_id == predictions.c.prediction_id)
        .join(feedback, said.prediction_id == predictions.c.prediction_id)
        .where((predictions.c.model_name == model_name) & bounds.holds())
        .where((item.experiment == config.name) & item.chance.is_not(None) & said.source.startswith(LABELLER))
        .distinct(said.prediction_id)
        .order_by(said.prediction_id, said.created_on.desc(), said.id.desc())
    )
    with engine.connect() as connection:
        rows = [tuple(row) for row in connection.execute(wanted)]
    return pd.DataFrame(rows, columns=pd.Index(["version", "predicted", "true", "chance"]))


def _estimated(version: VersionMetrics, drawn: pd.DataFrame, alpha: float) -> VersionMetrics:
    """Adds the estimate for all predictions of the version; as it is without labels of random ones."""
    rows = drawn.loc[drawn["version"] == version.model_version]
    if rows.empty:
        return version
    answers, truths = ([set(text.split(LABEL_SEPARATOR)) for text in rows[name]] for name in ("predicted", "true"))
    right = np.array([answer == truth for answer, truth in zip(answers, truths, strict=True)])
    weights = 1.0 / rows["chance"].to_numpy(dtype=np.float64)
    share = float(weights[right].sum() / weights.sum())
    # As so many equally weighted rows say: Kish 1965, "Survey Sampling", section 11.7.
    effective = max(1, round(float(weights.sum() ** 2 / (weights**2).sum())))
    interval = binomtest(round(share * effective), effective).proportion_ci(confidence_level=1 - alpha, method="wilson")
    return version.model_copy(
        update={
            "random_labels": len(rows),
            "estimated_share": share,
            "estimated_interval": (float(interval.low), float(interval.high)),
        }
    )


def _measure(
    config: ExperimentConfig,
    storage: CentralStorage,
    model_name: str,
    version: str,
    total: int,
    statements: pd.DataFrame,
    problems: list[str],
) -> VersionMetrics:
    metadata = _metadata(storage, model_name, version)
    kind = metadata.classifier_type if metadata else config.model.classifier_type
    names = metadata.class_names if metadata else tuple(config.model.classes)
    usable = statements
    if kind == "multi-class":
        usable = statements.loc[statements["true"].isin([*names, NONE_OF_THESE]) & statements["predicted"].isin(names)]
    left_out = int(statements["count"].sum() - usable["count"].sum())
    if left_out:
        problems.append(
            f"{version}: {left_out} predictions were left out, as their class or the stated one is none of the model's."
        )
    rows = int(usable["count"].sum())
    facts: dict[str, Any] = {
        "model_version": version,
        "classifier_type": kind,
        "predictions": total,
        "with_feedback": rows,
        "coverage": rows / total,
        "none_of_these": int(usable.loc[usable["true"] == NONE_OF_THESE, "count"].sum()),
        "class_names": names,
    }
    if metadata is not None:
        facts |= {
            "test_right_share": metadata.metrics.get("accuracy" if kind == "multi-class" else "exact_match"),
            "test_images": int(metadata.metrics["images"]) if "images" in metadata.metrics else None,
        }
    if metadata is not None and "known_label_share" in metadata.metrics:
        # An image is right there by some of its labels, and here by all: right more often, whatever the model.
        facts |= {"test_right_share": None, "test_images": None}
        problems.append(f"{version}: not compared with its test split, of which labels are unknown.")
    if not rows:
        return VersionMetrics(**facts)
    weights = usable["count"].to_numpy(dtype=np.int64)
    truth, predicted = label_targets(usable["true"], names), label_targets(usable["predicted"], names)
    is_right = (truth == predicted).all(axis=1)
    right = int(weights[is_right].sum())
    interval = binomtest(right, rows).proportion_ci(confidence_level=1 - config.monitor.alpha, method="wilson")
    cells = _cells(truth, predicted, weights)
    is_multi_class = kind == "multi-class"
    return VersionMetrics(
        **facts,
        accuracy=right / rows if is_multi_class else float(cells[:, [0, 3]].sum() / cells.sum()),
        right_share=right / rows,
        interval=(float(interval.low), float(interval.high)),
        per_class=[
            _class_row(name, *row, with_accuracy=not is_multi_class)
            for name, row in zip(names, cells.tolist(), strict=True)
        ],
        confusion=((truth * weights[:, None]).T @ predicted).tolist() if is_multi_class else cells.tolist(),
        slices=_slices(usable.assign(right=weights * is_right), config.monitor.alpha),
        sources={str(name): int(count) for name, count in usable.groupby("source")["count"].sum().items()},
    )


def _slices(statements: pd.DataFrame, alpha: float) -> tuple[SliceAccuracy, ...]:
    """Compares the share of right predictions of each part of the traffic with that of all others, by Fisher's test."""
    rows, right = int(statements["count"].sum()), int(statements["right"].sum())
    counted: dict[tuple[SliceColumn, str], tuple[int, int]] = {}
    for column in SLICE_COLUMNS:
        said, hits = Counter[str](), Counter[str]()
        for value, count, is_right in zip(*(statements[name] for name in (column, "count", "right")), strict=True):
            if isinstance(value, str):
                said[value] += int(count)
                hits[value] += int(is_right)
        counted |= {(column, value): (said[value], hits[value]) for value in frequent(said, rows)}
    p_values: dict[str, float] = {}
    for name, (count, hits) in counted.items():
        table = [[hits, count - hits], [right - hits, rows - count - right + hits]]
        result: Any = fisher_exact(table, alternative="less")
        p_values["/".join(name)] = float(min(1.0, result.pvalue))
    adjusted = holm(p_values)
    found = [
        SliceAccuracy(
            column=column,
            value=value,
            with_feedback=count,
            right_share=hits / count,
            rest_share=(right - hits) / (rows - count),
            adjusted_p_value=adjusted[f"{column}/{value}"],
            is_worse=adjusted[f"{column}/{value}"] <= alpha,
        )
        for (column, value), (count, hits) in counted.items()
    ]
    return tuple(sorted(found, key=lambda one: (one.adjusted_p_value, one.right_share, one.column, one.value)))


def _judged(versions: list[VersionMetrics], alpha: float, min_feedback: int) -> tuple[VersionMetrics, ...]:
    """Compares each version that has enough feedback with its test split; Bonferroni over those that are compared."""
    enough = [version for version in versions if version.with_feedback >= min_feedback]
    comparable = [v for v in enough if v.test_right_share is not None and v.test_images]
    judged: list[VersionMetrics] = []
    for version in versions:
        if version in comparable:
            p_value = _p_value(version)
            verdict: FeedbackVerdict = (
                "worse than on the test split" if p_value * len(comparable) <= alpha else "as on the test split"
            )
            judged.append(version.model_copy(update={"p_value": p_value, "verdict": verdict}))
        else:
            verdict = "not comparable" if version in enough else "insufficient feedback"
            judged.append(version.model_copy(update={"verdict": verdict}))
    return tuple(judged)


def _p_value(version: VersionMetrics) -> float:
    # Against the test split's counts, not its share: an accuracy of 1.0 on 300 images promises no flawless production.
    assert version.right_share is not None
    assert version.test_right_share is not None
    assert version.test_images is not None
    table = [
        [round(version.right_share * version.with_feedback), version.with_feedback],
        [round(version.test_right_share * version.test_images), version.test_images],
    ]
    result: Any = fisher_exact([[right, rows - right] for right, rows in table], alternative="less")
    return float(result.pvalue)


def _cells(truth: NDArray[np.bool_], predicted: NDArray[np.bool_], weights: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns `(C, 4)`: true negatives, false positives, false negatives, true positives of each class."""
    kinds = (~truth & ~predicted, ~truth & predicted, truth & ~predicted, truth & predicted)
    return np.stack([weights @ kind for kind in kinds], axis=1)


def _class_row(name: str, tn: int, fp: int, fn: int, tp: int, *, with_accuracy: bool) -> dict[str, Any]:
    row = {
        "class": name,
        "feedback": tp + fn,
        "predicted": tp + fp,
        "precision": tp / (tp + fp) if tp + fp else None,
        "recall": tp / (tp + fn) if tp + fn else None,
        "f1": 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else None,
    }
    return {**row, "accuracy": (tp + tn) / (tp + tn + fp + fn)} if with_accuracy else row


def _metadata(storage: CentralStorage, model_name: str, version: str) -> BundleMetadata | None:
    try:
        return storage.read_metadata(model_name, version)
    except (BundleNotFoundError, CorruptBundleError) as err:
        logger.warning("%s %s is not compared with its test split: %s", model_name, version, err)
        return None


def _draw(metrics: ProductionMetrics) -> tuple[str, ...]:
    """Writes the plots for which there is feedback, and returns their names."""
    names: list[str] = []
    intervals = [
        Interval(f"{v.model_version}\n{v.with_feedback} with feedback", v.right_share, *v.interval, v.test_right_share)
        for v in metrics.versions
        if v.right_share is not None and v.interval is not None
    ]
    if intervals:
        names.append("accuracy")
        title = "Share of right predictions (mark: on the test split)"
        save_intervals(metrics.directory / "accuracy.png", intervals, title)
    newest = next((version for version in metrics.versions if version.with_feedback), None)
    if newest is not None and newest.classifier_type == "multi-class":
        names.append("confusion_matrix")
        save_confusion_matrix(
            metrics.directory / "confusion_matrix.png",
            np.array(newest.confusion),
            newest.class_names,
            what=f"feedback on {newest.model_version}",
        )
    return tuple(names)
