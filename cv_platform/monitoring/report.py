"""Makes the drift report of one window: judged, explained, and kept in central storage, the database and Evidently."""

from __future__ import annotations

import logging
import tempfile
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from sqlalchemy import Engine, select
from sqlalchemy.dialects.postgresql import insert

from cv_platform.config import ClassifierType, ExperimentConfig, MonitorConfig, Threshold
from cv_platform.database.schema import drift_reports
from cv_platform.database.uploads import read_feedback
from cv_platform.drift.accuracy import estimate_accuracy
from cv_platform.drift.causes import Labelled, find_causes
from cv_platform.drift.localisation import class_movements, effect_sizes, image_scores
from cv_platform.drift.map_plot import draw_map
from cv_platform.drift.order import ORDER_ALPHA, order_p_value
from cv_platform.drift.reference import label_targets, read_identity, read_reference, read_reference_labels
from cv_platform.drift.sample import DriftSample, require_comparable
from cv_platform.drift.scipy_tests import wilson_interval
from cv_platform.drift.slices import SLICE_COLUMNS, moved_slices, named_slices
from cv_platform.drift.verdict import judge
from cv_platform.errors import BundleNotFoundError, ServiceError
from cv_platform.images import Preprocessing, preprocessing_hash
from cv_platform.monitoring.accept import current_normal
from cv_platform.monitoring.alarm_rate import alarm_level
from cv_platform.monitoring.encoded import Encoded, with_encoded
from cv_platform.monitoring.evidently_figures import evidently_run
from cv_platform.monitoring.evidently_report import delete_run, publish_run
from cv_platform.monitoring.report_page import render_page
from cv_platform.monitoring.sentences import drift_summary
from cv_platform.monitoring.top_images import pictures_of, top_images
from cv_platform.monitoring.window import Window, WindowBounds, read_window, window_bounds
from cv_platform.predictions import LABEL, UNKNOWN_LABELS, predicted_flags
from cv_platform.records import DriftDetectors, DriftReport, ModelIdentity, PackedImages
from cv_platform.storage import BundleMetadata, CentralStorage

logger = logging.getLogger(__name__)

_MOST_REPEATED = 0.1
_NAMESPACE = uuid.UUID("0d7a7bb2-6c6e-4b7b-9d83-1b8f2f3f0c55")
_R = TypeVar("_R", bound=DriftReport)
_COLUMNS = ("report_id", "experiment", "window_start_utc", "window_end_utc", "rows", "verdict")


@dataclass(frozen=True)
class ModelFacts:
    """What the report must know of the version that answered: its bundle's metadata, not today's config.

    Attributes:
        classifier_type, threshold: how it decides.
        preprocessing_hash, encoder_hash: what reference data have to be of.
    """

    classifier_type: ClassifierType
    threshold: Threshold
    preprocessing_hash: str
    encoder_hash: str | None

    @classmethod
    def of(cls, metadata: BundleMetadata) -> ModelFacts:
        """Returns what a published version's metadata say."""
        return cls(metadata.classifier_type, metadata.threshold, metadata.preprocessing_hash, metadata.encoder_hash)


@dataclass(frozen=True)
class ReportPlace:
    """Where drift reports are kept, beside the database.

    Attributes:
        storage: where the HTML and JSON go.
        evidently: workspace folder, or URL of a server.
        home: `Settings.home`: for the files until they are in storage, and of the encoder.
        packed: the images of the reference split, for the page; None: they are not here.
        detectors: the latest; those of the model that is reported on show what the verdict notices.
    """

    storage: CentralStorage
    evidently: Path | str
    home: Path
    packed: PackedImages | None = None
    detectors: DriftDetectors | None = None

    @property
    def work_directory(self) -> Path:
        """For the files until they are in storage."""
        return self.home / "cache" / "drift_reports"


