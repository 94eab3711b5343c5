"""A page to review likely wrong labels by keyboard: one file, without a server; it hands out the decisions as a CSV.

`cv-platform relabel` makes a dataset version of that CSV (`datasets.relabelling`). Images are in the page itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cv_platform.pages import render, sealed, thumbnail
from cv_platform.predictions import LABEL_SEPARATOR

if TYPE_CHECKING:
    from cv_platform.validation.checks import Subject
    from cv_platform.validation.checks.label_issues import LabelProbe, Suspicion

PAGE = "label_issues.html"
MOST_CARDS = 500
"""The most likely ones: at 5 kB an image, the page stays below 3 MB, and an hour's work."""
_THUMBNAIL_PX = 160
_SHOWN_PAIRS = 20


def write_review_page(subject: Subject, probe: LabelProbe) -> Path:
    """Writes the page of a probe's suspicions to `subject.directory`, and returns its path."""
    suspected: dict[int, list[Suspicion]] = {}
    for suspicion in probe.suspicions:
        suspected.setdefault(suspicion.position, []).append(suspicion)
    rows = subject.sample.rows
    cards = [
        _card(rows.iloc[position].to_dict(), found, subject) for position, found in list(suspected.items())[:MOST_CARDS]
    ]
    low, high = probe.wrong_interval
    page = render(
        "validation/label_review.html",
        title=f"Likely wrong labels of {subject.version}",
        cards=cards,
        more=len(suspected) - len(cards),
        pairs=probe.confusion()[:_SHOWN_PAIRS],
        facts=[
            ("suspected", f"{len(suspected)} of {probe.judged} labels"),
            ("wrong in all, as estimated", f"{probe.wrong_fraction:.1%} (95 %: {low:.1%} to {high:.1%})"),
            ("balanced accuracy of what the others say", f"{probe.accuracy:.3f}"),
        ],
        review={
            "version": subject.version,
            "classes": list(subject.class_names),
            "separator": LABEL_SEPARATOR,
            "several": subject.classifier_type == "multi-label",
            "rows": [{name: card[name] for name in ("path", "sha256", "given", "likely")} for card in cards],
        },
    )
    path = subject.directory / PAGE
    path.write_text(sealed(page), encoding="utf-8")
    return path


def _card(row: Mapping[Any, Any], found: Sequence[Suspicion], subject: Subject) -> dict[str, Any]:
    """Returns what the page shows of an image; of several suspicions, what they make of it together."""
    given = set(row["labels"])
    likely = set(given)
    for suspicion in found:
        likely ^= set(suspicion.labels) ^ given
    return {
        "path": str(row["path"]),
        "sha256": str(row["sha256"]),
        "given": LABEL_SEPARATOR.join(sorted(given)),
        "likely": LABEL_SEPARATOR.join(sorted(likely)),
        "unknown": LABEL_SEPARATOR.join(row["unknown_labels"]),
        "chance": max(suspicion.confidence for suspicion in found),
        "split": str(row["split"]),
        "picture": thumbnail(subject.root / str(row["path"]), _THUMBNAIL_PX, subject.sample_bits),
    }
