"""The checks of a dataset version, by what they look at; a check is found by its class, wherever in here it lies.

Ours are exact where Deepchecks' judge a sample: they look at every row, name files by their content, and take account
of how large a split is. What Deepchecks does besides is `deepchecks_suites`.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cv_platform.config import ClassifierType, ValidateConfig
from cv_platform.datasets.near_copies import NearCopies, find_near_copies
from cv_platform.records import CheckOutcome
from cv_platform.validation.sample import ImageSample
from cv_platform.validation.verdict import MAX_OFFENDERS, SEVERITY_FIELDS


@dataclass(frozen=True)
class Subject:
    """What a check may look at.

    Attributes:
        manifest: of `datasets.manifest.read_manifest` the images that are used.
        quarantined: the others, with status and reason.
        sample: decoded pixels.
        class_names: the model's classes.
        classifier_type: how labels are to be read.
        config: limits and severities.
        directory: where a check may leave pages and pictures for the report.
        root: what the manifest's paths are relative to.
        version: the dataset version's name, for pages.
        thumbnails: `(N, 32, 32)` uint8 of the manifest's rows, see `datasets.near_copies`.
        vectors: `(N, features)` float16 of the manifest's rows, of the pretrained encoder.
        sample_bits: `model.sample_bits`, by which files are decoded.
    """

    manifest: pd.DataFrame
    quarantined: pd.DataFrame
    sample: ImageSample
    class_names: Sequence[str]
    classifier_type: ClassifierType
    config: ValidateConfig
    directory: Path
    root: Path
    version: str
    thumbnails: NDArray[np.uint8]
    vectors: NDArray[np.float16]
    sample_bits: int | None = None

    @functools.cached_property
    def near_copies(self) -> NearCopies:
        """Returns which distinct images (sha256), in the order in which the manifest has them, show the same."""
        first = ~self.manifest["sha256"].duplicated().to_numpy()
        return find_near_copies(self.thumbnails[first], self.vectors[first])

    def split(self, name: str) -> pd.DataFrame:
        """Returns the manifest's rows of a split."""
        return self.manifest.loc[self.manifest["split"] == name]


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        summary: with its numbers; starts with 'Not judged' where there was nothing to judge.
        value: what was measured; none where nothing was.
        offenders: at fault, worst first; `Check.run` cuts them to `MAX_OFFENDERS`.
        passed: None: whether `value` is at most the limit, or is missing.
    """

    summary: str
    value: float | None = None
    offenders: Sequence[str] = ()
    passed: bool | None = None


class Check(ABC):
    """A check of a dataset version; it raises nothing about the data.

    How to add one: a subclass in a module of this folder, and in `ValidateConfig` the fields that users set: its
    severity, by whose name and place the check runs, and its limit, if it has one. Report, verdict and the Dagster
    check follow from them.

    Attributes:
        name: of the severity's field.
        limit: name of the limit's field; None: the limit is 0, as for counts of failures.
    """

    name: str
    limit: ClassVar[str | None] = None

    @classmethod
    def variants(cls) -> list[Check]:
        """Returns the checks that the class stands for: one, or none of a base class."""
        return [cls()] if hasattr(cls, "name") else []

    @abstractmethod
    def look(self, subject: Subject) -> Finding:
        """Returns what the check finds in `subject`."""

    def run(self, subject: Subject) -> CheckOutcome:
        """Returns the check's outcome: what it found, held against its limit."""
        found = self.look(subject)
        limit = float(getattr(subject.config, self.limit)) if self.limit else 0.0
        passed = found.value is None or found.value <= limit
        return CheckOutcome(
            name=self.name,
            passed=passed if found.passed is None else found.passed,
            severity="error" if getattr(subject.config, SEVERITY_FIELDS[self.name]) == "error" else "warn",
            summary=found.summary,
            value=found.value,
            limit=limit,
            offenders=tuple(found.offenders)[:MAX_OFFENDERS],
        )


def all_checks() -> dict[str, Check]:
    """Returns every check by its name."""
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        importlib.import_module(module.name)
    return {check.name: check for kind in _below(Check) for check in kind.variants()}


def share(part: int, whole: int) -> float:
    """Returns a fraction, 0 of nothing."""
    return part / whole if whole else 0.0


def _below(kind: type[Check]) -> list[type[Check]]:
    return [found for child in kind.__subclasses__() for found in (child, *_below(child))]