def make_drift_report(
    config: ExperimentConfig,
    model: ModelIdentity,
    reference_path: Path,
    *,
    engine: Engine,
    place: ReportPlace,
    now: datetime,
    accepted: Path | None = None,
) -> DriftReport:
    """Judges one window of requests and keeps the report in central storage, the database and Evidently.

    A second report of the same window replaces the first. Where Evidently cannot be reached, the report says so.

    Args:
        config: the experiment; `monitor` has the window and the test's settings.
        model: whose requests are judged; others of the window are never mixed in.
        reference_path: local parquet of that version.
        engine: of the request log.
        place: where the report goes.
        now: end of the default window, with its zone.
        accepted: local parquet of a window that was taken as the new normal, see `accept.current_normal`; requests are
            then compared with that, and what needs labels stays with the split's.

    Raises:
        ConfigError: the window's bounds are wrong.
        ReferenceMismatchError: the reference was made by another version, preprocessing or encoder.
        InvalidSampleError: the logged rows have other widths than the reference.
        DatabaseUnavailableError, SchemaMismatchError, StorageError: see there.
    """
    started, monitor = time.monotonic(), config.monitor
    bounds = window_bounds(monitor, now)
    facts = _model_facts(place.storage, config, model)
    identity = {"model_name": model.model_name, "model_version": model.version}
    reference = read_reference(
        accepted or reference_path,
        **identity,
        preprocessing_hash=facts.preprocessing_hash,
        encoder_hash=facts.encoder_hash,
    )
    window = read_window(engine, model, bounds, monitor)
    report_id = _report_id(config.name, model, bounds)
    level = alarm_level(engine, monitor, experiment=config.name, report_id=report_id, window_end=bounds.end)
    report = DriftReport(
        report_id=report_id,
        experiment=config.name,
        model=model,
        window_start_utc=bounds.start,
        window_end_utc=bounds.end,
        window_by=bounds.by,
        reference=accepted.name.partition(".")[0] if accepted else "",
        alpha=level,
        false_alarms_per_year=monitor.false_alarms_per_year,
        **window_facts(window, reference, monitor, "requests"),
    )
    if window.sample is not None:
        class_names = read_identity(reference_path).class_names
        require_comparable(reference, window.sample, min_rows=1)
        report = _with_feedback(_with_order(report, window.sample, monitor.seed), engine, window, class_names, facts)
        if report.rows >= monitor.min_samples:
            encoded = with_encoded(
                config, engine, place.home, reference, accepted or reference_path, window, is_accepted=bool(accepted)
            )
            seen = {"encoded_rows": encoded.rows, "problems": (*report.problems, *encoded.problems)}
            report = with_verdict(report.model_copy(update=seen), monitor, encoded, reference_path, window, facts)
    report = _publish(report, engine, place, reference, window, config.model.sample_bits)
    logger.info("%s (%.1f s)", drift_summary(report), time.monotonic() - started)
    return report


def report_on_service(
    config: ExperimentConfig,
    deployed: ModelIdentity,
    *,
    engine: Engine,
    place: ReportPlace,
    now: datetime,
) -> tuple[DriftReport, str]:
    """Makes the report of the version that the experiment's service has now, and says what it was compared with.

    Args:
        config: see `make_drift_report`, as `engine`, `place` and `now`.
        deployed: the version to report on where the service has none of this model.

    Raises:
        StorageError: there are no reference data of that version. Else see `make_drift_report`.
    """
    storage = place.storage
    # The pointer, not the bundle: reports go on when the bundle is damaged.
    pointer = storage.read_pointer(config.deploy.service)
    if pointer and pointer.model_name == config.model.model_name:
        deployed = ModelIdentity(model_name=pointer.model_name, version=pointer.version)
    name, version, cache = deployed.model_name, deployed.version, place.home / "cache"
    reference = storage.fetch_reference_data(name, version, cache)
    normal = current_normal(engine, storage, deployed, cache)
    report = make_drift_report(config, deployed, reference, engine=engine, place=place, now=now, accepted=normal)
    accepted = storage.read_accepted(name, version)
    return report, accepted.told() if accepted else "the reference split"


