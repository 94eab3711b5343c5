"""Sends the images of files and folders to a running service, one row for each: what `cv-platform predict` prints."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from cv_platform.errors import ImageError
from cv_platform.serving.api_models import PredictionResult
from cv_platform.serving.client import Client, ExplainChoice
from cv_platform.settings import Settings

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
"""By which the images of a folder are known; a file that is named itself is sent whatever its name is."""


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
        return {"file": str(self.path), **self.result.model_dump(mode="json")}

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


def expand(paths: Sequence[Path]) -> tuple[list[Path], list[FileAnswer]]:
    """Returns the files, in place of each folder the images below it, sorted by name; and the paths that give none."""
    files: list[Path] = []
    unusable: list[FileAnswer] = []
    for path in paths:
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            if not found:
                suffixes = ", ".join(sorted(SUFFIXES))
                error = f"Expected images ({suffixes}) in this folder. Received: none. Name another, or files."
                unusable.append(FileAnswer(path, None, error))
            files += found
        elif path.exists():
            files.append(path)
        else:
            error = "Expected an image file, or a folder of them. Received: nothing there. Correct the path."
            unusable.append(FileAnswer(path, None, error))
    return files, unusable


def predict_files(client: Client, files: Sequence[Path], *, explain: ExplainChoice) -> Iterator[FileAnswer]:
    """Yields an answer for each file, in their order, as they come.

    Raises:
        RequestRefusedError: the service refuses this client, whatever the file.
        ServiceError: the service cannot be reached, or has no time or no model.
    """
    for path in files:
        try:
            yield FileAnswer(path, client.predict(path, explain=explain), None)
        except ImageError as err:
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

    One that fails does not keep the others from being sent.

    Args:
        settings: its first API key is sent; its port is where the service is when `url` is None.
        paths: files, and folders of images.
        url: the service.
        as_json: JSON instead of a table.
        explain: what to ask for beside the probabilities; only JSON shows it.
        say: takes a line of the table, or an object.
        complain: takes a line on each file that failed; with `as_json` its object says so, too.

    Raises:
        RequestRefusedError, ServiceError: as `predict_files`.
    """
    files, unusable = expand(paths)
    api_key = settings.api_keys[0].get_secret_value() if settings.api_keys else None
    width = max((len(str(path)) for path in files), default=0)
    failures, has_header = 0, False
    with Client(url or f"http://127.0.0.1:{settings.service_port}", api_key=api_key) as client:
        for answer in chain(unusable, predict_files(client, files, explain=explain)):
            if answer.error is not None:
                failures += 1
                complain(f"{answer.path}: {answer.error}")
            elif not as_json:
                if not has_header:
                    say(_line(width, "file", "class", "probability", "prediction id"))
                    has_header = True
                say(_line(width, *answer.row()))
            if as_json:
                say(json.dumps(answer.as_json()))
    return failures


def _line(width: int, file: str, name: str, share: str, prediction_id: str) -> str:
    return f"{file:{width}}  {name:20}  {share:>11}  {prediction_id}".rstrip()
