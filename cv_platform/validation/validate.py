"""Validates one dataset version: `validate_dataset` runs the checks that the config asks for and writes the report."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from cv_platform.config import ClassifierType, ValidateConfig
from cv_platform.datasets.manifest import read_manifest
from cv_platform.files import exclusive, whole_directory
from cv_platform.records import CheckOutcome, DatasetVersion, ValidationVerdict
from cv_platform.validation.checks import (
    check_class_coverage,
    check_conflicting_labels,
    check_constant_images,
    check_damaged_images,
    check_duplicates,
    check_label_drift,
    check_narrow_range,
    check_property_drift,
    check_train_test_leakage,
    check_unreadable_images,
)
from cv_platform.validation.deepchecks_suites import REPORT_NAMES, check_deepchecks_suites
from cv_platform.validation.label_issues import check_label_issues
from cv_platform.validation.report import render_report
from cv_platform.validation.sample import ImageSample, read_sample
from cv_platform.validation.verdict import CHECK_NAMES

logger = logging.getLogger(__name__)


def validate_dataset(
    version: DatasetVersion,
    config: ValidateConfig,
    *,
    class_names: Sequence[str],
    classifier_type: ClassifierType,
    home: Path,
) -> ValidationVerdict:
    """Runs the checks and writes report.html, verdict.json and Deepchecks' pages below `home/validation/<ds_name>/`.

    The folder is `<md5>-<settings>`: experiments on one dataset keep their reports apart, unless they ask for the same.

    Args:
        version: what to validate; only read.
        config: limits and severities; a check whose severity is off does not run.
        class_names: the model's classes.
        classifier_type: how labels are to be read.
        home: `Settings.home`.

    Returns:
        The verdict. A failed check is in it, never an exception.
    """
    started, provenance = time.monotonic(), version.provenance
    manifest = read_manifest(version.manifest_path).reset_index(drop=True)
    sample = read_sample(manifest, version.directory)
    problems = _problems(manifest, sample)
    readable = manifest.loc[~manifest["path"].isin(list(problems))]
    # The manifest's name stands for the splits, which follow from the config too.
    settings = (version.manifest, config.model_dump_json(), *class_names, classifier_type)
    fingerprint = hashlib.sha256("\n".join(settings).encode()).hexdigest()[:12]
    target = home / "validation" / provenance.ds_name / f"{provenance.dvc_md5}-{fingerprint}"
    with exclusive(target.with_name(f".{target.name}.lock")), whole_directory(target) as directory:
        checks: dict[str, Callable[[], CheckOutcome]] = {
            "unreadable_images": lambda: check_unreadable_images(len(manifest), problems, config),
            "damaged_images": lambda: check_damaged_images(readable, config),
            "constant_images": lambda: check_constant_images(readable, config),
            "narrow_range": lambda: check_narrow_range(readable, config),
            "class_coverage": lambda: check_class_coverage(readable, class_names, classifier_type, config),
            "train_test_leakage": lambda: check_train_test_leakage(readable, config),
            "conflicting_labels": lambda: check_conflicting_labels(readable, config),
            "duplicates": lambda: check_duplicates(readable, config),
            "label_drift": lambda: check_label_drift(readable, class_names, classifier_type, config),
            "property_drift": lambda: check_property_drift(sample, config),
            "label_issues": lambda: check_label_issues(sample, class_names, classifier_type, config),
            "deepchecks_suites": lambda: check_deepchecks_suites(
                sample, class_names, classifier_type, config, directory
            ),
        }
        outcomes = tuple(checks[name]() for name in CHECK_NAMES if getattr(config, name) != "off")
        verdict = ValidationVerdict(
            dvc_md5=provenance.dvc_md5,
            manifest=version.manifest,
            passed=all(o.passed or o.severity != "error" for o in outcomes),
            outcomes=outcomes,
            quarantined=tuple(sorted(problems)),
            directory=target,
        )
        page = render_report(
            title=f"Validation of {provenance}",
            facts=[
                ("DVC md5", provenance.dvc_md5),
                ("git commit", version.git_commit),
                ("images", f"{len(manifest)}, of which {len(readable)} readable"),
                ("pixels looked at", sample.description),
                ("classes", ", ".join(class_names)),
                ("labels", classifier_type),
            ],
            passed=verdict.passed,
            outcomes=outcomes,
            quarantined=verdict.quarantined,
            deepchecks_pages={suite: page for suite, page in REPORT_NAMES.items() if (directory / page).exists()},
        )
        (directory / "report.html").write_text(page, encoding="utf-8")
        (directory / "verdict.json").write_text(verdict.local_json(), encoding="utf-8")
    for failed in verdict.failed:
        logger.warning("%s (%s): %s", failed.name, failed.severity, failed.summary)
    logger.info("validated %s in %.1f s: %s", provenance, time.monotonic() - started, _word(verdict))
    return verdict


def _problems(manifest: pd.DataFrame, sample: ImageSample) -> dict[str, str]:
    """Joins the images that the manifest calls unreadable with those that did not decode here."""
    unreadable = manifest.loc[~manifest["is_readable"].astype(bool)]
    listed = {
        str(path): str(problem) if pd.notna(problem) else "unreadable"
        for path, problem in zip(unreadable["path"], unreadable["problem"], strict=True)
    }
    return {**listed, **sample.problems}


def _word(verdict: ValidationVerdict) -> str:
    return "passed" if verdict.passed else "failed"
