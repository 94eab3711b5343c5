"""What monitoring found, in sentences and lines: for alerts, logs, pages, tables and MLflow."""

from __future__ import annotations

from typing import Any

from cv_platform.records import (
    BatchDriftReport,
    DriftCauses,
    DriftReport,
    EffectSizes,
    ProductionMetrics,
    VersionMetrics,
)

SLICE_NAMES = {"client": "API key", "tag": "tag", "network": "network"}


def drift_summary(report: DriftReport) -> str:
    """Returns the report in a few sentences, for alerts, logs and check descriptions."""
    if isinstance(report, BatchDriftReport):
        unit, of = "images", f"of {report.source}, scored by {report.model}"
    else:
        window = f"{report.window_start_utc:%Y-%m-%d %H:%M} to {report.window_end_utc:%Y-%m-%d %H:%M} UTC"
        unit, of = "requests", f"of {report.model}, {window}"
    head = f"{report.verdict} in {report.rows} {unit} {of}."
    parts = [head[0].upper() + head[1:]]
    if report.verdict == "insufficient data":
        parts.append(f"At least {report.min_samples} usable {unit} are needed; there are {report.rows}.")
    if report.drifted_detectors:
        fired = ", ".join(f"{name} (p {report.adjusted_p_values[name]:.2g})" for name in report.drifted_detectors)
        parts.append(f"Fired: {fired}.")
    if report.verdict == "drift" and report.effects is not None:
        if report.causes is not None:
            parts.append(cause_note(report.causes))
        parts.extend(_effects(report.effects))
        if report.moved_classes:
            moved = ", ".join(movement.class_name for movement in report.moved_classes[:5])
            parts.append(f"Classes that moved: {moved}.")
    if worst := report.worst_slice:
        parts.append(
            f"Clearest in the {worst.rows} requests of {SLICE_NAMES[worst.column]} {worst.value} "
            f"(p {worst.adjusted_p_value:.2g}, corrected for {len(report.slices)} slices)."
        )
    if report.feedback_accuracy is not None:
        parts.append(f"Accuracy on {report.feedback_rows} requests with feedback: {report.feedback_accuracy:.3f}.")
    if report.report_url:
        parts.append(f"Report: {report.report_url}")
    return " ".join(parts)


def cause_note(causes: DriftCauses) -> str:
    """Returns what explains the drift, and what to do about it."""
    if causes.cause == "class mix":
        moved = "; ".join(
            f"{one.class_name} {one.reference_share:.0%} to {one.share:.0%} ({one.low:.0%} to {one.high:.0%})"
            for one in causes.moved[:5]
        )
        return (
            f"The classes look as before, their mix has changed{f': {moved}' if moved else ''}. Each class is "
            "recognised as well as before; over all images the accuracy changes with the mix. Train again if the mix "
            "stays and classes with few images have become frequent."
        )
    if causes.cause == "unknown images":
        return (
            f"Images like none of the reference came among the others, {causes.unknown_share:.0%} of them; without "
            "these nothing has drifted. Look at the images: add a new class as one, and keep what is no business of "
            "the model away from it."
        )
    if causes.cause == "images":
        return (
            "The images of the classes look otherwise than before. Find out whether a camera, the light or a client's "
            "processing has changed. If it stays so, label some of these images, add them to the dataset and train "
            "again."
        )
    return (
        "Another mix of classes is not told from other images: the reference has too few images of the classes that "
        "came."
    )


def _effects(effects: EffectSizes) -> list[str]:
    probability, property_ = effects.bbsd, effects.properties
    sentences = [
        f"Largest KS distances: {probability.ks_distance:.2f} for the probability of {probability.dimension}, "
        f"{property_.ks_distance:.2f} for {property_.dimension}."
    ]
    known = [shift for shift in effects.property_shifts if shift.shift_sds is not None]
    if known:
        largest = max(known, key=lambda shift: abs(shift.shift_sds or 0.0))
        sentences.append(f"{largest.name} moved by {largest.shift_sds:+.2f} reference standard deviations.")
    constant = [shift.name for shift in effects.property_shifts if shift.shift_sds is None]
    if constant:
        sentences.append(f"No longer constant as in the reference: {', '.join(constant)}.")
    return sentences


def version_row(version: VersionMetrics) -> dict[str, Any]:
    """Returns the version's line in a table."""
    low, high = version.interval or (None, None)
    elsewhere = {"class_names", "classifier_type", "confusion", "interval", "model_version", "per_class", "test_images"}
    elsewhere |= {"estimated_interval", "slices"}
    return {
        "version": version.model_version,
        **version.model_dump(exclude=elsewhere | {"sources"}),
        "low": low,
        "high": high,
        "sources": ", ".join(f"{name} {count}" for name, count in sorted(version.sources.items())),
    }


def production_figures(metrics: ProductionMetrics) -> dict[str, float]:
    """Returns the numbers of the newest version with feedback, for MLflow."""
    version = next((version for version in metrics.versions if version.with_feedback), None)
    if version is None:
        return {}
    figures = {
        "production_predictions": float(version.predictions),
        "production_feedback": float(version.with_feedback),
        "production_coverage": version.coverage,
        "production_none_of_these": float(version.none_of_these),
        "production_accuracy": version.accuracy,
        "production_right_share": version.right_share,
        "test_right_share": version.test_right_share,
        "production_estimated_share": version.estimated_share,
    }
    return {name: value for name, value in figures.items() if value is not None}


def production_summary(metrics: ProductionMetrics) -> str:
    """Returns the figures in a few sentences."""
    window = f"{metrics.window_start_utc:%Y-%m-%d %H:%M} to {metrics.window_end_utc:%Y-%m-%d %H:%M} UTC"
    head = f"{metrics.with_feedback} of {metrics.predictions} predictions of {metrics.model_name} have feedback"
    if not metrics.with_feedback:
        return f"Insufficient feedback: {head}, {window}. People give it on the web page, or with POST /feedback/…."
    told = (_sentence(version, metrics.min_feedback) for version in metrics.versions if version.with_feedback)
    return " ".join([f"{head}, {window}.", *told])


def _sentence(version: VersionMetrics, min_feedback: int) -> str:
    assert version.right_share is not None
    assert version.interval is not None
    low, high = version.interval
    measured = (
        f"{version.right_share:.3f} right ({low:.3f} to {high:.3f}, {version.with_feedback} with feedback, "
        f"coverage {version.coverage:.1%})"
    )
    if version.none_of_these:
        measured += f", {version.none_of_these} of them show none of its classes"
    if version.test_right_share is not None:
        measured += f", {version.test_right_share:.3f} on the test split"
    if version.estimated_share is not None and version.estimated_interval is not None:
        low, high = version.estimated_interval
        measured += (
            f", of all predictions an estimated {version.estimated_share:.3f} ({low:.3f} to {high:.3f}, by "
            f"{version.random_labels} labels of random ones)"
        )
    if worst := version.worst_slice:
        name = f"{SLICE_NAMES[worst.column]} {worst.value}"
        measured += (
            f", worst with {name}: {worst.right_share:.3f} of {worst.with_feedback}, "
            f"{worst.rest_share:.3f} of the others (p {worst.adjusted_p_value:.2g}, corrected for "
            f"{len(version.slices)} slices)"
        )
    verdict = version.verdict
    if verdict == "insufficient feedback":
        verdict += f" (at least {min_feedback} are needed)"
    elif version.p_value is not None:
        verdict += f" (p {version.p_value:.2g})"
    return f"{version.model_version}: {measured}: {verdict}."
