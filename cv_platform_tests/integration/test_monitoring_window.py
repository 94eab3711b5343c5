"""The window's SQL against a real PostgreSQL."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import numpy as np
import pandas as pd
import pytest
from sqlalchemy import Engine, Text, cast, event, func, insert, select, text, update

from cv_platform.config import MonitorConfig
from cv_platform.database.schema import FOLDER, feedback, images, predictions
from cv_platform.database.uploads import read_feedback, read_images
from cv_platform.monitoring.window import Window, WindowBounds, read_window
from cv_platform.records import ModelIdentity
from cv_platform_tests.support.waiting import wait_until

START = datetime(2026, 2, 1, tzinfo=UTC)
END = datetime(2026, 2, 8, tzinfo=UTC)
MONITOR = ("max_samples", "repeats", "seed")
MODEL = {"model_name": "m", "model_version": "v1"}


def row(created_on: datetime, number: float = 0.0, **changes: Any) -> dict[str, Any]:
    values = {
        "prediction_id": uuid4(),
        **MODEL,
        "predicted_class": "cat",
        "prediction_json": {"cat": 0.75, "dog": 0.25},
        "uae_feats": [number, 1.5],
        "bbsd_feats": [0.75, 0.25],
        "features": [0.1, 0.2, 0.3],
        "properties": [number, *(float(i) for i in range(6))],
        "created_on": created_on,
    }
    return {**values, **changes}


def log(engine: Engine, *rows: dict[str, Any]) -> None:
    with engine.begin() as connection:
        connection.execute(insert(predictions), list(rows))


def window(engine: Engine, **changes: Any) -> Window:
    settings = {"start": START, "end": END, **changes}
    monitor = MonitorConfig.model_construct(**{key: settings.pop(key) for key in MONITOR if key in settings})
    return read_window(engine, ModelIdentity(model_name="m", version="v1"), WindowBounds(**settings), monitor)


def seen(found: Window) -> list[float]:
    """Returns the number that `row` gave each row of a window."""
    assert found.sample is not None
    return found.sample.uae[:, 0].tolist()


def test_takes_the_start_and_leaves_the_end_of_the_window(engine: Engine) -> None:
    tick = timedelta(microseconds=1)
    log(engine, *(row(t, i) for i, t in enumerate([START - tick, START, END - tick, END])))
    found = window(engine)
    assert seen(found) == [1.0, 2.0]
    assert (found.requests, found.is_sampled, found.unusable) == (2, False, 0)


def test_adjacent_windows_share_no_row_and_lose_none(engine: Engine) -> None:
    log(engine, *(row(START + timedelta(hours=12 * i), i) for i in range(14)))
    middle = datetime(2026, 2, 4, tzinfo=UTC)
    halves = [window(engine, end=middle), window(engine, start=middle)]
    assert sorted(x for half in halves for x in seen(half)) == list(range(14))


def test_bounds_of_another_zone_mean_the_same_moments(engine: Engine) -> None:
    log(engine, row(START), row(START + timedelta(hours=1)))
    start = datetime.fromisoformat("2026-02-01T03:00:00+02:00")
    assert len(window(engine, start=start).rows) == 1


def test_a_late_row_is_in_the_window_in_which_it_came_and_counted_there(engine: Engine) -> None:
    hour = timedelta(hours=1)
    log(
        engine,
        row(START + hour, 1, logged_on=START + hour),
        row(END - hour, 2, logged_on=END + hour),  # Answered in the first window; its spool waited.
        row(END + hour, 3, logged_on=END + 2 * hour),
        row(START - hour, 4, logged_on=END),
    )
    week = END - START
    first = window(engine, by="logged")
    second = window(engine, start=END, end=END + week, by="logged")
    assert [seen(part) for part in (first, second)] == [[1.0], [4.0, 2.0, 3.0]]
    assert [(part.requests, part.late) for part in (first, second)] == [(1, 0), (3, 2)]


def test_a_row_from_before_its_logging_was_noted_counts_by_its_own_time(engine: Engine) -> None:
    log(engine, row(START, 1, logged_on=None), row(START, 2, logged_on=END), row(END, 3, logged_on=None))
    found = window(engine, by="logged")
    assert found.sample is not None
    assert (found.sample.uae[:, 0].tolist(), found.late) == ([1.0], 0)


def test_a_window_that_is_over_waits_for_the_rows_that_are_being_written(engine: Engine) -> None:
    """A row has its time before it can be seen: without waiting, it would be in no window."""
    writing = engine.connect()
    writing.execute(insert(predictions), [row(START, 1)])
    end = datetime.now(UTC) + timedelta(seconds=1)  # The database's clock may be another.
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(window, engine, end=end, by="logged")
        wait_until(lambda: waits_for_a_lock(engine), seconds=30)
        writing.commit()
        assert found.result(timeout=30).requests == 1
    writing.close()


def waits_for_a_lock(engine: Engine) -> bool:
    with engine.connect() as connection:
        waiting = text("SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'predictions'::regclass")
        return connection.execute(waiting).scalar_one() > 0


def test_without_its_own_time_a_row_gets_the_one_at_which_it_came(engine: Engine) -> None:
    before = datetime.now(UTC) - timedelta(minutes=1)
    log(engine, row(START))
    assert window(engine, start=before, end=before + timedelta(hours=1), by="logged").late == 1


def test_never_mixes_versions_or_models_and_counts_what_other_versions_answered(engine: Engine) -> None:
    others = (row(time, 2, model_version=v) for time, v in ((START, "v2"), (START, "v0"), (END, "v2")))
    log(engine, row(START, 1), *others, row(START, 3, model_name="other"))
    log(engine, row(START, 2, model_version="v2", client=FOLDER))  # Nobody sent it.
    found = window(engine)
    assert found.sample is not None
    assert found.sample.uae[:, 0].tolist() == [1.0]
    assert (found.requests, found.others) == (1, 2)


def test_a_limit_draws_from_the_whole_window_in_order_of_time_and_the_same_at_a_retry(engine: Engine) -> None:
    """The busy end of a window must not be all that is judged of it."""
    quiet = [row(START + timedelta(minutes=i), i) for i in range(200)]
    log(engine, *quiet, *(row(END - timedelta(seconds=i + 1), 1000 + i) for i in range(200)))
    found, again, other = (window(engine, max_samples=100, seed=seed) for seed in (0, 0, 1))
    assert found.sample is not None
    drawn = found.sample.uae[:, 0]
    # Of 400 requests, 100 are drawn: 50 of each half are expected, with a standard deviation of 4.3.
    assert len(drawn) == 100
    assert 25 < (drawn < 1000).sum() < 75
    assert found.rows["created_on"].is_monotonic_increasing
    assert (found.requests, found.is_sampled) == (400, True)
    assert again.rows["prediction_id"].tolist() == found.rows["prediction_id"].tolist()
    assert other.rows["prediction_id"].tolist() != found.rows["prediction_id"].tolist()


def test_an_upload_that_is_sent_again_and_again_is_judged_once(engine: Engine) -> None:
    upload, another = "a" * 64, "b" * 64
    with engine.begin() as connection:
        for sha256 in (upload, another):
            connection.execute(insert(images).values(sha256=sha256, content=b"x", media_type="image/png", bytes=1))
    log(
        engine,
        *(row(START + timedelta(hours=i), i, image_sha256=upload) for i in range(5)),
        row(START + timedelta(hours=2), 10, image_sha256=another),
        *(row(START + timedelta(hours=i), 20 + i % 2, image_sha256=None) for i in range(4)),  # Uploads were not kept.
    )
    once, every = window(engine), window(engine, repeats="all")
    assert once.sample is not None
    assert every.sample is not None
    assert sorted(once.sample.uae[:, 0].tolist()) == [0.0, 10.0, 20.0, 21.0]
    assert len(every.sample) == 10
    assert [(found.requests, found.repeats, found.is_sampled) for found in (once, every)] == [(10, 6, False)] * 2


def log_at_random(engine: Engine) -> None:
    """Logs 600 requests of two versions around the window: pictures sent often or once, kept or not, some late."""
    random = np.random.default_rng(0)
    uploads = [f"{number:064x}" for number in range(60)]
    with engine.begin() as connection:
        content = {"content": b"x", "media_type": "image/png", "bytes": 1}
        connection.execute(insert(images), [{"sha256": sha256, **content} for sha256 in uploads])
    rows = []
    for at in random.permutation(600):
        # Whole hours, so that some times are equal; a sixth of the rows came up to two days later than answered.
        answered = START + timedelta(hours=int(random.integers(-48, 8 * 24)))
        logged = None if at % 50 == 0 else answered + timedelta(hours=int(random.integers(48)) if at % 6 == 0 else 0)
        statistics = [float(random.integers(40)), *(float(i) for i in range(6))]
        rows.append(
            row(
                answered,
                float(at),
                properties=statistics,
                image_sha256=uploads[int(random.geometric(0.1)) % 60] if at % 3 else None,
                client=FOLDER if at % 40 == 0 else None,
                logged_on=logged,
                model_version="v2" if at % 5 == 0 else "v1",
            )
        )
    log(engine, *rows)


def plain_window(engine: Engine, *, by: str, repeats: str, max_samples: int, seed: int) -> tuple[Any, ...]:
    """Returns the counts and the drawn ids of a window, worked out from the whole table by pandas."""
    draw = func.hashtextextended(cast(predictions.c.prediction_id, Text), seed).label("draw")
    table = pd.read_sql(select(predictions, draw), engine)
    moment = table["created_on"] if by == "answered" else table["logged_on"].fillna(table["created_on"])
    table = table.loc[(moment >= START) & (moment < END) & (table["client"] != FOLDER)]
    own = table.loc[table["model_version"] == "v1"].sort_values(by=["created_on", "draw"])
    statistics = own["properties"].map(str).where(own["image_sha256"].isna(), "")
    is_repeat = pd.DataFrame({"sha256": own["image_sha256"].fillna(""), "statistics": statistics}).duplicated()
    eligible = own.loc[~is_repeat] if repeats == "once" else own
    drawn = eligible.sort_values(by=["draw"]).head(max_samples).sort_values(by=["created_on", "prediction_id"])
    late = int((own["created_on"] < START).sum())
    counts = (len(own), late, int(is_repeat.sum()), len(table) - len(own), len(eligible) > max_samples)
    return (*counts, drawn["prediction_id"].tolist())


@pytest.mark.parametrize("by", ["answered", "logged"])
@pytest.mark.parametrize("repeats", ["once", "all"])
def test_counts_and_draws_what_a_search_through_the_whole_table_finds(engine: Engine, by: str, repeats: str) -> None:
    log_at_random(engine)
    for max_samples, seed in ((1, 0), (7, 1), (50, 2), (1000, 3)):
        settings: dict[str, Any] = {"by": by, "repeats": repeats, "max_samples": max_samples, "seed": seed}
        found = window(engine, **settings)
        counts = (found.requests, found.late, found.repeats, found.others, found.is_sampled)
        expected = plain_window(engine, **settings)
        assert (*counts, found.rows["prediction_id"].tolist()) == expected
        assert min(expected[0], expected[2], expected[3]) > 0
        assert (expected[1] > 0) == (by == "logged")


def test_a_picture_has_the_same_chance_however_often_it_was_sent(engine: Engine) -> None:
    numbers = [0] * 60 + list(range(1, 20))
    log(engine, *(row(START + timedelta(minutes=i), n, prediction_id=UUID(int=i)) for i, n in enumerate(numbers)))
    draws = 400
    drawn = np.concatenate([seen(window(engine, max_samples=5, seed=seed)) for seed in range(draws)])
    times = np.bincount(drawn.astype(int), minlength=20)
    # Of 20 pictures 5 are drawn: each 100 times of 400, with a standard deviation of 8.7.
    assert times.sum() == 5 * draws
    assert times.min() >= 57
    assert times.max() <= 143


def test_of_few_pictures_that_are_sent_all_the_time_the_first_requests_are_found(engine: Engine) -> None:
    """Few of the candidates are the first of their picture."""
    log(engine, *(row(START + timedelta(minutes=i), i % 3) for i in range(600)))
    found, one = window(engine), window(engine, max_samples=1)
    assert found.rows["created_on"].tolist() == [START + timedelta(minutes=i) for i in range(3)]
    assert (found.requests, found.repeats, found.is_sampled) == (600, 597, False)
    assert (len(one.rows), one.requests, one.repeats, one.is_sampled) == (1, 600, 597, True)


def test_a_version_that_has_answered_nothing_has_the_others_counted(engine: Engine) -> None:
    log(engine, *(row(START, i, model_version="v2") for i in range(3)))
    found = window(engine)
    assert (found.sample, found.requests, found.repeats, found.others) == (None, 0, 0, 3)


def test_rows_that_have_given_up_their_uploads_are_drawn_once_each(engine: Engine) -> None:
    """They lie at another place than before."""
    with engine.begin() as connection:
        connection.execute(insert(images).values(sha256="a" * 64, content=b"x", media_type="image/png", bytes=1))
    log(engine, *(row(START + timedelta(hours=i), i, image_sha256="a" * 64) for i in range(120)))
    with engine.begin() as connection:
        connection.execute(update(predictions).where(predictions.c.created_on > START).values(image_sha256=None))
    found, some = window(engine), window(engine, max_samples=100)
    assert seen(found) == list(range(120))
    assert (found.requests, found.repeats, found.is_sampled) == (120, 0, False)
    assert (len(some.rows), some.requests, some.is_sampled) == (100, 120, True)


def test_vectors_come_back_to_the_last_bit(engine: Engine) -> None:
    value = np.float32(1) / np.float32(3)
    log(engine, row(START, uae_feats=[float(value), float(np.float32(1e-30))]))
    found = window(engine)
    assert found.sample is not None
    assert found.sample.uae[0].tolist() == [float(value), float(np.float32(1e-30))]


def test_an_empty_window_is_no_error(engine: Engine) -> None:
    found = window(engine)
    assert found.sample is None
    assert (len(found.rows), found.requests, found.unusable) == (0, 0, 0)


def test_leaves_out_and_counts_rows_that_cannot_be_compared(engine: Engine) -> None:
    log(
        engine,
        row(START, 1),
        row(START + timedelta(1), 2, uae_feats=[float("nan"), 0.0]),
        row(START + timedelta(2), 3, features=[0.1]),
        row(START + timedelta(3), 4, properties=[None] * 7),
        row(START + timedelta(4), 5, bbsd_feats=[]),
        row(START + timedelta(5), 6),
    )
    found = window(engine)
    assert found.sample is not None
    assert found.sample.uae[:, 0].tolist() == [1.0, 6.0]
    assert len(found.rows) == 2
    assert (found.requests, found.unusable) == (6, 4)


def test_a_window_of_unusable_rows_only_has_no_sample(engine: Engine) -> None:
    log(engine, row(START, float("inf")))
    found = window(engine)
    assert (found.sample, found.requests, found.unusable) == (None, 1, 1)


def test_reads_no_image_and_no_heat_map(engine: Engine) -> None:
    log(engine, row(START))
    statements: list[str] = []
    event.listen(engine, "before_cursor_execute", lambda *arguments: statements.append(arguments[2]))
    window(engine)
    read = " ".join(statements)
    assert "uae_feats" in read
    assert not any(heavy in read for heavy in ("content", "raw_hm", "prediction_json"))


def test_the_latest_feedback_of_a_prediction_counts(engine: Engine) -> None:
    first, second, third = row(START), row(START), row(START)
    log(engine, first, second, third)
    said = [
        (first, "cat", START + timedelta(hours=2)),
        (first, "dog", START + timedelta(hours=1)),
        (second, "owl", START),
    ]
    with engine.begin() as connection:
        for prediction, true_class, created_on in said:
            entry = {"entry_id": uuid4(), "source": "page", "true_class": true_class, "created_on": created_on}
            connection.execute(insert(feedback).values(prediction_id=prediction["prediction_id"], **entry))
    ids = [r["prediction_id"] for r in (first, second, third)]
    assert read_feedback(engine, ids) == {ids[0]: "cat", ids[1]: "owl"}
    assert read_feedback(engine, []) == {}


def test_fetches_only_the_named_uploads(engine: Engine) -> None:
    with engine.begin() as connection:
        for name in ("a", "b"):
            content = {"content": name.encode() * 3, "bytes": 3, "media_type": "image/png"}
            connection.execute(insert(images).values(sha256=name * 64, **content))
    assert read_images(engine, ["a" * 64, "c" * 64]) == {"a" * 64: b"aaa"}
    assert read_images(engine, []) == {}