def with_verdict(
    report: _R,
    monitor: MonitorConfig,
    compared: Encoded,
    reference_path: Path,
    window: Window,
    facts: ModelFacts,
) -> _R:
    """Returns a report with its verdict at `report.alpha`, and what explains it.

    Args:
        report: of the window.
        monitor: the test's settings.
        compared: both sides.
        reference_path: local parquet of the reference split, with its labels.
        window: whose rows are the current side's.
        facts: of the model that answered.

    Raises:
        InvalidSampleError: the sides cannot be compared.
    """
    reference, current = compared.reference, compared.current
    class_names = read_identity(reference_path).class_names
    verdict = judge(
        reference,
        current,
        alpha=report.alpha,
        permutations=monitor.permutations,
        max_reference_rows=monitor.max_reference_rows,
        seed=monitor.seed,
        detectors=monitor.detectors,
    )
    classes = class_movements(
        reference,
        current,
        class_names=class_names,
        classifier_type=facts.classifier_type,
        threshold=facts.threshold,
        alpha=report.alpha,
    )
    scores = image_scores(reference, current, seed=monitor.seed)
    labels = read_reference_labels(reference_path)
    targets, unknown = (label_targets(labels[name].tolist(), class_names) for name in (LABEL, UNKNOWN_LABELS))
    labelled = read_reference(reference_path) if report.reference else reference
    causes = None
    # Told by labelled images of before, which an accepted window has not.
    if verdict.drifted and facts.classifier_type == "multi-class" and not report.reference:
        causes = find_causes(
            Labelled(labelled, targets),
            current,
            class_names=class_names,
            permutations=monitor.permutations,
            max_reference_rows=monitor.max_reference_rows,
            seed=monitor.seed,
            detectors=monitor.detectors,
        )
    estimate = None  # Of a reference of which no label is known.
    if not unknown.all():
        estimate = estimate_accuracy(
            labelled.bbsd,
            targets,
            current.bbsd,
            classifier_type=facts.classifier_type,
            threshold=facts.threshold,
            has_drifted=verdict.drifted,
            reference_known=~unknown,
        )
    return report.model_copy(
        update={
            "verdict": "drift" if verdict.drifted else "no drift",
            "p_values": verdict.p_values,
            "adjusted_p_values": verdict.adjusted_p_values,
            "statistics": verdict.statistics,
            "intervals": verdict.intervals,
            "drifted_detectors": verdict.drifted_detectors,
            "effects": effect_sizes(reference, current, verdict, class_names=class_names),
            "causes": causes,
            "classes": classes,
            "slices": moved_slices(
                reference,
                current,
                named_slices({name: window.rows[name].tolist() for name in SLICE_COLUMNS}),
                alpha=report.alpha,
            ),
            "top_images": top_images(window, scores, reference, current, compared.path),
            "accuracy_estimate": estimate,
        }
    )


def _with_order(report: DriftReport, sample: DriftSample, seed: int) -> DriftReport:
    """Says where requests come in blocks of one class."""
    p_value = order_p_value(sample.bbsd.argmax(axis=1), seed=seed)
    said = (
        f"Requests come in blocks of one predicted class (runs test, p {p_value:.2g}). The verdict does not depend on "
        "their order, but takes requests as independent: a window of few blocks can look like drift. Judge a longer "
        "one."
    )
    problems = (*report.problems, said) if p_value <= ORDER_ALPHA else report.problems
    return report.model_copy(update={"order_p_value": p_value, "problems": problems})


def _with_feedback(
    report: DriftReport, engine: Engine, window: Window, class_names: tuple[str, ...], facts: ModelFacts
) -> DriftReport:
    """Measures the accuracy where people have stated the true class."""
    stated = read_feedback(engine, window.rows["prediction_id"].tolist())
    if not stated or window.sample is None:
        return report
    known = window.rows["prediction_id"].isin(list(stated)).to_numpy()
    targets = label_targets([stated[i] for i in window.rows["prediction_id"][known]], class_names)
    predicted = predicted_flags(window.sample.bbsd[known], facts.classifier_type, facts.threshold)
    is_right = (predicted & targets).any(axis=1) if facts.classifier_type == "multi-class" else predicted == targets
    accuracy, rows = float(np.mean(is_right)), int(known.sum())
    # Of several labels, images count, not single decisions, which go together.
    interval = wilson_interval(round(accuracy * rows), rows)
    return report.model_copy(
        update={"feedback_rows": rows, "feedback_accuracy": accuracy, "feedback_interval": interval}
    )


def _publish(
    report: DriftReport,
    engine: Engine,
    place: ReportPlace,
    reference: DriftSample,
    window: Window,
    sample_bits: int | None,
) -> DriftReport:
    """Writes the report everywhere; the database row last, so that it never points to what does not exist.

    Where storage or database refuse, the run already in Evidently is taken away again.
    """
    pictures, unreadable = pictures_of(report, engine, place.packed, sample_bits)
    problems = [*report.problems, *unreadable]
    earlier_run_id = _earlier_run(engine, report.report_id)
    try:
        run = evidently_run(report, reference, window.sample)
        report = report.model_copy(update={"evidently_run_id": publish_run(place.evidently, run)})
    except ServiceError as err:
        logger.warning("The drift report is kept without Evidently: %s", err)
        problems.append(f"Not in Evidently: {err}")
    report = report.model_copy(update={"problems": tuple(problems)})
    try:
        is_judged = report.verdict != "insufficient data"
        places = draw_map(reference, window.sample, seed=0) if is_judged and window.sample is not None else None
        report = _keep(report, engine, place, pictures, places)
    except BaseException:
        # Nothing names that run: it would stand in the dashboard beside the one of the next attempt.
        if report.evidently_run_id is not None:
            delete_run(place.evidently, report.experiment, report.evidently_run_id)
        raise
    # Last: until the new row stands, the old one names the earlier run.
    if earlier_run_id is not None and report.evidently_run_id is not None:
        delete_run(place.evidently, report.experiment, earlier_run_id)
    return report


