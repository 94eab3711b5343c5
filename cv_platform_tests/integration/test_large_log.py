"""What is asked often reads few pages, whatever the size of the log: the plans of a real PostgreSQL."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any, cast
from uuid import uuid4

import pytest
from sqlalchemy import Engine, insert, select, text

from cv_platform.database.schema import FOLDER, feedback, predictions
from cv_platform.database.version_index import model_versions
from cv_platform.monitoring.loop import _count_labels  # pyright: ignore[reportPrivateUsage]
from cv_platform.monitoring.window import count_requests, estimate_rows, last_request
from cv_platform.serving.log.labels import Wish, tasks
from cv_platform_tests.integration.test_monitoring_window import log, row
from cv_platform_tests.support.query_plans import explained

END = datetime(2026, 2, 8, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
ROWS = 20_000
"""A request of `m` in each minute before `END`, of three versions in turns, every second with an upload of its own; the
first hundred rows are of another model."""
_FILL = text(
    """
    WITH made AS (
        SELECT n, CAST(:end_ AS timestamptz) - n * interval '1 minute' AS moment, lpad(n::text, 64, '0') AS sha256
        FROM generate_series(1, :rows) AS n
    ), uploads AS (
        INSERT INTO images (sha256, content, bytes, media_type, created_on)
        SELECT sha256, '', 0, 'image/png', moment FROM made WHERE n % 2 = 0
    )
    INSERT INTO predictions (prediction_id, model_name, model_version, predicted_class, prediction_json, uae_feats,
        bbsd_feats, features, properties, image_sha256, created_on, logged_on)
    SELECT gen_random_uuid(), CASE WHEN n > :rows - 100 THEN 'other' ELSE 'm' END, 'v' || n % 3, 'cat',
        '{"cat": 0.75, "dog": 0.25}', array_fill(n::real, ARRAY[32]), ARRAY[0.75, 0.25], '{}', '{}',
        CASE WHEN n % 2 = 0 THEN sha256 END, moment, moment
    FROM made ORDER BY n DESC
    """
)


@pytest.fixture
def large(engine: Engine) -> Engine:
    with engine.begin() as connection:
        connection.execute(_FILL, {"end_": END, "rows": ROWS})
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE predictions"))
        pages = connection.execute(text("SELECT pg_relation_size('predictions') / 8192")).scalar_one()
    assert pages > 500
    return engine


def test_the_versions_that_have_predictions_are_found_by_steps_in_an_index(large: Engine) -> None:
    found: list[list[tuple[Any, ...]]] = []
    with explained(large) as plans, large.connect() as connection:
        for name in (None, "m", "other", "none"):
            rows = connection.execute(select(model_versions(name)))
            found.append([tuple(row) for row in rows])
    of_m, of_other = ([(name, f"v{number}") for number in range(3)] for name in ("m", "other"))
    assert found == [of_m + of_other, of_m, of_other, []]
    assert (plans.sequential(), plans.pages < 100) == (set(), True), plans


def test_the_last_request_is_found_without_a_look_at_the_others(large: Engine) -> None:
    late, newest = END - 5 * MINUTE, END + 7 * MINUTE
    log(
        large,
        row(late, model_version="v4"),
        row(newest, model_version="v0"),  # An older version answers again.
        row(newest + MINUTE, model_name="other"),
    )
    log(large, row(newest + MINUTE, client=FOLDER))  # Nobody sent it.
    with explained(large) as plans:
        last = [last_request(large, model_name=name) for name in ("m", "other", "none")]
    assert last == [newest, newest + MINUTE, None]
    assert (plans.sequential(), plans.pages < 100) == (set(), True), plans


@pytest.mark.parametrize(
    ("model_name", "after", "most", "expected"),
    [
        ("m", END - 31 * MINUTE, 1000, 30),  # A moment is before what comes after it.
        ("m", None, 50, 50),
        ("m", END - 90 * 24 * 60 * MINUTE, 50, 50),
        ("m", END, 1000, 0),
        ("other", None, 1000, 100),  # Which a busy log hides.
        ("other", END - 1000 * MINUTE, 1000, 0),
        ("none", None, 1000, 0),
    ],
)
def test_requests_are_counted_up_to_a_number_and_no_further(
    large: Engine, model_name: str, after: datetime | None, most: int, expected: int
) -> None:
    log(large, row(END - MINUTE, client=FOLDER))
    with explained(large) as plans:
        assert count_requests(large, model_name=model_name, after=after, most=most) == expected
    assert (plans.sequential(), plans.pages < 150) == (set(), True), plans


def test_an_estimate_is_near_what_there_is_and_reads_no_row(large: Engine) -> None:
    assert estimate_rows(large, model_name="m") == pytest.approx(ROWS - 100, rel=0.02)
    assert estimate_rows(large, model_name="none") < 200


def test_a_review_looks_at_the_latest_answers_alone(large: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cv_platform.serving.log.labels._MOST_ROWS", 24)
    monkeypatch.setattr("cv_platform.serving.log.labels._MOST_REVIEWED", 30)
    with large.connect() as connection:
        upload = predictions.c.image_sha256.is_not(None)
        uploads = select(predictions.c.prediction_id).where(upload).order_by(predictions.c.created_on.desc())
        latest = list(connection.execute(uploads.limit(30)).scalars())
    passed, labelled = latest[:2], latest[2:5]
    said = {"true_class": "dog", "source": "labeller:ann"}
    with large.begin() as connection:
        statements = [{**said, "entry_id": uuid4(), "prediction_id": one} for one in labelled]
        connection.execute(insert(feedback), statements)
        connection.execute(
            predictions.update().where(predictions.c.prediction_id == latest[20]).values(bbsd_feats=[0.5, 0.5])
        )
    model = cast("Any", SimpleNamespace(model_name="m", classifier_type="multi-class"))
    with explained(large) as plans:
        found, count = tasks(large, Wish("ben", model, passed), "review", limit=5)
    # What is passed over makes room for older ones.
    assert (count, found[0].prediction_id, found[0].reason) == (27, latest[20], "low confidence")
    assert (plans.sequential() & {"predictions"}, plans.most_rows("predictions")) == (set(), 3 * 24), plans


@pytest.fixture
def said(large: Engine) -> tuple[list[Any], list[int]]:
    """The predictions of `m` with an upload, each labelled once, the last one twice; and the statements' numbers."""
    with large.connect() as connection:
        upload = predictions.c.image_sha256.is_not(None) & (predictions.c.model_name == "m")
        ids = list(connection.execute(select(predictions.c.prediction_id).where(upload)).scalars())
    return ids, say(large, *ids, ids[-1])


