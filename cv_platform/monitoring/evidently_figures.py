"""Which numbers of a drift report become lines in Evidently's dashboard."""

from __future__ import annotations

from cv_platform.drift.sample import DriftSample
from cv_platform.monitoring.evidently_report import EvidentlyRun, Figure
from cv_platform.records import DriftReport

_SMALLEST_P = 1e-6


def evidently_run(report: DriftReport, reference: DriftSample, current: DriftSample | None) -> EvidentlyRun:
    """Returns the run that shows `report`; `current` are the judged rows, none without any."""
    figures = [Figure("WindowFigure", "rows", float(report.rows))]
    if report.feedback_accuracy is not None:
        figures.append(Figure("EstimatedAccuracy", "feedback", report.feedback_accuracy))
    if report.adjusted_p_values:
        figures.append(Figure("WindowFigure", "drifted", float(report.verdict == "drift")))
        figures.append(
            Figure("WindowFigure", "smallest adjusted p", max(_SMALLEST_P, min(report.adjusted_p_values.values())))
        )
        figures += [Figure("CalibratedDrift", name, p) for name, p in report.adjusted_p_values.items()]
    if report.effects is not None:
        effects = {
            "bbsd_ks": report.effects.bbsd.ks_distance,
            "properties_ks": report.effects.properties.ks_distance,
            **report.effects.mmd,
        }
        figures += [Figure("DriftEffect", name, value) for name, value in effects.items()]
        shifts = [(shift.name, shift.shift_sds) for shift in report.effects.property_shifts]
        figures += [Figure("PropertyShift", name, value) for name, value in shifts if value is not None]
    figures += [Figure("PredictedShare", c.class_name, c.current_share) for c in report.classes]
    if report.accuracy_estimate is not None:
        estimate = report.accuracy_estimate
        figures.append(Figure("EstimatedAccuracy", "reference", estimate.reference_accuracy))
        if estimate.is_reliable:  # A line through numbers that are known to be wrong would be believed.
            figures.append(Figure("EstimatedAccuracy", "estimate (DoC)", estimate.difference_of_confidences))
            figures.append(Figure("EstimatedAccuracy", "estimate (ATC)", estimate.thresholded_confidence))
    has_table = current is not None and bool(report.adjusted_p_values)
    return EvidentlyRun(
        experiment=report.experiment,
        window_end_utc=report.window_end_utc,
        figures=figures,
        metadata={
            "model_name": report.model.model_name,
            "model_version": report.model.version,
            "verdict": report.verdict,
            "report_id": report.report_id,
            "window_start_utc": report.window_start_utc.isoformat(),
            "window_end_utc": report.window_end_utc.isoformat(),
        },
        reference_properties=reference.properties if has_table else None,
        current_properties=current.properties if has_table and current is not None else None,
        alpha=report.alpha,
    )