def _keep(
    report: DriftReport,
    engine: Engine,
    place: ReportPlace,
    pictures: Mapping[str, str],
    places: bytes | None,
) -> DriftReport:
    """Writes the page to storage, then the row."""
    place.work_directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.work_directory) as folder:
        directory = Path(folder)
        detectors = place.detectors
        power = detectors.plot_path if detectors and detectors.model == report.model else None
        (directory / "report.html").write_text(render_page(report, pictures, power, places), encoding="utf-8")
        (directory / "report.json").write_text(report.local_json(), encoding="utf-8")
        url = place.storage.publish_report(report.experiment, report.report_id, directory)
    report = report.model_copy(update={"report_url": f"{url}/report.html"})
    _write_row(engine, report)
    return report


def _write_row(engine: Engine, report: DriftReport) -> None:
    details = report.model_dump(mode="json", exclude={*_COLUMNS, "model", "report_url", "made_from"})
    row: dict[str, Any] = {
        **{name: getattr(report, name) for name in _COLUMNS},
        "report_id": uuid.UUID(report.report_id),
        "model_name": report.model.model_name,
        "model_version": report.model.version,
        "report_url": report.report_url,
        "details": details,
    }
    statement = insert(drift_reports).values(row)
    changed = {name: statement.excluded[name] for name in row if name != "report_id"}
    with engine.begin() as connection:
        connection.execute(statement.on_conflict_do_update(index_elements=["report_id"], set_=changed))


def _earlier_run(engine: Engine, report_id: str) -> str | None:
    """Returns the Evidently run of an earlier report of the same window."""
    wanted = select(drift_reports.c.details["evidently_run_id"].astext).where(
        drift_reports.c.report_id == uuid.UUID(report_id)
    )
    with engine.connect() as connection:
        return connection.execute(wanted).scalar_one_or_none()


def _model_facts(storage: CentralStorage, config: ExperimentConfig, model: ModelIdentity) -> ModelFacts:
    try:
        return ModelFacts.of(storage.read_metadata(model.model_name, model.version))
    except BundleNotFoundError:
        # A version that was never published as a bundle, such as one evaluated offline: today's config is all there is.
        today = config.model
        preprocessing = preprocessing_hash(today.image_size, Preprocessing.of(today))
        return ModelFacts(today.classifier_type, today.threshold, preprocessing, None)


def window_facts(window: Window, reference: DriftSample, monitor: MonitorConfig, unit: str) -> dict[str, Any]:
    """Returns the fields of a report that say what was compared, and what was wrong with it.

    Args:
        window: what is judged.
        reference: what it is compared with.
        monitor: the test's settings.
        unit: what its rows are called, such as requests.
    """
    problems: list[str] = []
    if window.unusable:
        problems.append(
            f"{window.unusable} {unit} were left out: their embeddings are not finite or of another width. "
            "A model that answers so is broken, or another program has written them."
        )
    if window.repeats > _MOST_REPEATED * window.requests:
        tests = f"The tests take {unit} as independent: "
        problems.append(
            f"{window.repeats} of {window.requests} {unit} repeat a picture of the window. {tests}"
            + (
                "each picture was judged once (monitor.repeats)."
                if monitor.repeats == "once"
                else "an image that comes again and again can look like drift (monitor.repeats: once)."
            )
        )
    return {
        "requests": window.requests,
        "late_rows": window.late,
        "other_requests": window.others,
        "rows": len(window.rows),
        "unusable_rows": window.unusable,
        "repeated_rows": window.repeats,
        "is_sampled": window.is_sampled,
        "reference_rows": len(reference),
        "min_samples": monitor.min_samples,
        "problems": tuple(problems),
    }


def _report_id(experiment: str, model: ModelIdentity, bounds: WindowBounds) -> str:
    parts = [experiment, model.model_name, model.version, bounds.start.isoformat(), bounds.end.isoformat()]
    if bounds.by == "logged":  # Other requests than those that were answered between the same moments.
        parts.append(bounds.by)
    return str(uuid.uuid5(_NAMESPACE, "\n".join(parts)))
