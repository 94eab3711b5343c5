"""A shadow's process with a real bundle: what it says, what it costs nobody, and what becomes of its answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import prometheus_client
import psutil
import pytest
from sqlalchemy import Engine, select

from cv_platform.audit import Note
from cv_platform.config import CanaryConfig
from cv_platform.database.schema import shadow_answers
from cv_platform.errors import DatabaseUnavailableError
from cv_platform.probation import Probation, ShadowAnswer
from cv_platform.serving.log.deletion import delete_from_database
from cv_platform.serving.log.request_log import RequestLog
from cv_platform.serving.log.shadow_log import ShadowLog
from cv_platform.serving.model.probation import LiveProbation, ProbationKeeper
from cv_platform.serving.model.promotion import Claim, Promoter
from cv_platform.serving.model.runtime import LoadedModel, load_bundle
from cv_platform.serving.model.shadow import Shadow, ShadowPlace
from cv_platform.serving.routes.answer import predict_upload
from cv_platform.serving.telemetry.metrics import ServingMetrics
from cv_platform.storage import BundleMetadata, CentralStorage
from cv_platform_tests.support.http_client import png
from cv_platform_tests.support.log_entries import answered, append_to, wait_until_drained
from cv_platform_tests.support.production import SERVICE, point_to
from cv_platform_tests.support.tiny_models import TinyExport, publish_tiny, tiny_images
from cv_platform_tests.support.waiting import wait_until


def probation_of(metadata: BundleMetadata) -> Probation:
    return Probation(
        probation_id="0123456789abcdef",
        model_name=metadata.model_name,
        version=metadata.version,
        is_shadow=True,
        since_utc=datetime(2026, 1, 1, tzinfo=UTC),
        **CanaryConfig().model_dump(),
    )


@contextmanager
def shadow_of(storage: CentralStorage, metadata: BundleMetadata, cache: Path, **changes: Any) -> Iterator[Shadow]:
    place = ShadowPlace(storage.url, cache, max_pixels=10_000, **{"log": len, **changes})
    shadow = Shadow(probation_of(metadata), place)
    try:
        yield shadow
    finally:
        shadow.close()


def shadows() -> list[psutil.Process]:
    """Returns the processes of shadows that this one has started; other tests have left other children."""
    return [child for child in psutil.Process().children() if "cv_platform.serving.model.shadow" in child.cmdline()]


def test_it_says_what_its_bundle_says_is_in_nobodys_way_and_dies_without_harm(
    tmp_path: Path, cache: Path, hand_made: TinyExport
):
    storage, kept = CentralStorage(tmp_path / "storage"), list[ShadowAnswer]()
    metadata, metrics = publish_tiny(storage, hand_made), ServingMetrics(prometheus_client.CollectorRegistry())
    champion = load_bundle(storage, metadata.model_name, metadata.version, cache=cache, threads=1)

    def keep(answers: Sequence[ShadowAnswer]) -> int:
        kept.extend(answers)
        return 0

    with shadow_of(storage, metadata, cache, log=keep, metrics=metrics) as shadow:
        live = LiveProbation(probation_of(metadata), None, shadow)
        predicted = [
            predict_upload(champion, png(image), max_pixels=10_000, probation=live) for image in tiny_images(3)
        ]
        wait_until(lambda: len(kept) == 3)
        for said, answer in zip(kept, predicted, strict=True):
            assert (said.prediction_id, said.agrees) == (answer.prediction_id, True)
            assert said.probabilities == pytest.approx(answer.prediction.probabilities.tolist(), abs=1e-4)
        (child,) = shadows()
        assert child.nice() == 19
        child.kill()  # Another one takes over, for those that come after.
        wait_until(lambda: _again(shadow, png(tiny_images(1)[0])) and len(kept) > 3)
        wait_until(lambda: _again(shadow, b"no image") and shadow.tally().failed >= 1)
        for _ in range(40):
            shadow.offer(uuid4(), bytes(1_000_000), (), None)
        assert shadow.tally().dropped >= 40 - 8 - 1
        assert live.tally().champion.asked == 3
    assert not shadows()
    version = {"version": metadata.version}
    assert metrics.registry.get_sample_value("cv_shadow_images_total", {**version, "outcome": "agreed"}) >= 3


def _again(shadow: Shadow, upload: bytes) -> bool:
    shadow.offer(uuid4(), upload, (), None)
    return True


def test_a_shadow_alone_answers_nobody_and_is_promoted(tmp_path: Path, cache: Path, hand_made: TinyExport):
    storage = CentralStorage(tmp_path / "storage")
    first, second = publish_tiny(storage, hand_made), publish_tiny(storage, hand_made)
    point_to(storage, first)
    champion = load_bundle(storage, first.model_name, first.version, cache=cache, threads=1)
    Promoter(storage, SERVICE, cache, cache / "lock").begin_probation(
        second.model_name,
        second.version,
        CanaryConfig(minutes=1e-6, min_requests=2),
        is_shadow=True,
        claim=Claim("tiny"),
        note=Note("a run"),
    )
    place = ShadowPlace(storage.url, cache, max_pixels=10_000, log=len)

    def load(*_: str) -> LoadedModel:
        raise AssertionError("The worker itself needs no challenger.")

    keeper = ProbationKeeper(storage, SERVICE, "a", load, tell_seconds=0.0, shadows=place)

    def is_promoted() -> bool:
        keeper.follow(storage.read_pointer(SERVICE))
        live = keeper.current()
        if live is not None:
            answer = predict_upload(champion, png(tiny_images(1)[0]), max_pixels=10_000, probation=live)
            assert answer.model.version == first.version
        pointer = storage.read_pointer(SERVICE)
        return pointer is not None and pointer.version == second.version

    wait_until(is_promoted)
    keeper.follow(storage.read_pointer(SERVICE))
    assert not shadows()
    pointer = storage.read_pointer(SERVICE)
    assert pointer is not None
    assert pointer.probation is not None
    assert pointer.probation.tally.shadow.agreed >= 2


@pytest.fixture
def log(tmp_path: Path, database_url: str) -> Iterator[RequestLog]:
    with RequestLog(tmp_path / "spool", database_url) as log:
        yield log


def test_its_rows_come_with_their_prediction_and_go_with_it(log: RequestLog, engine: Engine):
    entry = answered()
    assert entry.prediction_id is not None
    said = ShadowAnswer(
        prediction_id=entry.prediction_id,
        model_name="digits",
        model_version="v2",
        classes=("four",),
        probabilities=(0.25, 0.75),
        unknown_score=0.5,
        agrees=False,
        seconds=0.01,
        answered_on=datetime(2026, 1, 31, 6, tzinfo=UTC),
    )
    shadow_log = ShadowLog(log.database)
    assert shadow_log.write([said]) == 0  # Not yet there: it waits.
    append_to(log, entry)
    wait_until_drained(log)
    assert shadow_log.write([]) == 0
    with engine.connect() as connection:
        row = connection.execute(select(shadow_answers)).mappings().one()
    assert (row["predicted_class"], row["agrees"], row["probabilities"]) == ("four", False, [0.25, 0.75])
    assert delete_from_database(engine, entry.prediction_id)
    with engine.connect() as connection:
        assert connection.execute(select(shadow_answers)).first() is None
    assert shadow_log.write([said]) == 0  # It stays gone.


def test_what_a_database_never_takes_is_counted():
    def away() -> Engine:
        raise DatabaseUnavailableError("Expected a database. Received: none.")

    said = ShadowAnswer.model_construct(prediction_id=uuid4())
    assert ShadowLog(away).write([said] * 2003) == 3
