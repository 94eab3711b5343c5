"""Takes a window of requests as the new normal of the model version that answered them: `cv-platform drift accept`.

The rows of the window become a reference version beside that of the reference split, which stays. They have the labels
that people stated, and no others: what needs labels goes on with the reference split. A prediction that is deleted
leaves them with the next report or the next night, whichever comes first.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy import Engine, select

from cv_platform.audit import AuditLog, Note
from cv_platform.config import MonitorConfig
from cv_platform.database.schema import deletions, drift_reports
from cv_platform.database.uploads import read_feedback
from cv_platform.drift.reference import read_identity, write_reference
from cv_platform.errors import DriftError
from cv_platform.monitoring.window import WindowBounds, read_window
from cv_platform.records import ModelIdentity
from cv_platform.storage import AcceptedReference, CentralStorage

logger = logging.getLogger(__name__)

FEWEST_ROWS = 20
"""The least that `monitor.min_samples` may be."""


def find_report(engine: Engine, report_id: str) -> tuple[str, ModelIdentity, WindowBounds]:
    """Returns experiment, model version and window of a drift report.

    Raises:
        DriftError: there is no such report, or its id is none.
        DatabaseUnavailableError, SchemaMismatchError: see `database.connection.make_engine`.
    """
    table = drift_reports.c
    columns = (table.experiment, table.model_name, table.model_version, table.window_start_utc, table.window_end_utc)
    try:
        wanted = select(*columns, table.details["window_by"].astext.label("by")).where(
            table.report_id == UUID(report_id)
        )
    except ValueError as err:
        raise DriftError(
            f"Expected the id of a drift report, a UUID. Received: {report_id!r}. Its page has it."
        ) from err
    with engine.connect() as connection:
        found = connection.execute(wanted).one_or_none()
    if found is None:
        raise DriftError(f"Expected the id of a drift report. Received: {report_id}, of which the log has none.")
    model = ModelIdentity(model_name=found.model_name, version=found.model_version)
    by = "logged" if found.by == "logged" else "answered"
    return found.experiment, model, WindowBounds(found.window_start_utc, found.window_end_utc, by)


def current_normal(engine: Engine, storage: CentralStorage, model: ModelIdentity, cache: Path) -> Path | None:
    """Returns a local path of the accepted window's rows, without predictions that were deleted since.

    None where no window was accepted, or too few of its rows are left: the reference split is the reference then.

    Raises:
        DatabaseUnavailableError, SchemaMismatchError, StorageError: see there.
    """
    name = {"model_name": model.model_name, "version": model.version}
    accepted = storage.read_accepted(**name)
    if accepted is None:
        return None
    path = storage.fetch_accepted(**name, accepted=accepted, cache=cache)
    table = pq.read_table(path)
    gone = _deleted(engine, table["path"].to_pylist())
    if not gone:
        return path
    kept = table.filter(pa.array([one not in gone for one in table["path"].to_pylist()]))
    after = accepted.model_copy(
        update={"rows": kept.num_rows, "forgotten": accepted.forgotten + table.num_rows - kept.num_rows}
    )
    logger.info("%s: %d deleted predictions left the accepted reference", model, table.num_rows - kept.num_rows)
    with tempfile.TemporaryDirectory() as folder:
        partial = Path(folder) / "accepted.parquet"
        pq.write_table(kept, partial, compression="zstd")
        is_enough = kept.num_rows >= FEWEST_ROWS
        storage.forget_accepted(partial if is_enough else None, **name, before=accepted, after=after)
    if not storage.is_local:
        path.unlink(missing_ok=True)  # The copy of this machine.
    return storage.fetch_accepted(**name, accepted=after, cache=cache) if is_enough else None


def forget_deleted(engine: Engine, storage: CentralStorage, model_names: Iterable[str], cache: Path) -> None:
    """Takes deleted predictions out of the accepted windows of all versions of these models.

    Raises:
        DatabaseUnavailableError, SchemaMismatchError, StorageError: see there.
    """
    for model_name in sorted(set(model_names)):
        for version in storage.accepted_versions(model_name):
            current_normal(engine, storage, ModelIdentity(model_name=model_name, version=version), cache)


def _deleted(engine: Engine, ids: Sequence[str]) -> set[str]:
    """Returns which of these predictions were deleted on purpose; those that were kept long enough are not."""
    wanted = select(deletions.c.prediction_id).where(deletions.c.prediction_id.in_([UUID(one) for one in ids]))
    with engine.connect() as connection:
        return {str(one) for one in connection.execute(wanted).scalars()}


def accept_window(
    report_id: str, monitor: MonitorConfig, *, engine: Engine, storage: CentralStorage, cache: Path, note: Note
) -> AcceptedReference:
    """Makes the requests of a report's window what later requests of that model version are compared with.

    It is in the audit log before it is done, and ends an open episode: the next report begins anew.

    Args:
        report_id: of the report whose window it is.
        monitor: `min_samples`, `max_samples`, `repeats` and `seed`, by which the window is read.
        engine: of the request log.
        storage: where the reference goes.
        cache: folder for downloads.
        note: who takes it as normal, and why; the reason may not be blank.

    Raises:
        DriftError: there is no such report, no reason, or the window has too few usable requests (any more).
        BundleNotFoundError, DatabaseUnavailableError, SchemaMismatchError, StorageError: see there.
    """
    if not note.because.strip():
        raise DriftError('Expected a reason, which is kept with the reference. Received: none. Say --because "…".')
    experiment, model, bounds = find_report(engine, report_id)
    window = read_window(engine, model, bounds, monitor)
    if window.sample is None or len(window.sample) < monitor.min_samples:
        raise DriftError(
            f"Expected at least {monitor.min_samples} usable requests (monitor.min_samples) in the window of "
            f"{report_id}. Received: {0 if window.sample is None else len(window.sample)}."
        )
    split = storage.fetch_reference_data(model.model_name, model.version, cache)
    ids = window.rows["prediction_id"].tolist()
    stated = read_feedback(engine, ids)
    accepted = AcceptedReference(
        report_id=str(UUID(report_id)),
        rows=len(window.sample),
        window_start_utc=bounds.start,
        window_end_utc=bounds.end,
        at_utc=datetime.now(UTC),
        by=note.by,
        because=note.because,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "accepted.parquet"
        write_reference(
            path,
            read_identity(split),
            window.sample,
            paths=[str(one) for one in ids],
            sha256=window.rows["image_sha256"].fillna("").tolist(),
            labels=[stated.get(one, "") for one in ids],
            predicted=window.rows["predicted_class"].tolist(),
        )
        with AuditLog(storage.url).noted("accept", f"{experiment}: {model}, report {accepted.report_id}", note):
            storage.accept_reference(path, model.model_name, model.version, accepted)
    return accepted
