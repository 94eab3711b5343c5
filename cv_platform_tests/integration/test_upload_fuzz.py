"""A few hundred damaged files, bombs and polyglots over HTTP; `make soak` sends thousands more of the same sequence."""

from __future__ import annotations

from pathlib import Path

import pytest

from cv_platform_tests.support.served_app import serve_app
from trials.hostile_files import FAMILIES
from trials.hostile_load import send_hostile
from trials.mutations import HostileUpload, hostile_upload
from trials.soak.hostile import PIXEL_BYTES

MUTATED = 300
SEED = 20_260_131
MAX_PIXELS = 4_000_000
ANSWER_SECONDS = 30.0
CONCURRENCY = 8
BODY_BYTES = 3_000_000
"""More than the largest of these files."""
pytestmark = pytest.mark.timeout(240)


def test_no_hostile_upload_gets_a_5xx_or_costs_more_than_the_limits_allow(tmp_path: Path) -> None:
    prepared = [
        HostileUpload(f"{family}-{name}", content)
        for family, make in FAMILIES.items()
        for name, content in make().items()
    ]
    uploads = prepared + [hostile_upload(SEED, number) for number in range(MUTATED)]
    with serve_app({}, CV_MAX_UPLOAD_PIXELS=str(MAX_PIXELS)) as served:
        before = served.peak_memory_bytes()
        result = send_hostile(
            served.url,
            uploads.__getitem__,
            len(uploads),
            concurrency=CONCURRENCY,
            answer_seconds=ANSWER_SECONDS,
            failures=tmp_path / "failures",
        )
        health = served.health()
        grown = served.peak_memory_bytes() - before
    assert result.wrong == [], f"the files are in {tmp_path / 'failures'}"
    assert result.sent == len(uploads)
    assert min(result.statuses[status] for status in (200, 400, 413, 415)) >= 10, "a sequence that meets every check"
    assert health["in_flight"] == 0
    assert grown <= CONCURRENCY * (PIXEL_BYTES * MAX_PIXELS + BODY_BYTES)


def test_real_images_of_every_format_are_taken(tmp_path: Path) -> None:
    uploads = [HostileUpload(name, content) for name, content in FAMILIES["real"]().items()]
    with serve_app({}) as served:
        result = send_hostile(
            served.url,
            uploads.__getitem__,
            len(uploads),
            concurrency=2,
            answer_seconds=ANSWER_SECONDS,
            failures=tmp_path / "failures",
        )
    assert dict(result.statuses) == {200: len(uploads)}


def test_the_sequence_is_the_same_for_the_same_seed() -> None:
    first = [hostile_upload(7, number) for number in range(60)]
    assert first == [hostile_upload(7, number) for number in range(60)]
    assert first != [hostile_upload(8, number) for number in range(60)]
    assert len({upload.name for upload in first}) == 60
