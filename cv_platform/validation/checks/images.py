"""Checks of single images: what does not decode, and what the manifest remarks about those that do."""

from __future__ import annotations

import pandas as pd
from typing_extensions import override

from cv_platform.datasets.quarantine import kind_of
from cv_platform.validation.checks import Check, Finding, Subject, share
from cv_platform.validation.quarantine_page import write_quarantine


class UnreadableImages(Check):
    """The share of images that do not decode."""

    name, limit = "unreadable_images", "max_unreadable_fraction"

    @override
    def look(self, subject: Subject) -> Finding:
        unread = subject.quarantined.loc[~subject.quarantined["is_readable"].astype(bool)]
        problems = dict(zip(unread["path"], unread["problem"], strict=True))
        total = len(subject.manifest) + len(subject.quarantined)
        return Finding(
            f"{len(problems)} of {total} images do not decode; {subject.config.max_unreadable_fraction:.1%} may "
            "(validate.max_unreadable_fraction), and nothing downstream uses them."
            + (f" The first: {', '.join(sorted(problems)[:3])}." if problems else ""),
            share(len(problems), total),
            [f"{path}: {problem}" for path, problem in sorted(problems.items())],
        )


class QuarantinedImages(Check):
    """The share of images that take no part, for whatever reason; those of a kind whose policy is `fail`, at all."""

    name, limit = "quarantined_images", "max_quarantined_fraction"

    @override
    def look(self, subject: Subject) -> Finding:
        rows = subject.quarantined
        if rows.empty:
            return Finding("No image is quarantined.", 0.0)
        write_quarantine(subject)
        rows = rows.sort_values(["status", "reason", "path"], key=lambda values: values != "refused", kind="stable")
        fraction = share(len(rows), len(rows) + len(subject.manifest))
        refused = rows.loc[rows["status"] == "refused"]
        kinds = ", ".join(f"{count} {kind}" for kind, count in rows["reason"].map(kind_of).value_counts().items())
        words = f"{len(rows)} of {len(rows) + len(subject.manifest)} images take no part ({fraction:.2%}): {kinds}."
        if len(refused):
            names = ", ".join(sorted(set(refused["reason"].map(kind_of))))
            words += f" There may be none that are {names} (dataset.quarantine: fail), and {len(refused)} are."
        return Finding(
            words,
            fraction,
            [f"{path}: {reason}" for path, reason in zip(rows["path"], rows["reason"], strict=True)],
            passed=False if len(refused) else None,
        )


class _Remarks(Check):
    """The share of images with a remark in one of the manifest's columns."""

    column: str
    words: str

    def advice(self, subject: Subject) -> str:
        """Returns what to do where there are any, after a space."""
        return ""

    @override
    def look(self, subject: Subject) -> Finding:
        rows = zip(subject.manifest["path"], subject.manifest[self.column], strict=True)
        remarked = [f"{path}: {remark}" for path, remark in rows if pd.notna(remark)]
        count = len(subject.manifest)
        words = f"{len(remarked)} of {count} images {self.words}{self.advice(subject) if remarked else ''}"
        return Finding(words, share(len(remarked), count), remarked)


class DamagedImages(_Remarks):
    """Images whose decoder went on after damage: part of what they show may be noise or grey."""

    name, limit, column = "damaged_images", "max_damaged_fraction", "damage"
    words = "are damaged, though they decode."


class ConstantImages(_Remarks):
    """Images of one colour: there is nothing to learn from them, and often a fault behind them."""

    name, limit, column = "constant_images", "max_constant_fraction", "constant"
    words = "are of one colour throughout."


class BitDepth(Check):
    """Images of more or fewer bits than most: another camera, another export, and other grey levels for a model."""

    name, limit = "bit_depth", "max_other_bit_depth_fraction"

    @override
    def look(self, subject: Subject) -> Finding:
        # What has up to 8 bits comes out the same; what is below is scaled to them.
        bits = subject.manifest["bit_depth"].dropna().clip(lower=8)
        if bits.empty:
            return Finding("Not judged: there are no images (see class_coverage).")
        (usual, count), *others = bits.value_counts().items()
        rows = subject.manifest.loc[bits.index[bits != usual]]
        words = "".join(f", {other_count} {bit:.0f}" for bit, other_count in others)
        return Finding(
            f"{count} of {len(bits)} images have {usual:.0f} bits a sample{words}.",
            share(len(rows), len(bits)),
            [f"{path}: {bit} bits" for path, bit in zip(rows["path"], rows["bit_depth"].astype(int), strict=True)],
        )


class NarrowRange(_Remarks):
    """Images of 16-bit samples that become few grey levels, such as 12-bit data stored as they are."""

    name, limit, column = "narrow_range", "max_narrow_range_fraction", "narrow_range"
    words = "have 16-bit samples in a quarter of their range or less, and models see the upper 8 bits."

    @override
    def advice(self, subject: Subject) -> str:
        bits = _most_bits(subject)
        if bits <= 8:
            return " No sample exceeds 255: save all images with 8 bits, and what is predicted, too."
        if bits == 16:
            return " Other images use more of it: scale the samples to 0–65535 before the import, as what is predicted."
        return (
            f" No sample exceeds {2**bits - 1}: set model.sample_bits: {bits}, or what the camera records if that is "
            "more; training and service share it."
        )

    @override
    def look(self, subject: Subject) -> Finding:
        declared, bits = subject.sample_bits, _most_bits(subject)
        if declared is None or bits == 0 or bits > declared - 2:
            return super().look(subject)
        words = f"model.sample_bits is {declared}, and no sample of any image uses more than a quarter of that range."
        return Finding(words + self.advice(subject), share(len(_largest_samples(subject)), len(subject.manifest)))


class ClippedSamples(_Remarks):
    """Images with samples above the range that `model.sample_bits` says: what is brighter is white."""

    name, limit, column = "clipped_samples", "max_clipped_fraction", "clipped"
    words = "have samples above the range of model.sample_bits."

    @override
    def advice(self, subject: Subject) -> str:
        return f" The largest has {_most_bits(subject)} bits: correct model.sample_bits, unless these are marks."


def _largest_samples(subject: Subject) -> list[int]:
    """Returns the largest sample of each image of more than 8 bits."""
    return [int(value) for value in subject.manifest["largest_sample"] if pd.notna(value)]


def _most_bits(subject: Subject) -> int:
    """Returns how many bits the largest sample of all images has, 0 where none has more than 8."""
    return max(_largest_samples(subject), default=0).bit_length()
