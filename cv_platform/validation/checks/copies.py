"""Checks of images that are there twice, by their content (sha256)."""

from __future__ import annotations

from typing_extensions import override

from cv_platform.validation.checks import Check, Finding, Subject, share


def _remedy(count: int) -> str:
    return " `dataset.quarantine.duplicate: quarantine` leaves out all but one." if count else ""


class TrainTestLeakage(Check):
    """Finds test images that are in train too."""

    name, limit = "train_test_leakage", "max_leakage_fraction"

    @override
    def look(self, subject: Subject) -> Finding:
        test = subject.split("test")
        if test.empty:
            return Finding("Not judged: test has no images (see class_coverage).")
        train = subject.split("train").sort_values("path")
        origin = dict(zip(train["sha256"][::-1], train["path"][::-1], strict=True))
        leaked = test.loc[test["sha256"].isin(list(origin))].sort_values("path")
        fraction = len(leaked) / len(test)
        return Finding(
            f"{len(leaked)} of {len(test)} test images are in train too ({fraction:.2%}).{_remedy(len(leaked))}",
            fraction,
            [f"{path} = {origin[sha]}" for path, sha in zip(leaked["path"], leaked["sha256"], strict=True)],
        )


class Duplicates(Check):
    """Counts the images, over all splits, that repeat another one byte for byte."""

    name, limit = "duplicates", "max_duplicate_fraction"

    @override
    def look(self, subject: Subject) -> Finding:
        ordered = subject.manifest.sort_values("path")
        first = ordered.drop_duplicates("sha256").set_index("sha256")["path"]
        copies = ordered.loc[ordered["sha256"].duplicated()]
        fraction = share(len(copies), len(ordered))
        return Finding(
            f"{len(copies)} of {len(ordered)} images repeat another one ({fraction:.2%}).{_remedy(len(copies))}",
            fraction,
            [f"{path} = {first[sha]}" for path, sha in zip(copies["path"], copies["sha256"], strict=True)],
        )
