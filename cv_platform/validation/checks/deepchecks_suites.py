"""Deepchecks' tabular suites `data_integrity` and `train_test_validation` over one row per image.

A row is an image: its pixel statistics, its leading principal components, its label, and its sha256 as the index. That
covers what Deepchecks' vision suites look at without their PyTorch. The library (AGPL-3.0) is used unchanged.

Checks of the suites that are left out, since on these rows they cannot find anything, or always find something:

* SpecialCharacters, MixedNulls, MixedDataTypes, StringMismatch, StringLengthOutOfBounds, StringMismatchComparison,
  NewCategoryTrainTest: every column is a number that we computed, never null, never text.
* DateTrainTestLeakageDuplicates, DateTrainTestLeakageOverlap: images have no date.
* FeatureFeatureCorrelation: statistics and components of the same pixels correlate by construction.
* IdentifierLabelCorrelation: the identifier is the content's hash; it "predicts" the label of a repeated image.
* DataDuplicates, ConflictingLabels, IndexTrainTestLeakage, TrainTestSamplesMix, NewLabelTrainTest, LabelDrift and
  FeatureDrift: our own `duplicates`, `conflicting_labels`, `train_test_leakage`, `class_coverage`, `label_drift` and
  `property_drift` look at every row, where these see the sample; they name the files, and take account of the size.
* OutlierSampleDetection: the suite gives it no condition, so that it fails nothing; our own `outliers` judges every
  image, by what the encoder sees.

That leaves, of data_integrity: IsSingleValue, FeatureLabelCorrelation; of
train_test_validation: DatasetsSizeComparison, FeatureLabelCorrelationChange, MultivariateDrift. Each is a check of its
own (`verdict.DEEPCHECKS`), and all of them have the severity `validate.deepchecks_suites`.

Two more rules keep the verdict honest:

* MultivariateDrift runs from 200 images in train and in test on. Its threshold takes no account of the sample size;
  below it, two halves of one population fail it.
* What FeatureLabelCorrelation and FeatureLabelCorrelationChange find is told as a warning and fails nothing: that a
  component of the pixels predicts the label is a shortcut to look at, not a leak. Pixels are there to predict it.

A multi-label image has no single label: its row has a column per class instead, of 0, 1 or `unknown` (so the drift
checks cover the labels), and the checks that need a label count as not applicable.
"""

from __future__ import annotations

import html
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from typing_extensions import override

from cv_platform.config import ClassifierType
from cv_platform.properties import PROPERTY_NAMES
from cv_platform.settings import prepare_process
from cv_platform.validation.checks import Check, Finding, Subject
from cv_platform.validation.sample import ImageSample
from cv_platform.validation.verdict import DEEPCHECKS

LEFT_OUT: tuple[str, ...] = (
    "SpecialCharacters",
    "MixedNulls",
    "MixedDataTypes",
    "StringMismatch",
    "StringLengthOutOfBounds",
    "FeatureFeatureCorrelation",
    "IdentifierLabelCorrelation",
    "NewCategoryTrainTest",
    "StringMismatchComparison",
    "DateTrainTestLeakageDuplicates",
    "DateTrainTestLeakageOverlap",
    "DataDuplicates",
    "ConflictingLabels",
    "IndexTrainTestLeakage",
    "TrainTestSamplesMix",
    "NewLabelTrainTest",
    "LabelDrift",
    "FeatureDrift",
    "OutlierSampleDetection",
)
MIN_IMAGES_FOR_DRIFT = 200
TOLD_ONLY: tuple[str, ...] = ("FeatureLabelCorrelation", "FeatureLabelCorrelationChange")
REPORT_NAMES: dict[str, str] = {
    "data_integrity": "deepchecks_data_integrity.html",
    "train_test_validation": "deepchecks_train_test_validation.html",
}
COMPONENT_COLUMNS = 8
MAX_LABEL_COLUMNS = 50
"""Multi-label: the most frequent classes get a column; each costs a drift test and a figure."""
_COLOUR = ("red_green", "blue_yellow", "saturation")
_LABEL, _HASH = "label", "sha256"


