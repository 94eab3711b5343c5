"""Validates one dataset version: `validate_dataset` runs the checks that the config asks for and writes the report."""

from __future__ import annotations

import hashlib
import json
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
from cv_platform.files import exclusive, whole_directory, write_file
from cv_platform.pages import render
from cv_platform.records import DatasetVersion, Embeddings, ValidationVerdict
from cv_platform.validation import label_review, quarantine_page
from cv_platform.validation.checks import Subject, all_checks
from cv_platform.validation.checks.deepchecks_suites import REPORT_NAMES
from cv_platform.validation.sample import ImageSample, read_sample
from cv_platform.validation.verdict import SEVERITY_FIELDS

logger = logging.getLogger(__name__)

PAGES = {
    "Review the labels that are likely wrong": label_review.PAGE,
    "Look at the images that take no part": quarantine_page.PAGE,
}
"""That checks leave beside the report."""
_RECIPE = "recipe.txt"


def validate_dataset(
    version: DatasetVersion,
    config: ValidateConfig,
    *,
    class_names: Sequence[str],
    classifier_type: ClassifierType,
    home: Path,
    embeddings: Embeddings,
    recipe: str = "",
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
        recipe: stands for the code that judges; a verdict that the same code has left is not made again. Empty: it is.

    Returns:
        The verdict. A failed check is in it, never an exception.

    Raises:
        DatasetError: the embeddings are of another version, or gone.
    """
    started, provenance = time.monotonic(), version.provenance
    # The manifest's name stands for the splits, which follow from the config too.
    settings = (version.manifest, config.model_dump_json(), embeddings.content_version(), *class_names, classifier_type)
    fingerprint = hashlib.sha256("\n".join(settings).encode()).hexdigest()[:12]
    target = home / "validation" / provenance.ds_name / f"{provenance.dvc_md5}-{fingerprint}"
    with exclusive(target.with_name(f".{target.name}.lock")):
        if recipe and (kept := _kept(target, recipe)):
            logger.info("%s: validated before, by the same code: %s", provenance, _word(kept))
            return kept
        with whole_directory(target) as directory:
            subject, described = _read(version, config, class_names, classifier_type, embeddings, directory)
            checks = all_checks()
            asked = (name for name, field in SEVERITY_FIELDS.items() if getattr(config, field) != "off")
            outcomes = tuple(checks[name].run(subject) for name in asked)
            verdict = ValidationVerdict(
                dvc_md5=provenance.dvc_md5,
                manifest=version.manifest,
                passed=all(o.passed or o.severity != "error" for o in outcomes),
                outcomes=outcomes,
                quarantined=tuple(sorted(subject.quarantined["path"])),
                directory=target,
            )
            write_file(directory / "report.html", _page(verdict, version, subject, described))
            write_file(directory / "verdict.json", verdict.local_json())
            if recipe:
                write_file(directory / _RECIPE, recipe)
    for failed in verdict.failed:
        logger.warning("%s (%s): %s", failed.name, failed.severity, failed.summary)
    logger.info("validated %s in %.1f s: %s", provenance, time.monotonic() - started, _word(verdict))
    return verdict


def _kept(target: Path, recipe: str) -> ValidationVerdict | None:
    """Returns the verdict in a folder, if that code has made it."""
    try:
        if (target / _RECIPE).read_text(encoding="utf-8") != recipe:
            return None
        content = json.loads((target / "verdict.json").read_bytes())
        return ValidationVerdict.model_validate({**content, "directory": target})
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as err:
        logger.warning("The verdict in %s is unreadable (%s); validating again", target, err)
        return None


def _read(
    version: DatasetVersion,
    config: ValidateConfig,
    class_names: Sequence[str],
    classifier_type: ClassifierType,
    embeddings: Embeddings,
    directory: Path,
) -> tuple[Subject, str]:
    """Returns what the checks look at, and which pixels those are."""
    manifest = read_manifest(version.manifest_path).reset_index(drop=True)
    vectors = read_embeddings(embeddings, version.manifest, manifest["path"].tolist())
    has_vector = ~np.isnan(vectors[:, 0])
    bits = version.sample_bits
    sample = read_sample(manifest.loc[has_vector], version.directory, vectors[has_vector], sample_bits=bits)
    manifest = _judged_again(manifest, has_vector, sample)
    is_used = (manifest["status"] == "used").to_numpy()
    subject = Subject(
        manifest.loc[is_used].reset_index(drop=True),
        manifest.loc[~is_used].reset_index(drop=True),
        sample,
        class_names,
        classifier_type,
        config,
        directory,
        version.directory,
        str(version.provenance),
        read_thumbnails(version.manifest_path)[is_used],
        vectors[is_used],
        bits,
    )
    return subject, sample.description


def _page(verdict: ValidationVerdict, version: DatasetVersion, subject: Subject, pixels: str) -> str:
    images, directory = len(subject.manifest) + len(subject.quarantined), subject.directory
    return render(
        "validation/report.html",
        title=f"Validation of {version.provenance}",
        facts=[
            ("DVC md5", verdict.dvc_md5),
            ("git commit", version.git_commit),
            ("images", f"{images}, of which {len(subject.manifest)} take part"),
            ("pixels looked at", pixels),
            ("classes", ", ".join(subject.class_names)),
            ("labels", subject.classifier_type),
        ],
        verdict=verdict,
        pages={title: page for title, page in PAGES.items() if (directory / page).exists()},
        pictures=[path.name for path in sorted(directory.glob("*.png"))],
        deepchecks_pages={suite: page for suite, page in REPORT_NAMES.items() if (directory / page).exists()},
    )


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
