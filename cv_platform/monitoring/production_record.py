"""Production metrics as a value: what is stored as JSON and in Dagster."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from cv_platform.predictions import ClassifierType

Verdict = Literal["worse than on the test split", "as on the test split", "insufficient feedback", "not comparable"]


class VersionMetrics(BaseModel):
    """One model version's predictions of the window, and what was said about them.

    Attributes:
        model_version, classifier_type: which version, and what it answers.
        predictions: of the version in the window.
        with_feedback: of them, those whose true class somebody stated.
        coverage: the share of them.
        none_of_these: of those with feedback, the ones whose image shows none of the model's classes. A multi-class
            prediction of such an image is wrong, and has no place in `confusion`.
        accuracy: as in an evaluation: the share of right predictions; multi-label: the mean over the labels of their
            accuracies. None without feedback.
        right_share: the share of predictions that are right as a whole: accuracy, or for multi-label exact match.
        interval: Wilson's interval of `right_share`, at level 1 − alpha.
        test_right_share: of the test split; None where the version's bundle does not say it.
        test_images: how many images that was measured on.
        p_value: one-sided Fisher's exact test of both shares, that of production being the lower one.
        verdict: see `ProductionMetrics.alpha` and `min_feedback`.
        class_names: in the order of `confusion`.
        per_class: class, feedback (predictions whose true class it is), predicted (predictions of it, with feedback),
            precision, recall, f1; multi-label: accuracy too.
        confusion: as in an evaluation: multi-class row the true class, column the predicted one; multi-label a row per
            class: true negatives, false positives, false negatives, true positives.
        sources: how many of the statements that count came from where.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model_version: str
    classifier_type: ClassifierType
    predictions: int
    with_feedback: int
    coverage: float
    none_of_these: int = 0
    accuracy: float | None = None
    right_share: float | None = None
    interval: tuple[float, float] | None = None
    test_right_share: float | None = None
    test_images: int | None = None
    p_value: float | None = None
    verdict: Verdict = "insufficient feedback"
    class_names: tuple[str, ...] = ()
    per_class: list[dict[str, Any]] = []
    confusion: list[list[int]] = []
    sources: dict[str, int] = {}

    def row(self) -> dict[str, Any]:
        """Returns the version's line in a table."""
        low, high = self.interval or (None, None)
        return {
            "version": self.model_version,
            "verdict": self.verdict,
            "predictions": self.predictions,
            "with_feedback": self.with_feedback,
            "coverage": self.coverage,
            "none_of_these": self.none_of_these,
            "accuracy": self.accuracy,
            "right_share": self.right_share,
            "low": low,
            "high": high,
            "test_right_share": self.test_right_share,
            "p_value": self.p_value,
            "sources": ", ".join(f"{name} {count}" for name, count in sorted(self.sources.items())),
        }


class ProductionMetrics(BaseModel):
    """How a model does in production, as far as feedback tells.

    Attributes:
        experiment, model_name: whose predictions.
        window_start_utc, window_end_utc: half-open bounds on the predictions' time.
        predictions, with_feedback: over all versions.
        alpha: a version is called worse when its p-value times the number of judged versions is at most this.
        min_feedback: a version with less feedback is not judged.
        record_path: this record as JSON.
        versions: the newest first.
        plots: PNG files by name; none without feedback.
        problems: what could not be counted or compared, in sentences.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    experiment: str
    model_name: str
    window_start_utc: datetime
    window_end_utc: datetime
    predictions: int
    with_feedback: int
    alpha: float
    min_feedback: int
    record_path: Path
    versions: tuple[VersionMetrics, ...] = ()
    plots: dict[str, Path] = {}
    problems: tuple[str, ...] = ()

    @property
    def worse_versions(self) -> tuple[VersionMetrics, ...]:
        """The versions that are significantly worse than on their test split."""
        return tuple(version for version in self.versions if version.verdict == "worse than on the test split")

    def figures(self) -> dict[str, float]:
        """Returns the numbers of the newest version with feedback, for MLflow."""
        version = next((version for version in self.versions if version.with_feedback), None)
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
        }
        return {name: value for name, value in figures.items() if value is not None}

    def summary(self) -> str:
        """Returns the figures in a few sentences."""
        window = f"{self.window_start_utc:%Y-%m-%d %H:%M} to {self.window_end_utc:%Y-%m-%d %H:%M} UTC"
        head = f"{self.with_feedback} of {self.predictions} predictions of {self.model_name} have feedback, {window}."
        if not self.with_feedback:
            return f"Insufficient feedback: {head} People give it on the web page, or with POST /feedback/…."
        return " ".join([head, *(self._sentence(version) for version in self.versions if version.with_feedback)])

    def _sentence(self, version: VersionMetrics) -> str:
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
        verdict = version.verdict
        if verdict == "insufficient feedback":
            verdict += f" (at least {self.min_feedback} are needed)"
        elif version.p_value is not None:
            verdict += f" (p {version.p_value:.2g})"
        return f"{version.model_version}: {measured}: {verdict}."