class _Suites:
    """Both suites over one subject: they run once for all checks that ask."""

    def __init__(self) -> None:
        self._of: tuple[Subject, dict[str, list[Any]]] | None = None

    def results(self, subject: Subject) -> dict[str, list[Any]]:
        """Returns what came of each of Deepchecks' checks, by its class; those that did not run are not there."""
        if self._of is None or self._of[0] is not subject:
            sample, found = subject.sample, dict[str, list[Any]]()
            table, categorical = image_table(sample, subject.class_names, subject.classifier_type)
            for result in _run_suites(table, categorical, sample, subject.directory):
                for check in result.results:
                    found.setdefault(type(check.check).__name__, []).append(check)
            self._of = subject, found
        return self._of[1]


class DeepchecksCheck(Check):
    """One of Deepchecks' checks; the pages of both suites (`REPORT_NAMES`), which need no network, are made with it.

    It fails when a condition of it fails, or when it breaks; warnings are only told. `value` is the number of failed
    conditions.
    """

    def __init__(self, name: str, kind: str, suites: _Suites) -> None:
        self.name = name
        self._kind, self._suites = kind, suites

    @override
    @classmethod
    def variants(cls) -> list[Check]:
        suites = _Suites()
        return [cls(name, kind, suites) for name, kind in DEEPCHECKS.items()]

    @override
    def look(self, subject: Subject) -> Finding:
        sample = subject.sample
        if not len(sample.rows):
            return Finding("Not judged: there are no readable images.")
        if found := self._suites.results(subject).get(self._kind):
            return _read_results(self._kind, found, sample.description)
        smallest = min(len(sample.positions(split)) for split in ("train", "test"))
        needed = f"it needs {MIN_IMAGES_FOR_DRIFT} images in train and in test, and one of them has {smallest}."
        return Finding(f"Not judged: {needed if smallest else 'train or test has no images (see class_coverage).'}")


def image_table(
    sample: ImageSample, class_names: Sequence[str], classifier_type: ClassifierType
) -> tuple[pd.DataFrame, list[str]]:
    """Builds the rows that Deepchecks sees.

    Returns:
        The table (index: sha256; a column `label` for multi-class) and the names of its categorical columns.
    """
    properties = pd.DataFrame(sample.properties.astype(np.float64), columns=pd.Index(PROPERTY_NAMES))
    if not properties[list(_COLOUR)].to_numpy().any():
        # Grey images have no colour: three constant columns would be reported as a fault of the data.
        properties = properties.drop(columns=list(_COLOUR))
    components = sample.components[:, :COMPONENT_COLUMNS].astype(np.float64)
    columns = [f"pixels_{i + 1}" for i in range(components.shape[1])]
    table = pd.concat([properties, pd.DataFrame(components, columns=pd.Index(columns))], axis=1)
    labels = [tuple(map(str, row)) for row in sample.rows["labels"]]
    categorical: list[str] = []
    if classifier_type == "multi-class":
        # Escaped, since Deepchecks writes values into its page as they are.
        table[_LABEL] = [html.escape(" | ".join(row)) for row in labels]
    else:
        counts = {name: sum(name in row for row in labels) for name in class_names}
        used = sorted((name for name in class_names if counts[name]), key=lambda name: -counts[name])
        for name in used[:MAX_LABEL_COLUMNS]:
            column = f"has {html.escape(name)}"
            values = [int(name in row) for row in labels]
            is_open = [name in row for row in sample.rows["unknown_labels"]]
            table[column] = (
                ["unknown" if unknown else str(value) for value, unknown in zip(values, is_open, strict=True)]
                if any(is_open)
                else values
            )
            categorical.append(column)
    table.index = pd.Index(sample.rows[_HASH].astype(str), name=_HASH)
    return table, categorical


