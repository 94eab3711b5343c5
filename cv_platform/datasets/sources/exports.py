"""What labelling tools export, as the rows of a table: COCO, Datumaro, CVAT and Label Studio.

Each is told by its content, never by its name, and trusted in nothing: sizes are bounded, XML may define no entities,
and paths are only looked up among the files of the source. Formats:
https://cocodataset.org/#format-data, https://open-edge-platform.github.io/datumaro/ (data format `datumaro`),
https://docs.cvat.ai/docs/dataset_management/formats/format-cvat/, https://labelstud.io/guide/export
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree

from cv_platform.datasets.sources.entries import split_of
from cv_platform.errors import InvalidDatasetError
from cv_platform.predictions import LABEL_SEPARATOR

MAX_EXPORT_BYTES = 2**30
EXPORT_SUFFIXES = (".json", ".xml")
NO_ANNOTATION = "without an annotation in the export"
DISAGREEMENT = "labelled differently by its annotators"
_UPLOAD_PREFIX = re.compile(r"^[0-9a-f]{8}-(?=.)")
"""Label Studio's own, of uploaded files."""


@dataclass(frozen=True)
class Row:
    """One image of an export: the names that its file may have, the likeliest first; its split and labels."""

    paths: tuple[str, ...]
    split: str | None
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Export:
    """What an export says.

    Attributes:
        kind: whose it is.
        rows: the labelled images.
        without: images that have no usable label, by reason.
        notes: what was understood, as sentences.
    """

    kind: str
    rows: tuple[Row, ...]
    without: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    notes: tuple[str, ...] = ()


def read_export(content: bytes, name: str, *, classes: Iterable[str] | None = None) -> Export | None:
    """Reads a labelling tool's export; None where the file is none.

    Args:
        content: of the file.
        name: of the file, for messages; its last part may name a split.
        classes: the labels that count; None: all.

    Raises:
        InvalidDatasetError: it is one, and broken or ambiguous; or it is too large.
    """
    head = content[:4096].lstrip(b"\xef\xbb\xbf \t\r\n")
    reader = _read_xml if head.startswith(b"<") else _read_json if head[:1] in {b"{", b"["} else None
    if reader is None:
        return None
    if len(content) > MAX_EXPORT_BYTES:
        raise InvalidDatasetError(
            f"Expected an export of at most {MAX_EXPORT_BYTES / 1e9:.1f} GB. Received: {name} with "
            f"{len(content) / 1e9:.1f} GB. Export fewer images at a time."
        )
    wanted = None if classes is None else frozenset(classes)
    try:
        export = reader(content, name, wanted)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, RecursionError) as err:
        raise InvalidDatasetError(
            f"Expected a whole export of COCO, Datumaro, CVAT or Label Studio in {name}. Received: one that breaks off "
            f"or has other fields ({type(err).__name__}: {str(err)[:200]}). Export it again."
        ) from err
    joined = (
        sorted({label for row in export.rows for label in row.labels if LABEL_SEPARATOR in label}) if export else []
    )
    if joined:
        raise InvalidDatasetError(
            f"Expected labels without {LABEL_SEPARATOR!r} in {name}. Received: {', '.join(joined[:5])}. Rename them."
        )
    return export


def _read_json(content: bytes, name: str, wanted: frozenset[str] | None) -> Export | None:
    text = content.decode("utf-8-sig", errors="replace")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        if re.search(r'"(categories|annotations|items)"\s*:', text[:100_000]):
            raise
        return None  # JSON lines, which are a label file, or something else.
    if isinstance(value, dict):
        if {"images", "categories"} <= value.keys():
            return _coco(value, name)
        if isinstance(value.get("items"), list) and isinstance(value.get("categories"), dict):
            return _datumaro(value, name)
    if isinstance(value, list) and value and all(isinstance(task, dict) for task in value):
        if any("annotations" in task and "data" in task for task in value):
            return _label_studio(value, name, wanted)
        if all("annotation_id" in task and "annotator" in task for task in value):
            return _label_studio([_from_json_min(task) for task in value], name, wanted)
    return None


def _coco(value: dict[str, Any], name: str) -> Export:
    names = {category["id"]: str(category["name"]) for category in value["categories"]}
    labels: dict[Any, set[str]] = defaultdict(set)
    unknown = set[str]()
    known = {image["id"] for image in value["images"]}
    for annotation in value.get("annotations", ()):
        if annotation["category_id"] not in names or annotation["image_id"] not in known:
            unknown.add(f"annotation {annotation.get('id')}")
            continue
        labels[annotation["image_id"]].add(names[annotation["category_id"]])
    if unknown:
        raise InvalidDatasetError(
            f"Expected annotations of the images and categories of {name}. Received: {len(unknown)} of others, such as "
            f"{min(unknown)}. Export it again."
        )
    found = ((image["file_name"], labels[image["id"]]) for image in value["images"])
    return _of_subset("COCO", name, found)


def _datumaro(value: dict[str, Any], name: str) -> Export:
    names = [str(label["name"]) for label in value["categories"]["label"]["labels"]]

    def found() -> Iterable[tuple[Any, set[str]]]:
        for item in value["items"]:
            image = item.get("image") or item.get("media") or {}
            of_type = (one for one in item["annotations"] if one["type"] == "label")
            yield image.get("path") or str(item["id"]), {names[_index(one["label_id"], names)] for one in of_type}

    return _of_subset("Datumaro", name, found())


def _index(number: int, names: list[str]) -> int:
    if not 0 <= number < len(names):
        raise ValueError(f"label_id {number} of {len(names)} labels")
    return number


