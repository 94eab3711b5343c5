"""Reads the records of release 0.1, which had absolute paths and repeated each other's fields.

A path's last parts say which folder of the installation it is, wherever that was: `…/models/<name>/<version>`. To be
removed with the release that no longer takes over an installation of 0.1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

FIRST_RELEASE = "0.1"
_GROUPS = {
    "model": ("model_name", "version"),
    "provenance": ("ds_name", "dvc_tag", "dvc_md5"),
    "task": ("image_size", "preprocessing_hash", "class_names", "classifier_type"),
}
_RENAMED = {"tag": "dvc_tag", "model_version": "version", "plots": "plot_names", "manifest_path": "manifest"}


class _Shape(NamedTuple):
    """How a record of 0.1 differs: its groups were fields, its folder was told by a path, and it had more fields."""

    groups: tuple[str, ...] = ()
    path: str | None = None
    parts: int = 3
    dropped: tuple[str, ...] = ()


_SHAPES = {
    "dataset": _Shape(("provenance",), "directory"),
    "validation_report": _Shape((), "report_path"),
    "packed_images": _Shape(("provenance", "task"), "directory", parts=2),
    "model": _Shape(("model", "provenance", "task"), "directory", dropped=("keras_path", "epochs_run")),
    "evaluation": _Shape(("model",), "report_path", dropped=("predictions_path",)),
    "drift_detectors": _Shape(("model",), "uae_path"),
    "reference_data": _Shape(("model",), "path"),
    "bento": _Shape(("model",)),
    "deployment": _Shape(("model",)),
    "drift_report": _Shape(("model",), dropped=("moved_classes",)),
    "production_metrics": _Shape((), "record_path", parts=2),
}


def from_first_release(asset: str, old: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Returns what a record of 0.1 says, as this release writes it.

    Args:
        asset: whose record.
        old: its content.
        folder: of the experiment's records; an evaluation's threshold stands in the model's.

    Raises:
        KeyError, TypeError, AttributeError: it is no such record.
    """
    shape = _SHAPES[asset]
    new = {_RENAMED.get(name, name): value for name, value in old.items() if name not in shape.dropped}
    for group in shape.groups:
        new[group] = {name: new.pop(name) for name in _GROUPS[group]}
    if shape.path is not None:
        path = PurePosixPath(new.pop(shape.path))
        directory = path if shape.path == "directory" else path.parent
        new["directory"] = str(PurePosixPath(*directory.parts[-shape.parts :]))
    if asset == "dataset":
        new["manifest"] = PurePosixPath(new["manifest"]).name
    if asset == "drift_detectors":
        names = [name for name in new if name.startswith("false_alarm_")]
        new["false_alarms"] = {name.removeprefix("false_alarm_"): new.pop(name) for name in names}
    if asset == "evaluation":
        new["threshold"] = _threshold(folder)
    if "plot_names" in new:
        new["plot_names"] = list(new["plot_names"])
    for name in {"url", "report_url"} & new.keys():
        new[name] = _url(new[name], home=folder.parents[1])
    return new


def _url(url: str, home: Path) -> str:
    """Returns the address of a file in storage below the home as a path relative to it, any other as it is."""
    if not url or urlsplit(url).scheme not in {"", "file"}:
        return url
    path = PurePosixPath(unquote(urlsplit(url).path) if "://" in url else url)
    below = path.parts[path.parts.index("storage") :] if "storage" in path.parts else ()
    return str(PurePosixPath(*below)) if below and home.joinpath(*below).exists() else path.as_uri()


def _threshold(folder: Path) -> float:
    for path in (folder / "model" / f"{FIRST_RELEASE}.json", folder / "model.json"):
        if path.is_file():
            return float(json.loads(path.read_bytes())["effective_config"]["model"]["threshold"])
    return 0.5