def _run_suites(table: pd.DataFrame, categorical: list[str], sample: ImageSample, directory: Path) -> list[Any]:
    results: list[Any] = []
    with _quiet_deepchecks():
        from deepchecks.tabular import Dataset
        from deepchecks.tabular.suites import data_integrity, train_test_validation

        def dataset(rows: pd.DataFrame, *, indexed: bool) -> Any:
            labels: dict[str, Any] = {"label": _LABEL, "label_type": "multiclass"} if _LABEL in rows.columns else {}
            return Dataset(
                rows,
                **labels,
                features=[column for column in rows.columns if column not in {_LABEL, _HASH}],
                cat_features=categorical,
                set_index_from_dataframe_index=indexed,
            )

        # Repeated images stay rows where duplicates are looked for; an index may not repeat, so copies within a split
        # are one row where train and test are compared.
        runs: list[tuple[Any, str, list[Any]]] = [
            (data_integrity(), "data_integrity", [dataset(table.reset_index(), indexed=False)])
        ]
        if all(len(sample.positions(split)) for split in ("train", "test")):
            splits = [table.iloc[sample.positions(split)] for split in ("train", "test")]
            distinct = [dataset(rows.loc[~rows.index.duplicated()], indexed=True) for rows in splits]
            runs.append((train_test_validation(), "train_test_validation", distinct))
        smallest = min(len(sample.positions(split)) for split in ("train", "test"))
        left_out = LEFT_OUT if smallest >= MIN_IMAGES_FOR_DRIFT else (*LEFT_OUT, "MultivariateDrift")
        for suite, key, datasets in runs:
            for position, check in list(suite.checks.items()):
                if type(check).__name__ in left_out:
                    suite.remove(position)
            result = suite.run(*datasets)
            # Static HTML with the scripts inside: the widget form asks a CDN for parts of itself.
            result.save_as_html(
                str(directory / REPORT_NAMES[key]), as_widget=False, requirejs=True, connected=False, unique_id=key
            )
            results.append(result)
    return results


def _read_results(kind: str, results: Sequence[Any], looked_at: str) -> Finding:
    """Returns what one of Deepchecks' checks found: how many of its conditions failed, and which."""
    from deepchecks.core import CheckFailure, ConditionCategory
    from deepchecks.core.errors import DeepchecksBaseError

    conditions = 0
    failed: list[str] = []
    warned: list[str] = []
    for check in results:
        if isinstance(check, CheckFailure):
            if isinstance(check.exception, DeepchecksBaseError):
                return Finding(f"Not judged: {' '.join(str(check.exception).split())}")
            failed.append(f"broke with {type(check.exception).__name__}: {check.exception}")
            continue
        for condition in check.conditions_results:
            conditions += 1
            text = f"expected '{condition.name}'; {condition.details}"
            if condition.category == ConditionCategory.PASS:
                continue
            if condition.category == ConditionCategory.WARN or kind in TOLD_ONLY:
                warned.append(f"{text} (warning)")
            else:
                failed.append(text)
    words = f"{len(failed)} of {conditions} conditions failed, {len(warned)} warn, over {looked_at}."
    return Finding(words, float(len(failed)), [*failed, *warned])


@contextmanager
def _quiet_deepchecks() -> Iterator[None]:
    """Keeps Deepchecks 0.19 off the network, off the progress bar and in this process while the block runs."""
    # Read when the package is imported, which otherwise calls home and writes an id into its installation folder.
    prepare_process()
    with warnings.catch_warnings():
        # The package and what it calls (pkg_resources, pandas, scikit-learn, plotly) warn about its own code on every
        # run; nothing of it is about the data. To be removed with a release that is written for pandas 2.
        warnings.simplefilter("ignore")
        import joblib
        from deepchecks.utils.logger import get_verbosity, set_verbosity

        verbosity = get_verbosity()
        set_verbosity(logging.WARNING)  # Its progress bars are of level INFO.
        # MultivariateDrift asks for a process per core: starting them takes longer than its work.
        with joblib.parallel_config(backend="sequential"):
            try:
                yield
            finally:
                set_verbosity(verbosity)
