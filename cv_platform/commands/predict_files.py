"""Sends the images of files and folders to a running service, one row for each: what `cv-platform predict` prints."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from cv_platform.client import Client, ExplainChoice, UnusableImageError
from cv_platform.client.answers import PredictionResult
from cv_platform.images.files import SUPPORTED_FORMATS, TEXT_SUFFIXES, is_litter, seems_image
from cv_platform.settings import Settings

LARGEST_LEFT_OUT_FRACTION = 0.1
"""Of the files in folders, text apart: when more are no images that can be sent, something is wrong."""


@dataclass(frozen=True)
class FileAnswer:
    """What became of one file: a result or an error, never both."""

    path: Path
    result: PredictionResult | None
    error: str | None

    def as_json(self) -> dict[str, Any]:
        """Returns the fields of `POST /predict`, or the error, with the file's path."""
        if self.result is None:
            return {"file": str(self.path), "error": self.error}
        return {"file": str(self.path), **asdict(self.result), "prediction_id": str(self.result.prediction_id)}

    def row(self) -> tuple[str, str, str, str]:
        """Returns file, class, its probability in percent, and prediction id.

        Raises:
            ValueError: there is an error instead.
        """
        result = self.result
        if result is None:
            raise ValueError(f"Expected a result. Received: {self.error}")
        chosen = [result.prediction.get(name) for name in result.predicted_classes]
        shares = " ".join("–" if share is None else f"{share:.1%}" for share in chosen)
        return str(self.path), result.predicted_class or "(none)", shares, str(result.prediction_id)


@dataclass(frozen=True)
class Expanded:
    """What paths stand for.

    Attributes:
        files: the files to send; in place of a folder the images below it, by content, sorted by name.
        left_out: how many other files lie in the folders, by suffix in lower case; "" for those without one.
        unusable: the paths, and the folders' files, that give nothing to send.
    """

    files: list[Path]
    left_out: Counter[str]
    unusable: list[FileAnswer]


def expand(paths: Sequence[Path]) -> Expanded:
    """Finds the files to send; one that is named itself is sent whatever it is."""
    expanded = Expanded([], Counter(), [])
    for path in paths:
        if path.is_dir():
            _expand_folder(path, expanded)
        elif path.exists():
            expanded.files.append(path)
        else:
            error = "Expected an image file, or a folder of them. Received: nothing there. Correct the path."
            expanded.unusable.append(FileAnswer(path, None, error))
    return expanded


def _expand_folder(folder: Path, expanded: Expanded) -> None:
    found_before = len(expanded.files)
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        if any(is_litter(part) for part in file.relative_to(folder).parts):
            continue
        try:
            if seems_image(file):
                expanded.files.append(file)
            else:
                expanded.left_out[file.suffix.lower()] += 1
        except OSError as err:
            error = f"Expected a file that can be read. Received: {err.strerror}. Correct its rights, or move it away."
            expanded.unusable.append(FileAnswer(file, None, error))
    if len(expanded.files) == found_before:
        known = ", ".join(SUPPORTED_FORMATS)
        error = f"Expected images ({known}) in this folder. Received: none. Name another, or files."
        expanded.unusable.append(FileAnswer(folder, None, error))


def predict_files(client: Client, files: Sequence[Path], *, explain: ExplainChoice) -> Iterator[FileAnswer]:
    """Yields an answer for each file, in their order, as they come.

    Raises:
        RequestRefusedError: the service refuses this client, whatever the file.
        ServiceUnavailableError: the service cannot be reached, or has no time or no model.
    """
    for path in files:
        try:
            yield FileAnswer(path, client.predict(path, explain=explain), None)
        except UnusableImageError as err:
            yield FileAnswer(path, None, str(err))


def show_predictions(
    settings: Settings,
    paths: Sequence[Path],
    *,
    url: str | None,
    as_json: bool,
    explain: ExplainChoice,
    say: Callable[[str], None],
    complain: Callable[[str], None],
) -> int:
    """Says what a service answers to each file: a table, or one JSON object per line; returns how many files failed.

    One that fails does not keep the others from being sent. What was left out of folders counts as failed where it is a
    large share.

    Args:
        settings: its first API key is sent; its port is where the service is when `url` is None.
        paths: files, and folders of images.
        url: the service.
        as_json: JSON instead of a table.
        explain: what to ask for beside the probabilities; only JSON shows it.
        say: takes a line of the table, or an object.
        complain: takes a line on each file that failed (with `as_json` its object says so, too), and at the end one on
            what was left out of the folders.

    Raises:
        RequestRefusedError, ServiceUnavailableError: as `predict_files`.
    """
    expanded = expand(paths)
    api_key = settings.api_keys[0].get_secret_value() if settings.api_keys else None
    width = max((len(str(path)) for path in expanded.files), default=0)
    failures, has_header = 0, False
    with Client(url or f"http://127.0.0.1:{settings.service_port}", api_key=api_key) as client:
        for answer in chain(expanded.unusable, predict_files(client, expanded.files, explain=explain)):
            if answer.error is not None:
                failures += 1
                complain(f"error: {answer.path}: {answer.error}")
            elif not as_json:
                if not has_header:
                    say(_line(width, "file", "class", "probability", "prediction id"))
                    has_header = True
                say(_line(width, *answer.row()))
            if as_json:
                say(json.dumps(answer.as_json()))
    if expanded.left_out:
        counts = ", ".join(f"{suffix or 'no suffix'} {count}" for suffix, count in expanded.left_out.most_common())
        missed = sum(count for suffix, count in expanded.left_out.items() if suffix not in TEXT_SUFFIXES)
        is_many = missed > LARGEST_LEFT_OUT_FRACTION * (len(expanded.files) + missed)
        complain(
            f"{'error: ' if is_many else ''}left out, as they are none of {', '.join(SUPPORTED_FORMATS)}: {counts}."
            + (" Convert those that are images." if is_many else "")
        )
        failures += missed if is_many else 0
    return failures


def _line(width: int, file: str, name: str, share: str, prediction_id: str) -> str:
    return f"{file:{width}}  {name:20}  {share:>11}  {prediction_id}".rstrip()
