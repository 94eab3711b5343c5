"""What validation hands on: an outcome per check, and the verdict. Light to import: the code location does."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from cv_platform.errors import VerdictError

CHECK_NAMES: tuple[str, ...] = (
    "unreadable_images",
    "damaged_images",
    "constant_images",
    "narrow_range",
    "class_coverage",
    "train_test_leakage",
    "conflicting_labels",
    "duplicates",
    "label_drift",
    "property_drift",
    "label_issues",
    "deepchecks_suites",
)
"""In the order of the report; each is a severity field of `ValidateConfig`."""

MAX_OFFENDERS = 100
"""Offenders that an outcome names; its summary always has the full count."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class CheckOutcome(_Record):
    """What one check found."""

    name: str = Field(description="one of CHECK_NAMES")
    passed: bool
    severity: Literal["error", "warn"] = Field(description="a failed error blocks training, a failed warn only shows")
    summary: str = Field(
        description="the finding with its numbers; starts with 'Not judged' where there was nothing to judge"
    )
    value: float | None = Field(None, description="what was measured; none where nothing was")
    limit: float | None = Field(None, description="the limit from the config that `value` was held against")
    offenders: tuple[str, ...] = Field(
        (), description="images, classes or conditions at fault, worst first, at most 100"
    )

    def finding(self) -> str:
        """Returns the summary, and of a check that did not pass the limit that it was held against."""
        if self.passed or self.limit is None:
            return self.summary
        return f"{self.summary} The limit in `validate` is {self.limit:g}."


class ValidationVerdict(_Record):
    """What validation found in one dataset version."""

    dvc_md5: str
    manifest: str = Field(
        description="name of the manifest: it stands for the splits, which follow from the config too"
    )
    passed: bool = Field(description="no check of severity error failed")
    outcomes: tuple[CheckOutcome, ...] = Field(description="in the order of CHECK_NAMES; without those that are off")
    quarantined: tuple[str, ...] = Field(description="paths of unreadable images, which nothing downstream may use")
    report_path: Path

    @property
    def failed(self) -> tuple[CheckOutcome, ...]:
        """The outcomes that did not pass, of either severity."""
        return tuple(outcome for outcome in self.outcomes if not outcome.passed)


def require_verdict(
    verdict: ValidationVerdict, *, dvc_md5: str, manifest: str | None = None, must_pass: bool = True
) -> None:
    """Refuses to go on without a verdict about this very dataset version; across runs, where a check blocks nothing.

    Raises:
        VerdictError: the latest verdict is about another version or other splits, or (with `must_pass`) it failed.
    """
    if verdict.dvc_md5 != dvc_md5 or (manifest is not None and verdict.manifest != manifest):
        raise VerdictError(
            f"Expected a validation report of dataset version {dvc_md5} ({manifest or 'any splits'}). "
            f"Received: one of {verdict.dvc_md5} ({verdict.manifest}). Materialise validation_report, then this asset."
        )
    if must_pass and not verdict.passed:
        failed = "; ".join(f"{o.name}: {o.finding()}" for o in verdict.failed if o.severity == "error")
        raise VerdictError(
            f"Expected a dataset version that passes its blocking checks. Received: {dvc_md5} failed: {failed}. "
            f"Mend the dataset under a new tag, or change the limits in `validate`. Report: {verdict.report_path}"
        )
