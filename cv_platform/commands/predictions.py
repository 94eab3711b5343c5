"""`cv-platform passport` and `cv-platform replay`: what is known of one answer, and whether it comes out again.

Neither needs a running service: an answer is in a spool of this host or in the request log's database, its model in
central storage, its training images in `CV_HOME`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import numpy as np
import yaml

from cv_platform.commands.labels import log_engine
from cv_platform.errors import CvPlatformError, DatabaseError, StorageError
from cv_platform.settings import Settings
from cv_platform.storage import BundleMetadata, CentralStorage

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from cv_platform.serving.log.entry import StoredPrediction

CANNOT_TELL = 3
"""Exit status of a replay that has nothing to compare."""


def add_commands(command: Callable[[str, object, str], argparse.ArgumentParser]) -> None:
    """Adds the commands; `command` makes one of its name, function and description."""
    passport = command("passport", _passport, "show all that is known of one answer of the service")
    replay = command(
        "replay",
        _replay,
        "ask the model that answered again: status 0 says that it answers alike, 1 that it does not, 3 that the image "
        "or the model is gone",
    )
    for sub in (passport, replay):
        sub.add_argument("prediction_id", type=UUID, help="as the service returned it")
    passport.add_argument("--json", action="store_true", help="print JSON instead of YAML")


def _passport(options: argparse.Namespace) -> int:
    settings = Settings.from_environment()
    with log_engine() as engine:
        known = full_passport(settings, engine, find_answer(settings, engine, options.prediction_id))
    print(json.dumps(known) if options.json else yaml.safe_dump(known, sort_keys=False, allow_unicode=True), end="")
    return 0


def _replay(options: argparse.Namespace) -> int:
    settings = Settings.from_environment()
    try:
        with log_engine() as engine:
            stored = find_answer(settings, engine, options.prediction_id)
        done = replay(settings, stored)
    except CvPlatformError as err:
        print(f"error: {err}", file=sys.stderr)
        return CANNOT_TELL
    print(done)
    return 0 if done.is_alike else 1


def find_answer(settings: Settings, engine: Engine, prediction_id: UUID) -> StoredPrediction:
    """Returns an answer, with its upload, from a spool of this host or from the database.

    Raises:
        DatabaseError: it is nowhere, or the database cannot be asked; the message says whether it was deleted.
    """
    from sqlalchemy import select

    from cv_platform.database.schema import deletions
    from cv_platform.serving.log.spool_file import find_spooled
    from cv_platform.serving.log.tables import find_prediction

    folders = [settings.home / "spool", *([settings.spool_archive] if settings.spool_archive else [])]
    for folder in folders:
        found = find_spooled(folder, prediction_id)
        if found is not None:
            return found
    found = find_prediction(engine, prediction_id)
    if found is not None:
        return found
    deleted = select(deletions.c.created_on).where(deletions.c.prediction_id == prediction_id)
    with engine.connect() as connection:
        deleted_on = connection.scalar(deleted)
    what = f"it was deleted on {deleted_on:%Y-%m-%d %H:%M} UTC" if deleted_on else "there is none in the request log"
    hint = "" if deleted_on else " It may wait in the spool of another host, or be older than CV_LOG_RETENTION_DAYS."
    raise DatabaseError(f"Expected the prediction {prediction_id}. Received: {what}.{hint}")


def full_passport(settings: Settings, engine: Engine, stored: StoredPrediction) -> dict[str, Any]:
    """Returns all that is known of an answer, as JSON values; what nobody knows is null, with a reason beside it."""
    from cv_platform.serving.log.passport import make_passport

    storage = CentralStorage(settings.storage_url)
    metadata, reason = None, None
    try:
        metadata = storage.read_metadata(stored.model_name, stored.model_version)
    except StorageError as err:
        reason = str(err)
    public_url = settings.mlflow_public_url
    known = make_passport(stored, metadata, mlflow_url=public_url, reason=reason)
    known["prediction"] |= {
        "probabilities": stored.prediction_json,
        "explanation": None if stored.raw_hm is None else f"a heat-map of {'×'.join(map(str, stored.raw_hm.shape))}",
    }
    known |= _from_log(engine, stored)
    known["training_data"] = _training_use(settings, storage, stored, metadata)
    return known


def _from_log(engine: Engine, stored: StoredPrediction) -> dict[str, Any]:
    """Returns the request, what people said, who was asked, and the drift reports whose window the answer lies in."""
    from sqlalchemy import select

    from cv_platform.database.schema import api_log, drift_reports, feedback, labeling_items

    of_answer = stored.prediction_id
    request = select(
        api_log.c.request_method, api_log.c.request_url, api_log.c.response_message, api_log.c.timespan
    ).where(api_log.c.prediction_id == of_answer)
    statements = (
        select(feedback.c.true_class, feedback.c.source, feedback.c.created_on)
        .where(feedback.c.prediction_id == of_answer)
        .order_by(feedback.c.id)
    )
    asked = select(
        labeling_items.c.experiment,
        labeling_items.c.reason,
        labeling_items.c.window_end_utc,
        labeling_items.c.skipped_by,
    ).where(labeling_items.c.prediction_id == of_answer)
    reports = (
        select(
            drift_reports.c.report_id,
            drift_reports.c.verdict,
            drift_reports.c.window_start_utc,
            drift_reports.c.window_end_utc,
            drift_reports.c.report_url,
        )
        .where(drift_reports.c.model_name == stored.model_name, drift_reports.c.model_version == stored.model_version)
        .where(drift_reports.c.window_start_utc <= stored.created_on)
        .where(drift_reports.c.window_end_utc > stored.created_on)
        .order_by(drift_reports.c.created_on)
    )
    with engine.connect() as connection:

        def rows(query: Any) -> list[dict[str, Any]]:
            found = connection.execute(query).mappings().all()
            # SQLAlchemy's names are a kind of text of its own, which YAML refuses.
            return [{str(name): _plain(value) for name, value in row.items()} for row in found]

        requests = rows(request)
        return {
            "request": requests[0] if requests else None,
            "feedback": rows(statements),
            "labelling_queue": rows(asked),
            "drift_reports": rows(reports),
        }


def _plain(value: Any) -> Any:
    if isinstance(value, str | int | float | list | None):
        return value
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _training_use(
    settings: Settings, storage: CentralStorage, stored: StoredPrediction, metadata: BundleMetadata | None
) -> dict[str, Any]:
    """Says whether the model has learned from this very file, and in which split of its dataset it lies.

    `has_learned` is true for the splits train and valid, by which the model was made and chosen.
    """
    from cv_platform.deployment.bundle import TRAINED_ON
    from cv_platform.deployment.champion import images_seen

    if stored.image_sha256 is None or metadata is None:
        missing = "the upload was not kept" if metadata else "the model's metadata are gone"
        return {"has_learned": None, "splits": None, "reason": missing}
    has_learned, reason = None, "its bundle does not say what the model was trained on"
    splits = _splits_of(settings, metadata, stored.image_sha256)
    try:
        folder, _ = storage.fetch_bundle(metadata.model_name, metadata.version, settings.home / "cache" / "bundles")
        seen = images_seen(folder / TRAINED_ON, [stored.image_sha256])
        has_learned, reason = (None, reason) if seen is None else (bool(seen[0]), None)
    except StorageError as err:
        reason = str(err)
    if has_learned is None and splits is not None:
        has_learned, reason = bool({"train", "valid"} & set(splits)), None
    return {"has_learned": has_learned, "splits": splits, "reason": reason}


def _splits_of(settings: Settings, metadata: BundleMetadata, sha256: str) -> list[str] | None:
    """Returns the splits that hold a file; None where the checkout that the model was trained on is not here."""
    from cv_platform.config import parse_experiment
    from cv_platform.datasets.manifest import manifest_name, read_manifest

    try:
        config = parse_experiment(metadata.effective_config, origin=f"the bundle of {metadata.model_name}")
        checkout = settings.home / "worktrees" / metadata.ds_name / metadata.dvc_md5
        rows = read_manifest(checkout / manifest_name(config.model, config.dataset))
    except CvPlatformError:
        return None
    return sorted({str(split) for split in rows.loc[rows["sha256"] == sha256, "split"].dropna()})


@dataclass(frozen=True)
class Replay:
    """An answer beside what the same model says of the same upload now.

    Attributes:
        model: name and version.
        then: class, or classes joined by `|`.
        now: likewise.
        difference: the largest of any class's probability.
        tolerance: what the bundle allows its own self-test: another CPU rounds otherwise.
    """

    model: str
    then: str
    now: str
    difference: float
    tolerance: float

    @property
    def is_alike(self) -> bool:
        """Whether the probabilities are the same within the tolerance; a class may only change with them."""
        return self.difference <= self.tolerance

    def __str__(self) -> str:
        """Returns the comparison for people."""
        verdict = "alike" if self.is_alike else "not alike"
        return (
            f"{self.model} answered {self.then or 'no class'}, and now answers {self.now or 'no class'}: {verdict}. "
            f"Probabilities differ by {self.difference:.3g} at most, allowed {self.tolerance:.3g}."
        )


def replay(settings: Settings, stored: StoredPrediction) -> Replay:
    """Lets the bundle that answered a stored upload answer it again.

    Raises:
        DatabaseError: the upload is not in the log.
        StorageError: the bundle is gone, or (CorruptBundleError) does not hold.
        ImageError: this installation does not decode the upload.
    """
    from cv_platform.predictions import LABEL_SEPARATOR
    from cv_platform.serving.model.runtime import GOLDEN, fetch, load_folder
    from cv_platform.serving.routes.answer import predict_upload

    if stored.image is None:
        raise DatabaseError(
            f"Expected the upload of {stored.prediction_id}. Received: none, as the log did not keep it "
            "(CV_LOG_IMAGES) or has given it up by its age (CV_IMAGE_RETENTION_DAYS). Without it nothing can be asked "
            "again."
        )
    storage, cache = CentralStorage(settings.storage_url), settings.home / "cache" / "bundles"
    folder, metadata = fetch(storage, stored.model_name, stored.model_version, cache=cache)
    model = load_folder(folder, metadata)
    now = predict_upload(model, stored.image, max_pixels=settings.max_upload_pixels)
    difference = np.abs(now.prediction.probabilities.astype(np.float64) - stored.bbsd_feats).max()
    return Replay(
        model=f"{stored.model_name} {stored.model_version}",
        then=stored.predicted_class,
        now=LABEL_SEPARATOR.join(now.predicted_classes),
        difference=float(difference),
        tolerance=_tolerance(folder / GOLDEN),
    )


def _tolerance(golden: Path) -> float:
    with np.load(golden, allow_pickle=False) as archive:
        return float(archive["tolerance"][0])
