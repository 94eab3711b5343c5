"""The drift report as a value: what is stored as JSON, in the database and in Dagster."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from cv_platform.drift.accuracy import AccuracyEstimate
from cv_platform.drift.localisation import ClassMovement, EffectSizes
from cv_platform.drift.sequential import StreamVerdict

Verdict = Literal["drift", "no drift", "insufficient data"]


class DriftReport(BaseModel):
    """The verdict on one window of requests of one model version, and what explains it.

    Attributes:
        report_id: UUID of experiment, model, version and window: a report of the same window has the same id.
        experiment, model_name, model_version: whose requests.
        window_start_utc, window_end_utc: half-open bounds.
        requests: answered requests in the window.
        rows: of them, those that were judged.
        unusable_rows: read but left out, because an embedding is not finite or of another width.
        is_truncated: only the latest `monitor.max_samples` were read.
        reference_rows: rows of the reference.
        verdict: "drift" when an adjusted p-value is at most `alpha`; "insufficient data" below `monitor.min_samples`.
        alpha: family-wise false-alarm rate.
        p_values, adjusted_p_values, statistics: per detector, see `drift.verdict`; empty without a verdict.
        drifted_detectors: those that fired, clearest first.
        effects: how large the difference is.
        classes: every class, the most significant movement first.
        moved_classes: of them, those that moved: class, ks_distance, reference_share, current_share, adjusted_p_value.
        top_images: images that drive the difference, strongest first: prediction_id, created_on, predicted_class,
            score, image_sha256.
        accuracy_estimate: without labels; not reliable while drift fires.
        feedback_rows: judged requests whose true class somebody stated.
        feedback_accuracy: of those; multi-label: mean accuracy of the single decisions.
        stream: of the sequential test over the window's requests in order of time; a hint, which never makes the
            verdict. None without any request.
        report_url: of the HTML page in central storage.
        evidently_run_id: run in the experiment's Evidently project.
        problems: what could not be done or shown, in sentences.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    report_id: str
    experiment: str
    model_name: str
    model_version: str
    window_start_utc: datetime
    window_end_utc: datetime
    requests: int
    rows: int
    unusable_rows: int
    is_truncated: bool
    reference_rows: int
    verdict: Verdict
    alpha: float
    min_samples: int
    p_values: dict[str, float] = {}
    adjusted_p_values: dict[str, float] = {}
    statistics: dict[str, float] = {}
    drifted_detectors: tuple[str, ...] = ()
    effects: EffectSizes | None = None
    classes: tuple[ClassMovement, ...] = ()
    moved_classes: list[dict[str, Any]] = []
    top_images: list[dict[str, Any]] = []
    accuracy_estimate: AccuracyEstimate | None = None
    feedback_rows: int = 0
    feedback_accuracy: float | None = None
    stream: StreamVerdict | None = None
    report_url: str = ""
    evidently_run_id: str | None = None
    problems: tuple[str, ...] = ()

    def summary(self) -> str:
        """Returns the report in a few sentences, for alerts, logs and check descriptions."""
        window = f"{self.window_start_utc:%Y-%m-%d %H:%M} to {self.window_end_utc:%Y-%m-%d %H:%M} UTC"
        head = f"{self.verdict} in {self.rows} requests of {self.model_name} {self.model_version}, {window}."
        parts = [head[0].upper() + head[1:]]
        if self.verdict == "insufficient data":
            parts.append(f"At least {self.min_samples} usable requests are needed; the window has {self.rows}.")
        if self.drifted_detectors:
            fired = ", ".join(f"{name} (p {self.adjusted_p_values[name]:.2g})" for name in self.drifted_detectors)
            parts.append(f"Fired: {fired}.")
        if self.verdict == "drift" and self.effects is not None:
            parts.extend(_effects(self.effects))
            if self.moved_classes:
                moved = ", ".join(str(row["class"]) for row in self.moved_classes[:5])
                parts.append(f"Classes that moved: {moved}.")
        if self.stream is not None and not self.is_agreed:
            parts.append(self.stream_note())
        if self.feedback_accuracy is not None:
            parts.append(f"Accuracy on {self.feedback_rows} requests with feedback: {self.feedback_accuracy:.3f}.")
        if self.report_url:
            parts.append(f"Report: {self.report_url}")
        return " ".join(parts)

    @property
    def is_agreed(self) -> bool:
        """Whether the sequential test says the same as the verdict; without a verdict, whether it raises no alarm."""
        return self.stream is not None and self.stream.state == ("alarm" if self.verdict == "drift" else "no alarm")

    def stream_note(self) -> str:
        """Returns what the sequential test says, which verdict decides, and why the two differ where they do."""
        stream = self.stream
        if stream is None:
            return "The sequential test had no request to look at."
        numbers = f"e-value {stream.e_value:.3g}, alarm from {1 / stream.alpha:.3g}"
        if stream.state == "not judged: requests come in blocks":
            note = (
                "The sequential test is not judged: requests come in blocks of one predicted class "
                f"(runs test, p {stream.order_p_value:.2g}), an order that it would take for drift."
            )
            decides = f" The verdict, {self.verdict}, does not depend on the order."
            return note if self.verdict == "insufficient data" else note + decides
        if self.verdict == "insufficient data":
            says = "alarms: look at the latest requests" if stream.state == "alarm" else "does not alarm"
            return f"The sequential test {says} ({numbers})."
        if self.is_agreed:
            return f"The sequential test agrees ({numbers})."
        if stream.state == "alarm":
            return (
                f"The sequential test alarms ({numbers}). The verdict, no drift, decides: it compares the window as a "
                "whole. The sequential test also sees what has changed within the window, such as in its last hours, "
                f"and alarms by chance in up to {stream.alpha:.0%} of the windows without a change. "
                "To see which it is, judge a shorter window that ends now (monitor.window_days)."
            )
        return (
            f"The sequential test does not alarm ({numbers}). The verdict, drift, decides: it also compares the "
            "probabilities of all classes and the features, where the sequential test sees pixel statistics and "
            "confidences alone, and needs more requests."
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
