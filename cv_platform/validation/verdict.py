"""The checks by name, and the guard of those who need a verdict. Light to import: the code location does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from cv_platform.config import Severity, ValidateConfig
from cv_platform.errors import VerdictError
from cv_platform.records import ValidationVerdict

DEEPCHECKS: Mapping[str, str] = {
    "deepchecks_is_single_value": "IsSingleValue",
    "deepchecks_feature_label_correlation": "FeatureLabelCorrelation",
    "deepchecks_datasets_size_comparison": "DatasetsSizeComparison",
    "deepchecks_feature_label_correlation_change": "FeatureLabelCorrelationChange",
    "deepchecks_multivariate_drift": "MultivariateDrift",
}
"""Deepchecks' checks that run, each a check of its own here: its name, and that of Deepchecks' class."""
_SUITES = "deepchecks_suites"
SEVERITY_FIELDS: Mapping[str, str] = {
    check: name
    for name, field in ValidateConfig.model_fields.items()
    if field.annotation == get_args(Severity)[0]
    for check in (DEEPCHECKS if name == _SUITES else (name,))
}
"""Of each check the field of `ValidateConfig` that has its severity: its own, or that of both of Deepchecks' suites."""
CHECK_NAMES: tuple[str, ...] = tuple(SEVERITY_FIELDS)
"""All checks, in the order of the report: that of the fields."""

MAX_OFFENDERS = 100
"""Offenders that an outcome names; its summary always has the full count."""


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
