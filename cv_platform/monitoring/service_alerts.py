"""What is wrong with the service, its log and its monitoring: people hear of it when it begins, and when it is over.

In containers Prometheus judges, by docker/prometheus/rules, and what fires there is passed on. Without one, as with
`make up`, the service's own metrics and the request log are read here; the thresholds are those of the rules with the
same names, whose sections in docs/how-to/alerts.md say what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

import httpx
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel, ConfigDict, ValidationError
from sqlalchemy import Engine, func, select

from cv_platform.client.loopback import direct_transport
from cv_platform.database.address import running_database_url
from cv_platform.database.connection import make_engine
from cv_platform.database.schema import drift_reports
from cv_platform.errors import ServiceError
from cv_platform.settings import Settings

OLDEST_ENTRY_SECONDS = 600
UNKNOWN_SHARE, FEWEST_IMAGES = 0.2, 100
"""Of an hour's images."""
STALE_AFTER = timedelta(days=1)
"""A drift report that the schedule has not made. Rules of Prometheus know no schedule: theirs is of one a week."""
TOLD_BY_REPORTS = frozenset({"DriftFound"})
_RECENT, _HOUR, _STRIDE = timedelta(minutes=15), timedelta(hours=1), timedelta(minutes=5)
_FAILED_SWAPS = ("refused", "fallback")
_TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True)
class Trouble:
    """Something that is wrong now.

    Attributes:
        name: of its section in docs/how-to/alerts.md.
        subject: what it is wrong with, where there may be several; empty otherwise.
        text: one or two sentences for people.
    """

    name: str
    text: str
    subject: str = ""

    @property
    def title(self) -> str:
        """For people, and the same as long as it lasts."""
        return f"{self.name} ({self.subject})" if self.subject else self.name


class Counted(BaseModel):
    """What the service had counted at one time: by name, from the start of its process on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    at: datetime
    counts: dict[str, float]


class AlertState(BaseModel):
    """What is kept from one look to the next.

    Attributes:
        told: titles of what people were told of, and not yet that it is over.
        history: what the service counted in the last hour, oldest first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    told: tuple[str, ...] = ()
    history: tuple[Counted, ...] = ()

    @classmethod
    def read(cls, text: str | None) -> AlertState:
        """Reads what was kept; what cannot be read any more is as good as nothing."""
        try:
            return cls.model_validate_json(text) if text else cls()
        except ValidationError:
            return cls()

    def increase(self, name: str, now: Counted, period: timedelta) -> float:
        """Returns by how much a count has grown in the period, as far as it was looked at; a restart begins at 0."""
        before = [seen for seen in self.history if seen.at <= now.at - period][-1:] or list(self.history[:1])
        value = now.counts.get(name, 0.0)
        known = before[0].counts.get(name, 0.0) if before else value
        return value - known if value >= known else value

    def with_counts(self, now: Counted) -> AlertState:
        """Returns the state with one look more, and without those that are too old to be compared with."""
        recent = [seen for seen in self.history if seen.at > now.at - _HOUR - _STRIDE]
        if not recent or now.at - recent[-1].at >= _STRIDE:
            recent.append(now)
        return self.model_copy(update={"history": tuple(recent)})


def look(
    settings: Settings, state: AlertState, periods: Mapping[str, timedelta], now: datetime
) -> tuple[list[Trouble], AlertState]:
    """Returns what is wrong now, and the state for the next look.

    Args:
        settings: where Prometheus is, or else the service and the request log.
        state: of the look before.
        periods: by experiment, the longest time from one scheduled report to the next one.
        now: with its zone.

    Raises:
        ServiceError: Prometheus, or where there is none the service, does not answer: nothing is said then.
        DatabaseUnavailableError, SchemaMismatchError: see `database.connection.make_engine`.
    """
    if settings.prometheus_url is not None:
        return firing(settings.prometheus_url), state
    troubles, state = service_troubles(f"http://127.0.0.1:{settings.service_port}", state, now)
    url = running_database_url(settings)
    if url is not None:
        engine = make_engine(url)
        try:
            troubles += stale_reports(engine, periods, now)
        finally:
            engine.dispose()
    return troubles, state


def firing(prometheus_url: str, *, but_for: Collection[str] = TOLD_BY_REPORTS) -> list[Trouble]:
    """Returns the alerts that fire in Prometheus, but for those of some names.

    Raises:
        ServiceError: it does not answer, or not as Prometheus does.
    """
    address = f"{prometheus_url.rstrip('/')}/api/v1/alerts"
    try:
        alerts = _get(address).json()["data"]["alerts"]
        return [
            Trouble(
                name=alert["labels"]["alertname"],
                subject=", ".join(
                    value
                    for label, value in sorted(alert["labels"].items())
                    if label not in {"alertname", "severity", "job"}
                ),
                text=f"{alert['annotations']['summary']}. {alert['annotations']['description']}",
            )
            for alert in alerts
            if alert["state"] == "firing" and alert["labels"]["alertname"] not in but_for
        ]
    except (ValueError, KeyError, TypeError) as err:
        raise ServiceError(f"Expected the alerts of Prometheus from {address}. Received: {err!r}.") from err


