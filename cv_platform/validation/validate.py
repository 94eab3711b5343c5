"""Validates one dataset version: `validate_dataset` runs the checks that the config asks for and writes the report."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cv_platform.config import ClassifierType, ValidateConfig
from cv_platform.datasets.embeddings import read_embeddings
from cv_platform.datasets.manifest import read_manifest, read_thumbnails
from cv_platform.files import exclusive, whole_directory
from cv_platform.pages import render
from cv_platform.records import DatasetVersion, Embeddings, ValidationVerdict
from cv_platform.validation import label_review, quarantine_page
from cv_platform.validation.checks import Subject, all_checks
from cv_platform.validation.checks.deepchecks_suites import REPORT_NAMES
from cv_platform.validation.sample import ImageSample, read_sample
from cv_platform.validation.verdict import CHECK_NAMES

logger = logging.getLogger(__name__)

PAGES = {
    "Review the labels that are likely wrong": label_review.PAGE,
    "Look at the images that take no part": quarantine_page.PAGE,
}
"""That checks leave beside the report."""


def validate_dataset(
    version: DatasetVersion,
    config: ValidateConfig,
    *,
    class_names: Sequence[str],
    classifier_type: ClassifierType,
    home: Path,
    embeddings: Embeddings,
) -> ValidationVerdict:
    """Runs the checks and writes report.html, verdict.json and Deepchecks' pages below `home/validation/<ds_name>/`.

    The folder is `<md5>-<settings>`: experiments on one dataset keep their reports apart, unless they ask for the same.

    Args:
        version: what to validate; only read.
        config: limits and severities; a check whose severity is off does not run.
        class_names: the model's classes.
        classifier_type: how labels are to be read.
        home: `Settings.home`.
        embeddings: of this version: what images are compared by.

    Returns:
        The verdict. A failed check is in it, never an exception.

    Raises:
        DatasetError: the embeddings are of another version, or gone.
    """
    started, provenance = time.monotonic(), version.provenance
    manifest = read_manifest(version.manifest_path).reset_index(drop=True)
    vectors = read_embeddings(embeddings, version.manifest, manifest["path"].tolist())
    has_vector = ~np.isnan(vectors[:, 0])
    sample = read_sample(manifest.loc[has_vector], version.directory, vectors[has_vector])
    manifest = _judged_again(manifest, has_vector, sample)
    is_used = (manifest["status"] == "used").to_numpy()
    # The manifest's name stands for the splits, which follow from the config too.
    settings = (version.manifest, config.model_dump_json(), embeddings.content_version(), *class_names, classifier_type)
    fingerprint = hashlib.sha256("\n".join(settings).encode()).hexdigest()[:12]
    target = home / "validation" / provenance.ds_name / f"{provenance.dvc_md5}-{fingerprint}"
    with exclusive(target.with_name(f".{target.name}.lock")), whole_directory(target) as directory:
        subject = Subject(
            manifest.loc[is_used].reset_index(drop=True),
            manifest.loc[~is_used].reset_index(drop=True),
            sample,
            class_names,
            classifier_type,
            config,
            directory,
            version.directory,
            str(provenance),
            read_thumbnails(version.manifest_path)[is_used],
            vectors[is_used],
        )
        checks = all_checks()
        outcomes = tuple(checks[name].run(subject) for name in CHECK_NAMES if getattr(config, name) != "off")
        verdict = ValidationVerdict(
            dvc_md5=provenance.dvc_md5,
            manifest=version.manifest,
            passed=all(o.passed or o.severity != "error" for o in outcomes),
            outcomes=outcomes,
            quarantined=tuple(sorted(subject.quarantined["path"])),
            directory=target,
        )
        page = render(
            "validation/report.html",
            title=f"Validation of {provenance}",
            facts=[
                ("DVC md5", provenance.dvc_md5),
                ("git commit", version.git_commit),
                ("images", f"{len(manifest)}, of which {len(subject.manifest)} take part"),
                ("pixels looked at", sample.description),
                ("classes", ", ".join(class_names)),
                ("labels", classifier_type),
            ],
            verdict=verdict,
            pages={title: page for title, page in PAGES.items() if (directory / page).exists()},
            pictures=[path.name for path in sorted(directory.glob("*.png"))],
            deepchecks_pages={suite: page for suite, page in REPORT_NAMES.items() if (directory / page).exists()},
        )
        (directory / "report.html").write_text(page, encoding="utf-8")
        (directory / "verdict.json").write_text(verdict.local_json(), encoding="utf-8")
    for failed in verdict.failed:
        logger.warning("%s (%s): %s", failed.name, failed.severity, failed.summary)
    logger.info("validated %s in %.1f s: %s", provenance, time.monotonic() - started, _word(verdict))
    return verdict


def _judged_again(manifest: pd.DataFrame, has_vector: NDArray[np.bool_], sample: ImageSample) -> pd.DataFrame:
    """Returns the manifest with the images quarantined, too, that did not decode since it was made."""
    lost = manifest.loc[(manifest["status"] == "used") & ~has_vector, "path"]
    problems = {**dict.fromkeys(lost, "it did not decode when it was embedded"), **sample.problems}
    rows = manifest["path"].isin(list(problems))
    if bool(rows.any()):
        said = [problems[path] for path in manifest.loc[rows, "path"]]
        manifest.loc[rows, ["status", "split", "is_readable"]] = ["quarantined", None, False]
        manifest.loc[rows, "problem"], manifest.loc[rows, "reason"] = said, [f"unreadable: {text}" for text in said]
    return manifest


def _word(verdict: ValidationVerdict) -> str:
    return "passed" if verdict.passed else "failed"
