"""Labels in the log become a version of the dataset: against a real PostgreSQL and a real DVC repository."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import cv2
import numpy as np
import pytest
from sqlalchemy import Engine, delete, insert

from cv_platform.database.schema import deletions, feedback, predictions
from cv_platform.datasets.importing import ImportRules, import_dataset
from cv_platform.datasets.manifest import read_manifest
from cv_platform.datasets.repository import list_tag_names, read_file
from cv_platform.datasets.versions import checkout_version
from cv_platform.errors import InvalidDatasetError
from cv_platform.monitoring.growth import GrownVersion, GrowthRules, grow_dataset
from cv_platform.predictions import NONE_OF_THESE
from cv_platform_tests.support.labelled_log import (
    CLASSES,
    NOW,
    PER_CLASS,
    answer,
    drawing,
    experiment,
    home,
    label,
    origin,
    say,
)

__all__ = ["home", "origin"]


@pytest.fixture
def grow(engine: Engine, home: Path) -> Callable[..., GrownVersion]:
    def grown(tag: str = "v1", rules: GrowthRules | None = None, **labels: Any) -> GrownVersion:
        return grow_dataset(experiment(tag, **labels), engine, rules or GrowthRules(), home=home, spare_bytes=0)

    return grown


def rows(home: Path, tag: str) -> dict[str, tuple[str, str]]:
    """Returns split and label of each image of a version by its sha256."""
    config = experiment(tag)
    manifest = read_manifest(checkout_version(config.dataset, config.model, home=home).manifest_path)
    return {row["sha256"]: (str(row["split"]), row["labels"][0]) for row in manifest.to_dict("records")}


def test_feedback_becomes_a_version_that_says_of_each_image_who_labelled_it_and_when(
    engine: Engine, home: Path, grow: Callable[..., GrownVersion]
) -> None:
    before = rows(home, "v1")
    ids = label(engine, ["cat", "dog"] * 10)
    made = grow()
    assert made.version is not None
    after = rows(home, made.version.tag)
    assert {sha256: after[sha256] for sha256 in before} == before, "every image stays in its split"
    assert len(after) == len(before) + 20
    added = [split for sha256, (split, _) in after.items() if sha256 not in before]
    assert {split: added.count(split) for split in set(added)} == {"train": 8, "valid": 4, "test": 4, "reference": 4}
    content = read_file(home / "datasets/pets", made.version.tag, "provenance.csv")
    assert content
    told = list(csv.DictReader(io.StringIO(content.decode())))
    assert {row["prediction_id"] for row in told} == set(map(str, ids))
    assert {(row["source"], row["stated_on"], row["predicted_class"]) for row in told} == {
        ("client", NOW.isoformat(), "cat")
    }
    tags = list_tag_names(home / "datasets/pets")
    assert grow().version == made.version, "the same labels on the same version: the same"
    again = grow(made.version.tag)
    assert again.version == again.base, "and on the grown one nothing new"
    assert list_tag_names(home / "datasets/pets") == tags


def test_what_is_deleted_or_withdrawn_leaves_the_next_version_and_the_others_stay_in_their_splits(
    engine: Engine, home: Path, grow: Callable[..., GrownVersion]
) -> None:
    ids = label(engine, ["cat", "dog"] * 4)
    first = grow().version
    assert first is not None
    before = rows(home, first.tag)
    with engine.begin() as connection:
        for table in (feedback, predictions):
            connection.execute(delete(table).where(table.c.prediction_id == ids[0]))
        connection.execute(insert(deletions).values(prediction_id=ids[0]))
        connection.execute(delete(feedback).where(feedback.c.prediction_id == ids[1]))  # A labeller's undo.
    say(engine, ids[2], "dog", minute=1)
    made = grow(first.tag)
    assert made.version is not None
    assert made.summary[:2] == ("0 images added, 1 relabelled, 2 left.", "left: 1, as their prediction was deleted")
    after = rows(home, made.version.tag)
    gone = {hashlib.sha256(drawing(kind, seed)).hexdigest() for kind, seed in (("cat", 100), ("dog", 101))}
    assert before.keys() - after.keys() == gone
    assert {sha256: split for sha256, (split, _) in after.items()}.items() <= {
        sha256: split for sha256, (split, _) in before.items()
    }.items()
    with engine.begin() as connection:
        connection.execute(delete(feedback))  # A labeller who takes everything back.
    emptied = grow(made.version.tag).version
    assert emptied is not None
    assert rows(home, emptied.tag) == rows(home, "v1")


def test_uploads_that_retention_has_taken_leave_unless_the_config_keeps_them(
    engine: Engine, home: Path, grow: Callable[..., GrownVersion]
) -> None:
    ids = label(engine, ["cat", "dog"])
    first = grow().version
    assert first is not None
    with engine.begin() as connection:
        connection.execute(predictions.update().values(image_sha256=None))
        connection.execute(insert(deletions).values(prediction_id=ids[0]))
    kept = grow(first.tag, keep_expired=True).version
    assert kept is not None
    assert len(rows(home, kept.tag)) == 2 * PER_CLASS + 1
    content = read_file(home / "datasets/pets", kept.tag, "provenance.csv")
    assert content
    assert str(ids[1]) in content.decode()
    assert str(ids[0]) not in content.decode()
    strict = grow(first.tag)
    assert "left: 1, as the log does not keep their upload any more (labels.keep_expired)" in strict.summary


def test_what_gives_no_label_is_named_and_left_out(
    engine: Engine, home: Path, grow: Callable[..., GrownVersion]
) -> None:
    own = drawing("cat", 3)
    say(engine, answer(engine, own), "cat")
    say(engine, answer(engine, drawing("dog", 4)), "cat")
    near = cv2.imencode(".jpg", cv2.imdecode(np.frombuffer(drawing("cat", 5), np.uint8), 1), [1, 60])[1].tobytes()
    say(engine, answer(engine, near), "cat")
    say(engine, answer(engine, drawing("cat", 200)), NONE_OF_THESE)
    say(engine, answer(engine, drawing("cat", 201)), "horse")
    say(engine, answer(engine, None), "cat")
    say(engine, uuid4(), "cat")
    divided = answer(engine, drawing("cat", 202))
    say(engine, divided, "cat", "labeller:anna")
    say(engine, divided, "dog", "labeller:ben")
    say(engine, divided, "cat", "client", minute=5)
    say(engine, answer(engine, b"no image"), "cat")
    made = grow()
    assert made.version == made.base
    reasons = {line.partition(", such as")[0].split(" ", 2)[2] for line in made.summary if line.startswith("left out")}
    assert reasons == {
        "1 of images that the dataset has",
        "1 of images that the dataset has with another label (cv-platform relabel changes those)",
        "1 near-copies of images that the dataset has",
        "1 that show none of the classes",
        "1 with classes that model.classes does not name",
        "1 on uploads that the log does not keep (any more)",
        "1 on predictions that the log does not have",
        "1 that labellers disagree about",
        "1 whose upload is gone or does not decode",
    }


def test_labels_that_contradict_the_images_are_refused_until_somebody_trusts_their_source(
    engine: Engine, home: Path, grow: Callable[..., GrownVersion]
) -> None:
    label(engine, ["cat", "dog"] * 15, "labeller:anna")
    for seed in range(200, 230):
        kind = CLASSES[seed % 2]
        said = kind if seed % 5 < 3 else CLASSES[1 - seed % 2]
        say(engine, answer(engine, drawing(kind, seed)), said, "labeller:mallory")
    with pytest.raises(InvalidDatasetError, match=r"labeller:mallory: \d+ of 30 labels contradict") as caught:
        grow()
    assert "anna" not in str(caught.value)
    assert "Nothing was changed" in str(caught.value)
    assert list_tag_names(home / "datasets/pets") == ["v1"]
    without = grow(rules=GrowthRules(without=("labeller:mallory",), is_dry_run=True))
    assert without.version is None
    assert without.summary[0].startswith("30 images added")
    trusted = grow(rules=GrowthRules(trusted=("labeller:mallory",), new_tag="v2")).version
    assert trusted is not None
    assert (trusted.tag, len(rows(home, "v2"))) == ("v2", 2 * PER_CLASS + 60)


def test_unknown_labels_stay_unknown_while_a_dataset_grows(engine: Engine, home: Path) -> None:
    files = sorted((home / "source").glob("*/*.jpg"))
    lines = ["path,split,cat,dog"]
    for at, file in enumerate(files):
        cells = ("1", "-1") if file.parent.name == "cat" else ("0", "1")
        lines.append(
            f"{file.relative_to(home / 'source').as_posix()},{('train', 'test')[at % 4 == 0]},{','.join(cells)}"
        )
    (home / "source" / "annotations.csv").write_text("\n".join(lines))
    rules = ImportRules(unknown="ignore", max_left_out_fraction=1.0)
    import_dataset(home / "source", ds_name="open", tag="v1", ds_root=home / "datasets", rules=rules)
    config = experiment().with_fields({"dataset.ds_name": "open", "model.classifier_type": "multi-label"})
    say(engine, answer(engine, drawing("cat", 100)), "cat|dog")
    say(engine, answer(engine, files[0].read_bytes()), "cat|dog")  # Of an own image of which the dog is not known.
    say(engine, answer(engine, files[-1].read_bytes()), "cat|dog")  # Of one that is known to show no cat.
    grown = grow_dataset(config, engine, GrowthRules(), home=home, spare_bytes=0)
    assert grown.version is not None
    assert [line.split(", such as")[0] for line in grown.summary if line.startswith("left out")] == [
        "left out: 1 of images that the dataset has",
        "left out: 1 of images that the dataset has with another label (cv-platform relabel changes those)",
    ]
    table = list(csv.DictReader(io.StringIO((grown.version.annotations or b"").decode())))
    own = {row["path"]: (row["label"], row["unknown_labels"]) for row in table if row["path"].startswith(CLASSES)}
    assert set(own.values()) == {("cat", "dog"), ("dog", "")}
    assert [(row["label"], row["unknown_labels"]) for row in table if row["path"].startswith("labelled")] == [
        ("cat|dog", "")
    ]
