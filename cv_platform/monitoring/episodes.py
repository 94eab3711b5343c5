"""Episodes of drift: people hear of one when it begins, when it changes, and when it is over, not once a report.

An episode is a row of reports of one model version, against one reference, that say drift, whatever their windows; a
report without enough requests says nothing, and ends none. Who takes a window as the new normal (`drift accept`) makes
another reference, and so ends the episode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from sqlalchemy import Engine, Select, func, select

from cv_platform.database.schema import drift_reports
from cv_platform.records import DriftReport, ModelIdentity

_TABLE = drift_reports.c
Change = Literal["drift", "drift has changed", "drift is over"]


@dataclass(frozen=True)
class OpenEpisode:
    """Drift that lasts: the latest report that has a verdict says so."""

    report_id: str
    window_end_utc: datetime
    report_url: str


def open_episode(engine: Engine, *, experiment: str, model: ModelIdentity, reference: str = "") -> OpenEpisode | None:
    """Returns the drift that lasts of one model version against one reference; None where there is none.

    Args:
        engine: of the request log, where the reports are.
        experiment: whose reports.
        model: the version that answers.
        reference: see `DriftReport`.

    Raises:
        DatabaseUnavailableError, SchemaMismatchError: see `database.connection.make_engine`.
    """
    columns = (_TABLE.report_id, _TABLE.window_end_utc, _TABLE.report_url, _TABLE.verdict)
    with engine.connect() as connection:
        latest = connection.execute(_judged(columns, experiment, model, reference).limit(1)).one_or_none()
    if latest is None or latest.verdict != "drift":
        return None
    return OpenEpisode(str(latest.report_id), latest.window_end_utc, latest.report_url)


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
    columns = (_TABLE.verdict, _TABLE.details["drifted_detectors"].label("detectors"))
    before = (
        _judged(columns, report.experiment, report.model, report.reference)
        .where(_TABLE.report_id != UUID(report.report_id), _TABLE.window_end_utc <= report.window_end_utc)
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


def _judged(columns: Sequence[Any], experiment: str, model: ModelIdentity, reference: str) -> Select[Any]:
    """Selects the reports with a verdict, the latest first."""
    return (
        select(*columns)
        .where(
            _TABLE.experiment == experiment,
            _TABLE.model_name == model.model_name,
            _TABLE.model_version == model.version,
            _TABLE.verdict != "insufficient data",
            func.coalesce(_TABLE.details["reference"].astext, "") == reference,
        )
        .order_by(_TABLE.window_end_utc.desc(), _TABLE.created_on.desc())
    )
