"""Episodes of drift: people hear of one when it begins, when it changes, and when it is over, not once a report.

An episode is a row of reports of one model version that say drift, whatever their windows; a report without enough
requests says nothing, and ends none.
"""

from __future__ import annotations

from typing import Literal
from uuid import UUID

from sqlalchemy import Engine, select

from cv_platform.database.schema import drift_reports
from cv_platform.records import DriftReport

Change = Literal["drift", "drift has changed", "drift is over"]


def what_changed(engine: Engine, report: DriftReport) -> Change | None:
    """Returns what `report` changes about the latest report before it that has a verdict; None: nothing.

    Drift has changed where a detector fires that did not fire then. Of the same window judged again, the outcome is the
    same, as a report is never compared with itself.

    Args:
        engine: of the request log, where the earlier reports are.
        report: kept there already, or not yet.

    Raises:
        DatabaseUnavailableError, SchemaMismatchError: see `database.connection.make_engine`.
    """
    if report.verdict == "insufficient data":
        return None
    table = drift_reports.c
    before = (
        select(table.verdict, table.details["drifted_detectors"].label("detectors"))
        .where(
            table.experiment == report.experiment,
            table.model_name == report.model.model_name,
            table.model_version == report.model.version,
            table.verdict != "insufficient data",
            table.report_id != UUID(report.report_id),
            table.window_end_utc <= report.window_end_utc,
        )
        .order_by(table.window_end_utc.desc(), table.created_on.desc())
        .limit(1)
    )
    with engine.connect() as connection:
        earlier = connection.execute(before).one_or_none()
    was_drifting = earlier is not None and earlier.verdict == "drift"
    if report.verdict == "no drift":
        return "drift is over" if was_drifting else None
    if earlier is None or not was_drifting:
        return "drift"
    return "drift has changed" if set(report.drifted_detectors) - set(earlier.detectors or ()) else None
