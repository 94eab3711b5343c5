"""Entries on their way in and out of a spool."""

from __future__ import annotations

import hashlib
import json
from datetime import datetime, timedelta, timezone
from uuid import UUID

import numpy as np
import pytest

from cv_platform.serving.log.entry import FeedbackEntry, LogEntry, decode, encode, stored_prediction
from cv_platform_tests.support.log_entries import answered


def test_a_prediction_comes_back_as_it_was() -> None:
    entry = answered()
    spooled = encode(entry)
    assert spooled.image is not None
    assert spooled.image.sha256 == hashlib.sha256(b"an image").hexdigest()
    found = stored_prediction(
        decode(spooled.record, spooled.vectors), image=spooled.image.content, media_type=spooled.image.media_type
    )
    assert found.prediction_id == entry.prediction_id
    assert found.prediction_json == {"three": 0.75, "four": 0.25}
    assert found.created_on == entry.created_on
    assert (found.predicted_class, found.image, found.media_type) == ("three", b"an image", "image/png")
    for name in ("uae_feats", "bbsd_feats", "features", "properties", "raw_hm"):
        np.testing.assert_array_equal(getattr(found, name), getattr(entry, name))


def test_what_a_former_release_has_spooled_came_from_nobody_knows_where() -> None:
    spooled = encode(answered(client="0a1b2c3d", tag="line-3", network="203.0.113.0/24"))
    values = decode(spooled.record, spooled.vectors)
    assert (values["client"], values["tag"], values["network"]) == ("0a1b2c3d", "line-3", "203.0.113.0/24")
    record = {
        name: value for name, value in json.loads(spooled.record).items() if name not in {"client", "tag", "network"}
    }
    values = decode(json.dumps(record), spooled.vectors)
    assert (values["client"], values["tag"], values["network"]) == (None, None, None)


def test_a_refused_request_has_no_prediction_and_keeps_no_image() -> None:
    spooled = encode(
        LogEntry(request_method="POST", request_url="/predict", response_status_code=415, image=b"not an image")
    )
    assert spooled.image is None
    assert spooled.prediction_id is None
    assert decode(spooled.record, spooled.vectors)["response_status_code"] == 415


def test_a_prediction_without_a_heat_map_has_none() -> None:
    spooled = encode(answered(raw_hm=None, image=None))
    found = stored_prediction(decode(spooled.record, spooled.vectors), image=None, media_type=None)
    assert found.raw_hm is None
    assert found.image_sha256 is None


def test_text_that_postgresql_refuses_is_cleaned() -> None:
    spooled = encode(answered(request_url="/predict?\0\ud800", response_message="a\0b", prediction_json={"c\0": 1.0}))
    values = decode(spooled.record, spooled.vectors)
    assert values["request_url"] == "/predict?\ufffd?"
    assert values["response_message"] == "a\ufffdb"
    assert json.loads(values["prediction_json"]) == {"c\ufffd": 1.0}


def test_a_probability_that_is_no_number_is_null() -> None:
    spooled = encode(answered(prediction_json={"a": float("nan"), "b": float("inf"), "c": np.float32(0.5)}))
    assert json.loads(decode(spooled.record, spooled.vectors)["prediction_json"]) == {
        "a": None,
        "b": None,
        "c": 0.5,
    }


def test_times_are_kept_in_utc() -> None:
    spooled = encode(answered(created_on=datetime(2026, 1, 31, 8, tzinfo=timezone(timedelta(hours=2)))))
    assert decode(spooled.record, spooled.vectors)["created_on"].isoformat() == "2026-01-31T06:00:00+00:00"


@pytest.mark.parametrize("vectors", [b"", bytes(4), bytes(7), bytes(4000)])
def test_arrays_of_another_size_than_the_record_says_are_damage(vectors: bytes) -> None:
    spooled = encode(answered())
    with pytest.raises(ValueError, match=r"Expected arrays of .* Received: \d+ bytes|buffer size"):
        decode(spooled.record, vectors)


@pytest.mark.parametrize(
    "record",
    ["", "{", "[]", "{}", '{"entry_id":"x"}', '{"prediction_json":{"a":1,}}', '{"prediction_json":{"a":nan}}'],
)
def test_a_damaged_record_is_a_value_error(record: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode(record, b"")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"created_on": datetime(2026, 1, 31, 6)}, "expected a time with a time zone"),  # noqa: DTZ001 - that is the point
        ({"uae_feats": np.zeros((1, 3))}, r"uae_feats: expected one vector. Received: shape \(1, 3\)"),
        ({"raw_hm": np.zeros(3)}, r"raw_hm: expected a \(h, w\) matrix"),
        ({"model_version": None, "features": None}, "Missing: model_version, features"),
    ],
)
def test_what_no_row_could_hold_is_refused_at_once(changes: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        answered(**changes)


def test_feedback_keeps_who_said_what() -> None:
    entry = FeedbackEntry(prediction_id=UUID(int=7), true_class="fo\0ur", source="page")
    spooled = encode(entry)
    values = decode(spooled.record, spooled.vectors)
    assert spooled.kind == "feedback"
    assert (values["prediction_id"], values["true_class"], values["source"]) == (UUID(int=7), "fo\ufffdur", "page")
    assert values["entry_id"] == entry.entry_id
    of_former_release = '{"is_of_known":true,' + spooled.record[1:]
    assert decode(of_former_release, spooled.vectors) == values
