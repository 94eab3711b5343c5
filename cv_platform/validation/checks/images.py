"""Checks of single images: what does not decode, and what the manifest remarks about those that do."""

from __future__ import annotations

import pandas as pd
from typing_extensions import override

from cv_platform.validation.checks import Check, Finding, Subject, share


class UnreadableImages(Check):
    """The share of images that do not decode."""

    name, limit = "unreadable_images", "max_unreadable_fraction"

    @override
    def look(self, subject: Subject) -> Finding:
        problems = subject.problems
        total = len(subject.manifest) + len(problems)
        return Finding(
            f"{len(problems)} of {total} images do not decode; {subject.config.max_unreadable_fraction:.1%} may "
            "(validate.max_unreadable_fraction), and nothing downstream uses them."
            + (f" The first: {', '.join(sorted(problems)[:3])}." if problems else ""),
            share(len(problems), total),
            [f"{path}: {problem}" for path, problem in sorted(problems.items())],
        )


class _Remarks(Check):
    """The share of images with a remark in one of the manifest's columns."""

    column: str
    words: str

    @override
    def look(self, subject: Subject) -> Finding:
        rows = zip(subject.manifest["path"], subject.manifest[self.column], strict=True)
        remarked = [f"{path}: {remark}" for path, remark in rows if pd.notna(remark)]
        count = len(subject.manifest)
        return Finding(f"{len(remarked)} of {count} images {self.words}", share(len(remarked), count), remarked)


class DamagedImages(_Remarks):
    """Images whose decoder went on after damage: part of what they show may be noise or grey."""

    name, limit, column = "damaged_images", "max_damaged_fraction", "damage"
    words = "are damaged, though they decode."


class ConstantImages(_Remarks):
    """Images of one colour: there is nothing to learn from them, and often a fault behind them."""

    name, limit, column = "constant_images", "max_constant_fraction", "constant"
    words = "are of one colour throughout."


class NarrowRange(_Remarks):
    """Images of 16-bit samples that become few grey levels, such as 12-bit data stored as they are."""

    name, limit, column = "narrow_range", "max_narrow_range_fraction", "narrow_range"
    words = (
        "have 16-bit samples in less than a quarter of their range, and models see the upper 8 bits. Scale the samples "
        "to 0–65535 before the import: all images alike, and what is predicted, too."
    )