def say(engine: Engine, *ids: Any) -> list[int]:
    """Logs a statement about each prediction; returns their numbers."""
    statements = [{"true_class": "dog", "source": "ben", "entry_id": uuid4(), "prediction_id": one} for one in ids]
    with engine.begin() as connection:
        numbers = list(connection.execute(insert(feedback).returning(feedback.c.id), statements).scalars())
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE feedback"))
    return numbers


def test_labels_are_counted_from_the_statements_on_that_nobody_has_looked_at(
    large: Engine, said: tuple[list[Any], list[int]]
) -> None:
    ids, numbers = said
    last = numbers[-1]
    assert _count_labels(large, "m", 0, 0, enough=10**6) == (len(ids), len(ids), last, False)
    with explained(large) as plans:  # The last upload has two statements.
        assert _count_labels(large, "m", numbers[-11], numbers[-6], enough=10) == (9, 4, last, False)
        assert _count_labels(large, "m", last, last, enough=10) == (0, 0, last, False)
        assert _count_labels(large, "none", 3, 4, enough=10**6) == (0, 0, 3, False)
    assert (plans.sequential() & {"predictions"}, plans.pages < 500) == (set(), True), plans


def test_labels_are_counted_by_the_latest_statements_where_these_are_enough(
    large: Engine, said: tuple[list[Any], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cv_platform.monitoring.loop._MOST_STATEMENTS", 10)
    ids, numbers = said
    last = numbers[-1]
    with explained(large) as plans:
        assert _count_labels(large, "m", 0, 0, enough=20) == (49, 49, last, True)
        assert _count_labels(large, "m", 0, numbers[-6], enough=20) == (49, 4, last, True)  # Those since are all seen.
    assert (plans.sequential(), plans.pages < 500) == (set(), True), plans
    # Since then two uploads were labelled again and again, and one of them is new: what is needed decides.
    numbers = say(large, *50 * ids[:2])
    assert _count_labels(large, "m", 0, numbers[0] - 1, enough=2) == (2, 2, numbers[-1], True)
    assert _count_labels(large, "m", 0, numbers[0] - 1, enough=20) == (len(ids), 2, numbers[-1], False)


def test_labels_are_found_behind_those_of_another_model(
    large: Engine, said: tuple[list[Any], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cv_platform.monitoring.loop._MOST_STATEMENTS", 10)
    ids, numbers = said
    with large.connect() as connection:
        others = connection.execute(select(predictions.c.prediction_id).where(predictions.c.model_name == "other"))
        say(large, *others.scalars())
    assert _count_labels(large, "m", 0, 0, enough=20) == (len(ids), len(ids), numbers[-1], False)
