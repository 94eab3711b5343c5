"""The queue as Label Studio's tasks and as CSV, and labels back, against a real PostgreSQL."""

from __future__ import annotations

import base64
import csv
import io
import json
from typing import Any
from uuid import UUID, uuid4

import cv2
import numpy as np
import pytest
from sqlalchemy import Engine, insert, select

from cv_platform.database.schema import feedback, labeling_items
from cv_platform.database.uploads import read_feedback
from cv_platform.errors import InvalidDatasetError
from cv_platform.monitoring.label_exchange import (
    import_labels,
    label_studio_config,
    read_labels_file,
    read_queue,
    write_csv,
    write_tasks,
)
from cv_platform_tests.support.labelled_log import NOW, answer, drawing, experiment

CONFIG = experiment()


@pytest.fixture
def queued(engine: Engine) -> list[UUID]:
    """Three answers that wait to be labelled."""
    ids = [answer(engine, drawing("cat", seed), predicted_class="cat") for seed in range(3)]
    facts: dict[str, Any] = {"experiment": "pets", "reason": "novel", "score": 1.0, "window_end_utc": NOW}
    rows = [{**facts, "item_id": uuid4(), "prediction_id": name, "place": at} for at, name in enumerate(ids)]
    with engine.begin() as connection:
        connection.execute(insert(labeling_items), rows)
    return ids


def said(engine: Engine) -> set[tuple[UUID, str, str]]:
    columns = (feedback.c.prediction_id, feedback.c.true_class, feedback.c.source)
    with engine.connect() as connection:
        return {tuple(row) for row in connection.execute(select(*columns))}


def annotated(task: dict[str, Any], choices: list[str], who: Any = 7, **more: Any) -> dict[str, Any]:
    """Returns a task as Label Studio exports it."""
    result = [{"from_name": "class", "to_name": "image", "type": "choices", "value": {"choices": choices}, "id": "x"}]
    annotation = {"result": result, "completed_by": who, "created_at": "2026-03-02T10:00:00.000000Z", **more}
    return {"id": 1, "data": task["data"], "annotations": [annotation], "predictions": []}


LATER = annotated({"data": {"prediction_id": str(UUID(int=1))}}, ["cat"], created_at="2999-01-01T00:00:00Z")


def test_tasks_carry_the_picture_and_the_proposal_and_their_annotations_become_labels_once(
    engine: Engine, queued: list[UUID]
) -> None:
    tasks = json.loads(write_tasks(engine, read_queue(engine, "pets"), CONFIG.model))
    assert [task["data"]["prediction_id"] for task in tasks] == list(map(str, queued))
    picture = base64.b64decode(tasks[0]["data"]["image"].removeprefix("data:image/jpeg;base64,"))
    assert cv2.imdecode(np.frombuffer(picture, np.uint8), 1).shape == (64, 64, 3)
    (prediction,) = tasks[0]["predictions"]
    assert (prediction["score"], prediction["result"][0]["value"]) == (0.6, {"choices": ["cat"]})
    gone = {"data": {"prediction_id": str(uuid4())}}
    export = [
        annotated(tasks[0], ["dog"]),
        annotated(tasks[1], ["none of these"], {"email": "anna@example.com"}),
        annotated(tasks[2], ["cat"], was_cancelled=True),
        annotated(gone, ["cat"]),
    ]
    labels = read_labels_file(json.dumps(export).encode(), CONFIG.model, labeller="me")
    first, again = (import_labels(engine, CONFIG, labels) for _ in range(2))
    assert (first.added, first.known, list(map(str, first.gone))) == (2, 0, [gone["data"]["prediction_id"]])
    assert (again.added, again.known) == (0, 2)
    assert said(engine) == {
        (queued[0], "dog", "labeller:label-studio-7"),
        (queued[1], "", "labeller:label-studio-anna@example.com"),
    }
    assert [image.prediction_id for image in read_queue(engine, "pets")] == queued[2:]


def test_a_csv_that_somebody_filled_in_becomes_labels(engine: Engine, queued: list[UUID]) -> None:
    rows = list(csv.DictReader(io.StringIO(write_csv(read_queue(engine, "pets")).decode())))
    rows[0]["label"], rows[1]["label"], rows[1]["labeller"] = "dog", "cat", "ben"
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys())
    writer.writeheader()
    writer.writerows(rows)
    labels = read_labels_file(text.getvalue().encode("utf-8-sig"), CONFIG.model, labeller="me")
    assert import_labels(engine, CONFIG, labels).added == 2
    assert said(engine) == {(queued[0], "dog", "labeller:me"), (queued[1], "cat", "labeller:ben")}


def test_who_comes_back_to_an_earlier_label_is_believed(engine: Engine, queued: list[UUID]) -> None:
    def imported(label: str) -> int:
        labels = read_labels_file(f"prediction_id,label\n{queued[0]},{label}\n".encode(), CONFIG.model, labeller="me")
        return import_labels(engine, CONFIG, labels).added

    assert [imported(label) for label in ("cat", "cat", "dog", "cat", "cat")] == [1, 0, 1, 1, 0]
    assert read_feedback(engine, [queued[0]]) == {queued[0]: "cat"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff\xfe\x00", "or a CSV in UTF-8"),
        (b"{}", "no list of tasks"),
        pytest.param(b"[" * 100_000, "Label Studio's JSON export", id="deep"),
        (b'[{"data": {}, "annotations": []}]', "task 1 without data.prediction_id"),
        (b'[{"data": {"prediction_id": "x"}, "annotations": [{"result": [1]}]}]', "task 1 without"),
        (b"path,label\n", "no column called prediction_id"),
        (b"prediction_id,label\nnot-an-id,cat\n", "label 1: badly formed"),
        (f"prediction_id,label\n{UUID(int=1)},horse\n".encode(), "horse, which model.classes does not name"),
        (f"prediction_id,label,labeller\n{UUID(int=1)},cat,a\0b\n".encode(), "instead of a labeller's name"),
        pytest.param(json.dumps([LATER]).encode(), "2999-01-01T00:00:00Z is still to come", id="future"),
    ],
)
def test_what_is_no_file_of_labels_is_refused(content: bytes, reason: str) -> None:
    with pytest.raises(InvalidDatasetError, match=reason):
        read_labels_file(content, CONFIG.model, labeller="me")


def test_the_interface_names_the_classes_as_text() -> None:
    model = CONFIG.model.model_copy(update={"classes": ('a"><script>', "b&c")})
    assert "<script>" not in label_studio_config(model)
    assert '<Choice value=\'a"&gt;&lt;script&gt;\'/><Choice value="b&amp;c"/>' in label_studio_config(model)
