"""The labelling queue for other tools, and their labels back: Label Studio's JSON, and CSV.

A Label Studio task carries its picture within it (a data URI), so that no tool needs to reach the service, with the
model's answer as a prediction. https://labelstud.io/guide/tasks, https://labelstud.io/guide/export
"""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4, uuid5
from xml.sax.saxutils import quoteattr

import cv2
from sqlalchemy import Engine, Select, select
from sqlalchemy.dialects.postgresql import insert

from cv_platform.config import ExperimentConfig, ModelConfig
from cv_platform.database.schema import feedback, labeling_items, predictions
from cv_platform.database.uploads import read_images
from cv_platform.errors import ImageError, InvalidDatasetError
from cv_platform.images import Preprocessing, decode
from cv_platform.monitoring.labeling_queue import is_labelled
from cv_platform.predictions import LABEL_SEPARATOR, LABELLER, NONE_OF_THESE

CSV_COLUMNS = ("prediction_id", "reason", "proposal", "confidence", "label", "labeller")
NONE = "none of these"
"""The choice, and the CSV's label, of an image that shows none of the classes."""
_LABELLER = re.compile(r"[\w.@+ -]{1,100}")
_MOST_AHEAD = timedelta(hours=1)
"""Of a clock elsewhere. The latest label counts, so one of the future would count for ever."""
_SIDE_PX = 640
_SHOWN = 10


@dataclass(frozen=True)
class QueuedImage:
    """An image of the queue that nobody has labelled, with the model's answer."""

    prediction_id: UUID
    reason: str
    model_version: str
    proposal: str
    confidence: float | None
    sha256: str


@dataclass(frozen=True)
class GivenLabel:
    """What a file says of an image: class names, none for none of these; and who says so, and when."""

    prediction_id: UUID
    classes: tuple[str, ...]
    labeller: str
    stated_on: datetime | None


@dataclass(frozen=True)
class ImportedLabels:
    """How many labels an import has added, had added before, and left out as their prediction is gone."""

    added: int
    known: int
    gone: tuple[UUID, ...]


def read_queue(engine: Engine, experiment: str) -> list[QueuedImage]:
    """Returns what waits in the queue, in its order.

    Raises:
        DatabaseUnavailableError, SchemaMismatchError: see `database.connection.make_engine`.
    """
    answer, item = predictions.c, labeling_items.c
    wanted = (
        select(
            *(answer.prediction_id, item.reason, answer.model_version, answer.predicted_class),
            *(answer.prediction_json, answer.image_sha256),
        )
        .join(labeling_items, item.prediction_id == answer.prediction_id)
        .where((item.experiment == experiment) & answer.image_sha256.is_not(None) & ~is_labelled())
        .order_by(item.window_end_utc, item.place)
    )
    with engine.connect() as connection:
        return [
            QueuedImage(
                row.prediction_id,
                row.reason,
                row.model_version,
                row.predicted_class,
                max(row.prediction_json.values(), default=None),
                row.image_sha256,
            )
            for row in connection.execute(wanted)
        ]


def label_studio_config(model: ModelConfig) -> str:
    """Returns the labelling interface to paste into a Label Studio project."""
    kind = "multiple" if model.classifier_type == "multi-label" else "single"
    choices = "".join(f"<Choice value={quoteattr(name)}/>" for name in (*model.classes, NONE))
    wrapped = f'<Choices name="class" toName="image" choice="{kind}">{choices}</Choices>'
    return f'<View><Image name="image" value="$image"/>{wrapped}</View>'


def write_tasks(engine: Engine, queue: Sequence[QueuedImage], model: ModelConfig) -> bytes:
    """Returns Label Studio's tasks with predictions; an image that does not decode has none."""
    tasks = list[dict[str, Any]]()
    for image in queue:
        content = read_images(engine, [image.sha256]).get(image.sha256, b"")
        try:
            picture = _picture(content, model)
        except ImageError:
            continue
        chosen = _split(image.proposal, model) if image.proposal else [NONE]
        result = {"from_name": "class", "to_name": "image", "type": "choices", "value": {"choices": chosen}}
        prediction = {"model_version": image.model_version, "score": image.confidence, "result": [result]}
        data = {"image": picture, "prediction_id": str(image.prediction_id), "reason": image.reason}
        tasks.append({"data": data, "predictions": [prediction]})
    return json.dumps(tasks, ensure_ascii=False).encode()