def _of_subset(kind: str, name: str, found: Iterable[tuple[Any, set[str]]]) -> Export:
    """Returns an export whose file is called after its subset: `annotations/train.json`, `instances_val2017.json`."""
    stem = PurePosixPath(name).stem
    subset = re.sub(r"^(instances|_?annotations?)[_.]", "", stem)
    split, rows, without = split_of(subset), list[Row](), list[str]()
    for path, labels in found:
        if not isinstance(path, str):
            raise TypeError(f"{path!r} as an image's name")
        paths = (f"images/{subset}/{path}", f"{subset}/{path}", path)
        if labels:
            rows.append(Row(paths, split, tuple(sorted(labels))))
        else:
            without.append(path)
    return Export(f"the {kind} export {name}", tuple(rows), {NO_ANNOTATION: without})


def _read_xml(content: bytes, name: str, wanted: frozenset[str] | None) -> Export | None:
    if b"<annotations" not in content[:65536]:
        return None
    # What begins as ASCII is in no encoding that could hide these.
    if b"<!DOCTYPE" in content or b"<!ENTITY" in content:
        raise InvalidDatasetError(
            f"Expected {name} without definitions of entities. Received: some. Export it from CVAT again."
        )
    try:
        root = ElementTree.fromstring(content)
    except ElementTree.ParseError as err:
        raise ValueError(str(err)) from err
    rows, without, others = list[Row](), list[str](), Counter[str]()
    for image in root.iter("image"):
        path, subset = image.attrib["name"], image.attrib.get("subset", "")
        labels = {tag.attrib["label"] for tag in image.iter("tag")}
        others.update(child.tag for child in image if child.tag != "tag")
        if labels:
            paths = (f"images/{subset}/{path}", f"images/{path}", path)
            rows.append(Row(paths, split_of(subset) if subset else None, tuple(sorted(labels))))
        else:
            without.append(path)
    if not rows and others:
        shapes = ", ".join(f"{count} {tag}" for tag, count in others.most_common(3))
        raise InvalidDatasetError(
            f"Expected tags of images in {name}, as classification has them. Received: {shapes}. "
            "Label the images by tags, or cut the objects out first."
        )
    notes = tuple(f"{name}: {count} {tag} are not used, tags are" for tag, count in others.items())
    return Export(f"the CVAT export {name}", tuple(rows), {NO_ANNOTATION: without}, notes)


def _from_json_min(task: dict[str, Any]) -> dict[str, Any]:
    """Returns a task of Label Studio's JSON-MIN as JSON has it."""
    choices = {
        key: value["choices"] if isinstance(value, dict) else [value]
        for key, value in task.items()
        if key not in {"image", "annotator", "created_at", "updated_at"}
        and (isinstance(value, str) or (isinstance(value, dict) and "choices" in value))
        and task.get("image") != value
    }
    results = [{"type": "choices", "from_name": key, "value": {"choices": value}} for key, value in choices.items()]
    return {"data": {"image": task["image"]}, "annotations": [{"result": results}]}


def _label_studio(tasks: list[dict[str, Any]], name: str, wanted: frozenset[str] | None) -> Export:
    said: dict[tuple[str, ...], list[frozenset[str]]] = {}
    questions: set[str] = set()
    for task in tasks:
        of_task = said.setdefault(_local_paths(_image_of(task["data"])), [])
        for annotation in task["annotations"]:
            if annotation.get("was_cancelled"):
                continue
            chosen: set[str] = set()
            for result in annotation["result"]:
                if result["type"] != "choices":
                    continue
                choices = {str(choice) for choice in result["value"]["choices"]}
                if wanted is None or choices & wanted:
                    questions.add(str(result.get("from_name")))
                    chosen |= choices if wanted is None else choices & wanted
            of_task.append(frozenset(chosen))
    if len(questions) > 1:
        raise InvalidDatasetError(
            f"Expected the choices of one question in {name}. Received: those of {', '.join(sorted(questions))}. "
            "Name the choices that are the classes, as in --classes cat,dog."
        )
    rows, without = list[Row](), defaultdict[str, list[str]](list)
    for paths, answers in said.items():
        if len(set(answers)) == 1 and answers[0]:
            rows.append(Row(paths, None, tuple(sorted(answers[0]))))
        else:
            without[DISAGREEMENT if len(set(answers)) > 1 else NO_ANNOTATION].append(paths[0])
    return Export(f"the Label Studio export {name}", tuple(rows), dict(without))


def _image_of(data: dict[str, Any]) -> str:
    texts = {key: value for key, value in data.items() if isinstance(value, str)}
    return texts["image"] if "image" in texts else next(iter(texts.values()), "")


def _local_paths(url: str) -> tuple[str, ...]:
    """Returns how the file behind Label Studio's address of an image may be called."""
    parts = urlsplit(url)
    path = parse_qs(parts.query)["d"][0] if "d" in parse_qs(parts.query) else unquote(parts.path)
    bare = PurePosixPath(path).name
    return (path, bare, _UPLOAD_PREFIX.sub("", bare))


def merged(exports: Iterable[Export]) -> Export:
    """Returns several files of one export as one."""
    first, *others = exports
    without: dict[str, list[str]] = defaultdict(list)
    for export in (first, *others):
        for reason, paths in export.without.items():
            without[reason] += paths
    names = ", ".join([first.kind, *(other.kind.rpartition(" ")[2] for other in others)])
    rows = tuple(row for export in (first, *others) for row in export.rows)
    return replace(first, kind=names, rows=rows, without=dict(without))


FindFile = Callable[[str], tuple[str | None, str]]


def locate(row: Row, find: FindFile) -> tuple[str | None, str]:
    """Returns the path of a row's file, or None and why there is none."""
    problem = ""
    for path in row.paths:
        found, why = find(path)
        if found is not None:
            return found, ""
        problem = why
    return None, problem