def service_troubles(address: str, state: AlertState, now: datetime) -> tuple[list[Trouble], AlertState]:
    """Returns what the service's metrics say is wrong, and the state with what they count.

    Args:
        address: of the service, such as `http://127.0.0.1:4242`.
        state: of the look before.
        now: with its zone.

    Raises:
        ServiceError: it does not answer, or not as the service does.
    """
    text = _get(f"{address}/metrics").text
    try:
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    except ValueError as err:
        raise ServiceError(f"Expected the metrics of the service from {address}/metrics. Received: {err}.") from err

    def values(name: str, **labels: Collection[str]) -> list[float]:
        return [
            sample.value
            for sample in samples
            if sample.name == name and all(sample.labels[label] in wanted for label, wanted in labels.items())
        ]

    counted = Counted(
        at=now,
        counts={
            "swaps": sum(values("cv_model_swaps_total", outcome=_FAILED_SWAPS)),
            "lost": sum(values("cv_log_dropped_entries_total")) + sum(values("cv_log_append_failures_total")),
            "images": sum(values("cv_prediction_confidence_ratio_count")),
            "unknown": sum(values("cv_predictions_unknown_total")),
        },
    )
    found: list[Trouble] = []
    if (oldest := max(values("cv_spool_oldest_entry_age_seconds"), default=0.0)) > OLDEST_ENTRY_SECONDS:
        found.append(Trouble("SpoolOld", f"Log entries do not reach the database. The oldest waits {oldest:.0f} s."))
    if rejected := sum(values("cv_spool_rejected_entries")):
        found.append(
            Trouble("LogEntriesRejected", f"The database refuses {rejected:.0f} log entries for good: they are kept.")
        )
    if state.increase("swaps", counted, _RECENT):
        found.append(Trouble("ModelSwapFailed", "The service has not taken up a model, and goes on with the last one."))
    if lost := state.increase("lost", counted, _RECENT):
        found.append(
            Trouble("LogEntriesLost", f"{lost:.0f} requests of the last 15 minutes have no log entry; see the disk.")
        )
    images = state.increase("images", counted, _HOUR)
    unknown = state.increase("unknown", counted, _HOUR)
    if images >= FEWEST_IMAGES and unknown > UNKNOWN_SHARE * images:
        said = f"{unknown:.0f} of {images:.0f} images of the last hour show nothing that the model has learned."
        found.append(Trouble("UnknownImages", said))
    return found, state.with_counts(counted)


def stale_reports(engine: Engine, periods: Mapping[str, timedelta], now: datetime) -> list[Trouble]:
    """Returns of which experiments the latest drift report is too old; one that never had any is not waited for.

    Raises:
        DatabaseUnavailableError, SchemaMismatchError: see `database.connection.make_engine`.
    """
    made = func.max(drift_reports.c.created_on)
    latest = select(drift_reports.c.experiment, made).group_by(drift_reports.c.experiment)
    with engine.connect() as connection:
        rows = dict(connection.execute(latest).tuples().all())
    return [
        Trouble(
            "MonitoringStale",
            f"The latest drift report is of {rows[name]:%Y-%m-%d}; one was due by {rows[name] + period:%Y-%m-%d}.",
            name,
        )
        for name, period in periods.items()
        if name in rows and now - rows[name] > period + STALE_AFTER
    ]


def tell(state: AlertState, troubles: Sequence[Trouble], send: Callable[[str, str], bool]) -> AlertState:
    """Tells people what has begun and what is over since the look before, in a message each.

    Args:
        state: of that look.
        troubles: all that are there now.
        send: takes title and text, and says whether they reached anybody; what did not is told at the next look.
    """
    now = {trouble.title: trouble for trouble in troubles}
    told = set(state.told)
    changes: tuple[tuple[Literal["over: ", ""], list[str]], ...] = (
        ("", [title for title in now if title not in told]),
        ("over: ", [title for title in state.told if title not in now]),
    )
    for kind, titles in changes:
        if not titles:
            continue
        lines = [f"{title}: {now[title].text}" if title in now else f"{title}." for title in titles]
        sections = sorted({title.partition(" ")[0] for title in titles})
        lines += [f"What to do: docs/how-to/alerts.md, {', '.join(sections)}."] if not kind else []
        if send(f"{kind}{', '.join(titles)}", "\n".join(lines)):
            told ^= set(titles)
    return state.model_copy(update={"told": tuple(sorted(told))})


def _get(address: str) -> httpx.Response:
    try:
        with httpx.Client(transport=direct_transport(address), timeout=_TIMEOUT_SECONDS) as client:
            return client.get(address).raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as err:
        raise ServiceError(f"Expected an answer of {address}. Received: {err!r}.") from err
