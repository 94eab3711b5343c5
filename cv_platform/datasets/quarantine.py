"""Which images take no part, by the kinds that `dataset.quarantine` has a policy for, and why.

How to add a kind: a field in `QuarantineConfig`, whose place is its rank, and what it is seen by in `_kinds`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Literal

from cv_platform.config import QuarantineConfig
from cv_platform.datasets.inspection import Inspected
from cv_platform.datasets.sources.entries import contradict

if TYPE_CHECKING:  # Each process that describes images imports this module, and has no need of pandas.
    import pandas as pd

Status = Literal["used", "quarantined", "refused"]
"""Of an image: in its split; in none; in none, and its kind's policy is `fail`."""
_STATUS: dict[str, Status] = {"quarantine": "quarantined", "fail": "refused"}
_RANK = ("test", "valid", "reference", "train")
"""Whose image stays where several have it: a test that loses images compares models less well than before."""
_SHOWN = 5


def judge(file: Inspected, unknown: Sequence[str], policy: QuarantineConfig) -> tuple[Status, str | None]:
    """Returns an image's status, and where it is not used the reason: its kind, a colon, what was seen.

    Args:
        file: what its bytes say.
        unknown: those of its labels that are no class.
        policy: what becomes of which kind.
    """
    kinds = _kinds(file, unknown, policy)
    for kind in QuarantineConfig.model_fields if kinds else ():
        if kind in kinds and (status := _STATUS.get(getattr(policy, kind))):
            return status, f"{kind}: {kinds[kind]}"
    return "used", None


def judge_duplicates(frame: pd.DataFrame, policy: QuarantineConfig) -> dict[str, tuple[Status, str]]:
    """Returns status and reason, by path, of the images that repeat another one that stays.

    Args:
        frame: path, sha256, split, labels and unknown labels of the images that are used.
        policy: what becomes of duplicates.
    """
    status = _STATUS.get(policy.duplicate)
    found: dict[str, tuple[Status, str]] = {}
    if status is None:
        return found
    repeated = frame.loc[frame["sha256"].duplicated(keep=False)]
    for _, copies in repeated.groupby("sha256", sort=False):
        rank = {split: place for place, split in enumerate(_RANK)}
        rows = sorted(
            zip(copies["split"], copies["path"], copies["labels"], copies["unknown_labels"], strict=True),
            # Of several in a split, the one of which most is known.
            key=lambda row: (rank.get(row[0], len(_RANK)), len(row[3]), row[1]),
        )
        first = str(rows[0][1])
        if contradict(*(row[2:] for row in rows)):
            # One for each labelling, not all: each of the images has the list.
            by_labels = {
                frozenset(labels): str(path) for _, path, labels, _ in sorted(rows, key=itemgetter(1), reverse=True)
            }
            shown = sorted(by_labels.values())[:_SHOWN]
            paths = ", ".join(shown + ([f"{len(rows) - len(shown)} more"] if len(rows) > len(shown) else []))
            reason = f"duplicate: the same bytes with other labels: {paths}"
            found |= {str(path): (status, reason) for _, path, *_ in rows}
        else:
            found |= {str(path): (status, f"duplicate: the same bytes as {first}") for _, path, *_ in rows[1:]}
    return found


def kind_of(reason: str) -> str:
    """Returns the kind that a reason begins with."""
    return reason.partition(":")[0]


def used(manifest: pd.DataFrame) -> pd.DataFrame:
    """Returns the rows of a manifest that take part."""
    rows: pd.DataFrame = manifest.loc[manifest["status"] == "used"]
    return rows


def _kinds(file: Inspected, unknown: Iterable[str], policy: QuarantineConfig) -> dict[str, str]:
    """Returns what is wrong with an image, by kind."""
    shorter, longer = sorted((file.width_px, file.height_px))
    is_absurd = shorter and (shorter < policy.min_side_px or longer > policy.max_aspect * shorter)
    found = {
        "absurd_size": f"{file.width_px}×{file.height_px} pixels" if is_absurd else None,
        "unknown_class": f"labelled {', '.join(unknown)}" if unknown else None,
        "damaged": file.damage,
        "animated": file.animated,
        "constant": file.constant,
        "bit_depth": file.narrow_range or file.clipped,
        "wrong_suffix": file.wrong_suffix,
        file.problem_kind: file.problem,
    }
    return {kind: words for kind, words in found.items() if kind is not None and words is not None}
