"""What people are asked to label: from real rows, each with its reason, and what follows for production's accuracy."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from sqlalchemy import Engine, Row, select

from cv_platform.config import ExperimentConfig
from cv_platform.database.schema import deletions, feedback, labeling_items, predictions
from cv_platform.datasets.embeddings import embed_dataset
from cv_platform.datasets.versions import checkout_version
from cv_platform.monitoring.labeling_queue import QueueSources, fill_queue
from cv_platform.monitoring.production_metrics import measure_production
from cv_platform.monitoring.queue_choice import choose, novelty, uncertainty
from cv_platform.records import LabelingQueue
from cv_platform.serving.log.deletion import delete_from_database
from cv_platform.settings import Settings
from cv_platform.storage import CentralStorage
from cv_platform_tests.support.drift_reports import make_report
from cv_platform_tests.support.labelled_log import NOW, answer, drawing, experiment, home, origin, say

__all__ = ["home", "origin"]


def queue_of(engine: Engine) -> list[Row[Any]]:
    with engine.connect() as connection:
        return list(connection.execute(select(labeling_items).order_by(labeling_items.c.place)))


@pytest.fixture
def sources(home: Path) -> QueueSources:
    config = experiment()
    version = checkout_version(config.dataset, config.model, home=home)
    embeddings = embed_dataset(version, config.encoder, home=home, spare_bytes=0)
    settings = Settings.from_environment({"CV_HOME": str(home)})
    return QueueSources(version, embeddings, None, CentralStorage(home / "storage"), settings)


def fill(config: ExperimentConfig, engine: Engine, sources: QueueSources, minutes: float) -> LabelingQueue:
    return fill_queue(config, engine, sources, now=NOW + timedelta(minutes=minutes))


def test_the_queue_asks_for_the_uncertain_and_the_novel_once_and_goes_on_where_it_ended(
    engine: Engine, sources: QueueSources
) -> None:
    config = experiment(queue_size=6, random_share=0.34, novel_share=0.17, unknown_share=0.0, drift_share=0.0)
    assert (fill(config, engine, sources, 1).counts, queue_of(engine)) == ({}, []), "no requests: nothing to ask"
    sure = {"prediction_json": {"cat": 0.99, "dog": 0.01}}
    for seed in range(20):
        answer(engine, drawing("cat", 300 + seed), **sure)
    doubtful = [
        answer(engine, drawing("dog", 400 + at), prediction_json={"cat": 0.52, "dog": 0.48}) for at in range(12)
    ]
    stripes = np.tile(np.array([[[255, 0, 0]], [[0, 255, 0]]], np.uint8), (32, 64, 1))
    strange = answer(engine, cv2.imencode(".png", stripes)[1].tobytes(), **sure)
    repeated = cv2.imencode(".jpg", cv2.imdecode(np.frombuffer(drawing("dog", 400), np.uint8), 1), [1, 80])[1].tobytes()
    copy = answer(engine, repeated, prediction_json={"cat": 0.51, "dog": 0.49})
    answer(engine, None, **sure)
    made = fill(config, engine, sources, 2)
    assert (made.requests, made.candidates) == (34, 34), "without its upload, nobody can say what it showed"
    assert made.counts == {"random": 2, "novel": 1, "uncertain": 3}
    by_reason: dict[str, set[Any]] = {}
    for item in queue_of(engine):
        by_reason.setdefault(item.reason, set()).add(item.prediction_id)
        assert item.chance == (pytest.approx(2 / 34) if item.reason == "random" else None)
    assert strange in by_reason["novel"] | by_reason["random"]
    assert by_reason["uncertain"] <= {*doubtful, copy}
    assert not {doubtful[0], copy} <= by_reason["uncertain"], "of near-copies one"
    assert made.problems
    assert fill(config, engine, sources, 3).counts == {}, "nothing came since"
    answer(engine, drawing("dog", 500), created_on=NOW + timedelta(minutes=2, seconds=30))
    assert Counter(fill(config, engine, sources, 4).counts).total() == 1
    delete_from_database(engine, strange)
    assert strange not in {item.prediction_id for item in queue_of(engine)}
    with engine.connect() as connection:
        assert connection.execute(select(deletions.c.prediction_id)).scalars().all() == [strange]


def test_what_an_outage_kept_and_what_drives_the_drift_is_asked_for_too(engine: Engine, sources: QueueSources) -> None:
    one = {"random_share": 0.0, "unknown_share": 0.0, "novel_share": 0.0, "max_candidates": 1}
    config = experiment(queue_size=2, drift_share=0.5, **one)
    driving = [answer(engine, drawing("cat", 700)) for _ in range(2)]
    ids = {*driving, *(answer(engine, drawing("cat", 701 + at)) for at in range(20))}
    sha256 = hashlib.sha256(drawing("cat", 700)).hexdigest()
    top = [{"prediction_id": str(driving[0]), "image_sha256": sha256, "score": 2.0}]
    sources = replace(sources, report=make_report(top_images=top))
    made = fill(config, engine, sources, 1)
    assert (made.requests, made.counts["drift"]) == (22, 1)
    (asked,) = [item.prediction_id for item in queue_of(engine) if item.reason == "drift"]
    assert asked in driving
    late = answer(engine, drawing("dog", 800), logged_on=NOW + timedelta(minutes=1, seconds=30))
    assert fill(config, engine, sources, 2).requests == 1, "answered before the last window ended, and logged after"
    assert late in {item.prediction_id for item in queue_of(engine)} - ids
    with engine.begin() as connection:  # As the retention of uploads does.
        connection.execute(predictions.update().values(image_sha256=None))
    assert fill(config, engine, sources, 3).waiting == 0, "what nobody can look at is not waited for"
    kept = [pq.read_table(path)["sha256"].to_pylist() for path in sources.settings.home.glob("cache/embeddings/*/*")]
    assert kept
    assert not any(sha256 in names for names in kept), "of uploads, no vectors are kept"


def test_labels_of_random_requests_estimate_the_accuracy_on_all_while_comments_on_mistakes_do_not(
    engine: Engine, sources: QueueSources, tmp_path: Path
) -> None:
    """Two windows of unlike size and accuracy; all that is labelled besides is what the model got wrong."""
    config = experiment(queue_size=10, random_share=1.0, unknown_share=0.0, drift_share=0.0, novel_share=0.0)
    truth: dict[Any, str] = {}
    for window, (count, wrong) in enumerate([(40, 0), (10, 10)]):
        for at in range(count):
            when = NOW + timedelta(minutes=window, seconds=at)
            name = answer(engine, drawing("cat", 600 + 100 * window + at), created_on=when)
            truth[name] = "dog" if at < wrong else "cat"
            if at < wrong:
                say(engine, name, "dog", "page")
        fill(config, engine, sources, window + 1)
    for item in queue_of(engine):
        say(engine, item.prediction_id, truth[item.prediction_id], "labeller:anna", minute=9)
    metrics = measure_production(
        config,
        model_name="pets",
        engine=engine,
        storage=sources.storage,
        now=NOW + timedelta(minutes=5),
        directory=tmp_path / "metrics",
    )
    (version,) = metrics.versions
    assert version.random_labels == 20
    # 10 of 40 stand for 4 each, 10 of 10 for themselves: 40 / 50, where a plain mean of the labels says a half.
    assert version.estimated_share == pytest.approx(0.8)
    assert version.right_share == pytest.approx(0.5)
    assert version.estimated_interval is not None
    assert version.estimated_interval[0] < 0.8 < version.estimated_interval[1]
    with engine.connect() as connection:
        assert connection.execute(select(feedback.c.id)).all()


def test_images_are_chosen_apart_from_each_other_and_the_last_reason_takes_what_is_left() -> None:
    # Three clusters on the circle; the scores alone would take all of the first.
    angles = np.array([0.0, 0.01, 0.02, 1.5, 1.51, 3.0])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    scores = {"unknown": np.full(6, np.nan), "uncertain": np.array([0.9, 0.89, 0.88, 0.5, 0.4, 0.3])}
    chosen = choose(scores, {"unknown": 2, "uncertain": 1}, vectors, np.arange(6))
    assert [(choice.position, choice.reason) for choice in chosen] == [
        (0, "uncertain"),
        (5, "uncertain"),
        (3, "uncertain"),
    ]
    together = np.array([0, 0, 0, 1, 2, 3])
    assert len(choose(scores, {"uncertain": 6}, vectors, together)) == 4, "near-copies once"
    assert choose({}, {"uncertain": 3}, np.empty((0, 2)), np.empty(0, np.int64)) == []


def test_the_reasons_share_the_queue_without_an_image_too_many() -> None:
    shares: dict[str, Any] = {"random_share": 0.3, "unknown_share": 0.3, "drift_share": 0.3, "novel_share": 0.1}
    quotas = experiment(queue_size=5, **shares).labels.quotas()
    assert quotas == {"random": 1, "unknown": 1, "drift": 1, "novel": 0, "uncertain": 2}


def test_scores_are_as_worked_by_hand() -> None:
    assert uncertainty(np.array([[0.7, 0.2, 0.1], [0.5, 0.5, 0.0]])).tolist() == pytest.approx([0.5, 1.0])
    assert uncertainty(np.array([[0.9, 0.45]]), np.array([0.5, 0.5])).tolist() == pytest.approx([0.9])
    # 0.4 is half of the way from the threshold down to 0, 0.6 a quarter of that up to 1.
    assert uncertainty(np.array([[0.4, 0.6]]), np.array([0.8, 0.2])).tolist() == pytest.approx([0.5])
    known = np.array([[1.0, 0.0], [0.0, 2.0]])
    assert novelty(np.array([[3.0, 0.0], [1.0, 1.0]]), known).tolist() == pytest.approx([0.0, 1 - 2**-0.5])
    assert np.isnan(novelty(known, np.empty((0, 2)))).all()