def write_csv(queue: Sequence[QueuedImage]) -> bytes:
    """Returns the queue as a CSV whose columns label and labeller are empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for image in queue:
        # A spreadsheet would take a class name that begins so for a formula.
        proposal = f"'{image.proposal}" if image.proposal[:1] in "=+-@\t\r" and image.proposal else image.proposal
        writer.writerow([image.prediction_id, image.reason, proposal, image.confidence, "", ""])
    return text.getvalue().encode()


def read_labels_file(content: bytes, model: ModelConfig, *, labeller: str) -> list[GivenLabel]:
    """Reads a JSON export of Label Studio, or a CSV with the columns prediction_id and label.

    Args:
        content: of the file.
        model: which classes there are.
        labeller: whose the labels are where the file does not say it.

    Raises:
        InvalidDatasetError: it is neither, or has rows that cannot be understood; all of them are listed.
    """
    try:
        text = content.decode("utf-8-sig")
        rows = list(_label_studio(json.loads(text)) if text.lstrip()[:1] in ("[", "{") else _table(text))
    except (ValueError, csv.Error, RecursionError) as err:
        raise InvalidDatasetError(
            f"Expected Label Studio's JSON export, or a CSV in UTF-8. Received: {err}. Export it again."
        ) from err
    mistakes: list[str] = []
    labels: list[GivenLabel] = []
    for number, (name, said, who, when) in enumerate(rows, start=1):
        classes = () if said == [NONE] else tuple(sorted({part for one in said for part in _split(one, model)}))
        if unknown := sorted(set(classes) - set(model.classes)):
            mistakes.append(f"label {number}: {', '.join(unknown)}, which model.classes does not name")
        elif model.classifier_type == "multi-class" and len(classes) > 1:
            mistakes.append(f"label {number}: {len(classes)} classes instead of one")
        try:
            stated_on = datetime.fromisoformat(when) if when else None
            if stated_on is not None and stated_on.tzinfo is None:
                raise ValueError(f"{when} has no time zone")
            if stated_on is not None and stated_on > datetime.now(UTC) + _MOST_AHEAD:
                raise ValueError(f"{when} is still to come")
            if _LABELLER.fullmatch(who or labeller) is None:
                raise ValueError(f"{ascii(who)[:80]} instead of a labeller's name of letters, digits and . @ + - _")
            labels.append(GivenLabel(UUID(name), classes, who or labeller, stated_on))
        except (ValueError, TypeError, OverflowError) as err:
            mistakes.append(f"label {number}: {err}")
    if mistakes:
        shown = "\n".join(f"  {mistake}" for mistake in mistakes[:_SHOWN])
        more = f"\n  and {len(mistakes) - _SHOWN} more" if len(mistakes) > _SHOWN else ""
        raise InvalidDatasetError(
            f"Expected labels of the model's classes on predictions. Received:\n{shown}{more}\nNothing was imported."
        )
    return labels


def import_labels(engine: Engine, config: ExperimentConfig, labels: Sequence[GivenLabel]) -> ImportedLabels:
    """Keeps labels; the same file again adds none. Those on predictions that are gone are left out.

    Raises:
        DatabaseUnavailableError, SchemaMismatchError: see `database.connection.make_engine`; nothing was imported.
    """
    added, gone = 0, list[UUID]()
    with engine.begin() as connection:
        for label in labels:
            known = select(predictions.c.prediction_id).where(
                (predictions.c.prediction_id == label.prediction_id)
                & (predictions.c.model_name == config.model.model_name)
            )
            # Locked: a deletion waits for this, or has come before it.
            if connection.execute(known.with_for_update(read=True, key_share=True)).first() is None:
                gone.append(label.prediction_id)
                continue
            true_class = LABEL_SEPARATOR.join(label.classes) or NONE_OF_THESE
            source = f"{LABELLER}{label.labeller}"
            values: dict[str, Any] = {"prediction_id": label.prediction_id, "true_class": true_class, "source": source}
            if label.stated_on is not None:
                key = "\n".join((source, true_class, label.stated_on.isoformat()))
                values |= {"entry_id": uuid5(label.prediction_id, key), "created_on": label.stated_on}
            elif connection.execute(_latest(label.prediction_id, source)).scalar() == true_class:
                continue
            else:  # Also what somebody has said before, and something else since.
                values["entry_id"] = uuid4()
            stored = insert(feedback).values(values).on_conflict_do_nothing(index_elements=["entry_id"])
            added += connection.execute(stored).rowcount
    return ImportedLabels(added, len(labels) - len(gone) - added, tuple(gone))


def _latest(prediction_id: UUID, source: str) -> Select[tuple[str]]:
    own = (feedback.c.prediction_id == prediction_id) & (feedback.c.source == source)
    return (
        select(feedback.c.true_class).where(own).order_by(feedback.c.created_on.desc(), feedback.c.id.desc()).limit(1)
    )


def _split(text: str, model: ModelConfig) -> list[str]:
    if text in model.classes or model.classifier_type == "multi-class":
        return [text]
    return [name for name in text.split(LABEL_SEPARATOR) if name]


def _picture(content: bytes, model: ModelConfig) -> str:
    pixels = decode(content, preprocessing=Preprocessing.of(model))
    scale = min(1.0, _SIDE_PX / max(pixels.shape[:2]))
    size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
    small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    jpeg = cv2.imencode(".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 90])[1]
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.tobytes()).decode()


def _label_studio(tasks: Any) -> Iterator[tuple[str, list[str], str, str]]:
    """Yields prediction, choices, labeller and time of each annotation that was not cancelled."""
    if not isinstance(tasks, list):
        raise ValueError("no list of tasks")
    for number, task in enumerate(tasks, start=1):
        try:
            name = task["data"]["prediction_id"]
            for annotation in task.get("annotations") or []:
                if annotation.get("was_cancelled"):
                    continue
                said = [choice for part in annotation["result"] for choice in part["value"].get("choices", [])]
                if said:
                    who = annotation.get("completed_by")
                    who = who.get("email") or who.get("id") if isinstance(who, dict) else who
                    person = "" if who is None else f"label-studio-{who}"
                    yield str(name), [str(choice) for choice in said], person, str(annotation.get("created_at") or "")
        except (KeyError, TypeError, AttributeError) as err:
            raise ValueError(f"task {number} without data.prediction_id or a result as ours: {err!r}") from err


def _table(text: str) -> Iterator[tuple[str, list[str], str, str]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    if missing := [name for name in ("prediction_id", "label") if name not in (reader.fieldnames or ())]:
        raise ValueError(f"no column called {' or '.join(missing)}")
    for row in reader:
        if row["label"]:
            yield row["prediction_id"], [row["label"]], row.get("labeller") or "", ""
