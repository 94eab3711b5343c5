"""What people are asked to label: from real rows, each with its reason, and what follows for production's accuracy."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from importlib.resources import files
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sqlalchemy import Engine, Row, select

from cv_platform.config import ExperimentConfig
from cv_platform.database.schema import deletions, feedback, images, is_request, labeling_items, predictions
from cv_platform.datasets.embeddings import embed_dataset
from cv_platform.datasets.manifest import read_manifest
from cv_platform.datasets.versions import checkout_version
from cv_platform.monitoring.labeling_queue import QueueSources, fill_queue
from cv_platform.monitoring.labels import collect_labels
from cv_platform.monitoring.production_metrics import measure_production
from cv_platform.monitoring.queue_choice import choose, novelty, uncertainty
from cv_platform.probation import ShadowAnswer
from cv_platform.records import BatchScores, ChangedAnswer, LabelingQueue, ModelIdentity, Replay
from cv_platform.scoring.rows import scores_schema
from cv_platform.scoring.unlabelled import UnlabelledImages
from cv_platform.serving.log.deletion import delete_from_database
from cv_platform.serving.log.labels import Wish, tasks
from cv_platform.serving.log.shadow_log import ShadowLog
from cv_platform.settings import Settings
from cv_platform.storage import CentralStorage
from cv_platform_tests.support.drift_reports import make_report
from cv_platform_tests.support.labelled_log import NOW, answer, drawing, experiment, home, origin, say
from cv_platform_tests.support.tiny_models import tiny_metadata

__all__ = ["home", "origin"]
NO_OTHERS: dict[str, Any] = {"unknown_share": 0.0, "drift_share": 0.0, "novel_share": 0.0, "disagreeing_share": 0.0}


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


def test_what_champion_and_challenger_answer_differently_is_asked_for(engine: Engine, sources: QueueSources) -> None:
    others = {**NO_OTHERS, "random_share": 0.0, "max_candidates": 2}
    config = experiment(queue_size=4, **{**others, "disagreeing_share": 0.5})
    quiet = [answer(engine, drawing("cat", 900 + at)) for at in range(20)]
    differs, agrees, repeated, stated = (answer(engine, drawing("dog", 930 + at)) for at in range(4))
    differs_again = answer(engine, drawing("dog", 930))
    said: dict[str, Any] = {
        "model_name": "pets",
        "model_version": "new",
        "classes": ("dog",),
        "probabilities": (0.2, 0.8),
    }
    said |= {"unknown_score": None, "seconds": 0.01, "answered_on": NOW}
    shadow = [ShadowAnswer(prediction_id=one, agrees=one == agrees, **said) for one in (differs_again, agrees)]
    assert ShadowLog(lambda: engine).write(shadow) == 0
    changed = [
        ChangedAnswer(
            prediction_id=str(one),
            image_sha256=hashlib.sha256(drawing("dog", seed)).hexdigest(),
            old="cat",
            old_confidence=0.6,
            new="dog",
            new_confidence=0.9,
            stated=label,
        )
        for one, seed, label in ((repeated, 932, None), (stated, 933, "cat"))
    ]
    model = ModelIdentity(model_name="pets", version="new")
    replay = Replay(model=model, champion=None, directory=sources.settings.home, changed=tuple(changed))
    made = fill(config, engine, replace(sources, replay=replay), 1)
    assert made.counts["disagreeing"] == 2
    asked = {item.prediction_id: item.score for item in queue_of(engine) if item.reason == "disagreeing"}
    assert asked.keys() & {differs, differs_again}, "an upload once, whichever of its requests the shadow saw"
    assert asked[repeated] == pytest.approx(0.9)
    assert asked.keys() <= {differs, differs_again, repeated}
    assert not asked.keys() & {*quiet, agrees, stated}


def scored_folder(folder: Path, cats: dict[str, tuple[bytes, float | None]]) -> UnlabelledImages:
    """Writes images and what a model said of them, the share of cats, as `batch_scores` does."""
    metadata = tiny_metadata(model_name="pets", class_names=("cat", "dog"))
    schema = scores_schema(metadata)
    rows: dict[str, list[Any]] = {name: [] for name in schema.names}
    for path, (content, share) in cats.items():
        (folder / path).write_bytes(content)
        sha256 = hashlib.sha256(content).hexdigest()
        said = {"predicted_class": "cat", "confidence": max(share, 1 - share)} if share is not None else {}
        vectors = {"bbsd_feats": [share or 0.0, 1 - (share or 0.0)], "uae_feats": [0.0] * 4, "features": [0.0] * 5}
        row = {"path": path, "sha256": sha256, "model_name": "pets", "model_version": "v", **said, **vectors}
        row |= {"properties": [0.0] * 7, "problem": None if said else "broken"}
        for name in rows:
            rows[name].append(row.get(name))
    pq.write_table(pa.table(rows, schema=schema), folder / BatchScores.FILE)
    model = ModelIdentity(model_name="pets", version="v")
    return UnlabelledImages(BatchScores.of_file(model, str(folder), folder), folder / "scratch")


def test_a_folder_s_unlabelled_images_are_asked_for_once_and_are_no_requests(
    engine: Engine, sources: QueueSources, tmp_path: Path
) -> None:
    others: dict[str, Any] = {"random_share": 0.5, **NO_OTHERS}
    config = experiment(queue_size=4, unlabelled_share=0.5, **others)
    doubtful, sure, gone = drawing("dog", 900), drawing("cat", 901), drawing("cat", 902)
    known = (sources.dataset.directory / read_manifest(sources.dataset.manifest_path)["path"].iloc[0]).read_bytes()
    cats = {"a.jpg": (sure, 0.99), "b.jpg": (doubtful, 0.52), "copy.jpg": (doubtful, 0.52), "known.jpg": (known, 0.5)}
    folder = scored_folder(tmp_path, {**cats, "gone.jpg": (gone, 0.5), "broken.jpg": (b"no image", None)})
    (tmp_path / "gone.jpg").unlink()
    sources = replace(sources, unlabelled=folder)
    sent = answer(engine, drawing("cat", 903))
    made = fill(config, engine, sources, 1)
    assert (made.requests, made.counts) == (1, {"random": 1, "unlabelled": 2})
    assert any("gone.jpg" in problem for problem in made.problems)
    asked = {item.reason: item for item in queue_of(engine)}
    assert asked["random"].prediction_id == sent
    assert asked["random"].chance == 1.0
    folder_items = [item for item in queue_of(engine) if item.reason == "unlabelled"]
    second, first = sorted(folder_items, key=lambda item: item.score)
    assert (first.score, second.score) == (pytest.approx(0.96), pytest.approx(0.02))
    with engine.connect() as connection:
        found = connection.execute(select(predictions, images.c.content).join(images).where(~is_request())).all()
    assert {row.content for row in found} == {doubtful, sure}
    assert sorted(row.prediction_json["cat"] for row in found) == pytest.approx([0.52, 0.99])

    wish = Wish("anna", tiny_metadata(model_name="pets", class_names=("cat", "dog")))
    reviewed, _ = tasks(engine, wish, "review", limit=10)
    assert [task.prediction_id for task in reviewed] == [sent], "nobody was answered about the others"

    say(engine, first.prediction_id, "dog", "labeller:anna")
    metrics = measure_production(
        config,
        model_name="pets",
        engine=engine,
        storage=sources.storage,
        now=NOW + timedelta(minutes=5),
        directory=tmp_path / "metrics",
    )
    assert (metrics.predictions, metrics.with_feedback) == (1, 0)
    (upload,) = collect_labels(engine, config.model).uploads
    assert (upload.labels, upload.sha256) == (("dog",), hashlib.sha256(doubtful).hexdigest())
    delete_from_database(engine, second.prediction_id)
    again = fill(config, engine, sources, 2)
    assert (again.requests, again.counts.get("unlabelled", 0)) == (0, 0), "nor the one that was deleted"


def test_the_page_says_of_each_reason_why_an_image_is_asked_about() -> None:
    page = (files("cv_platform.serving") / "page" / "labelling.js").read_text(encoding="utf-8")
    told = set(re.findall(r"^  (\w+): 'Asked ", page, re.MULTILINE))
    assert told == set(experiment(queue_size=1).labels.quotas())


def test_labels_of_random_requests_estimate_the_accuracy_on_all_while_comments_on_mistakes_do_not(
    engine: Engine, sources: QueueSources, tmp_path: Path
) -> None:
    """Two windows of unlike size and accuracy; all that is labelled besides is what the model got wrong."""
    config = experiment(queue_size=10, random_share=1.0, **NO_OTHERS)
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
    scores = {"unknown": np.full(6, np.nan), "novel": np.array([0.9, 0.89, 0.88, 0.5, 0.4, 0.3])}
    chosen = choose(scores, {"unknown": 2, "novel": 1}, vectors, np.arange(6))
    assert [(choice.position, choice.reason) for choice in chosen] == [
        (0, "novel"),
        (5, "novel"),
        (3, "novel"),
    ]
    together = np.array([0, 0, 0, 1, 2, 3])
    assert len(choose(scores, {"novel": 6}, vectors, together)) == 4, "near-copies once"
    assert choose({}, {"uncertain": 3}, np.empty((0, 2)), np.empty(0, np.int64)) == []


def test_the_uncertain_are_unlike_each_other_where_the_scores_alone_would_take_what_is_alike() -> None:
    # Two heaps of five images that look alike; the first has all of the highest scores.
    vectors = np.concatenate([np.full((5, 2), 1.0), np.full((5, 2), 9.0)]) + np.linspace(0, 0.1, 10)[:, np.newaxis]
    uncertain = np.concatenate([np.linspace(1.0, 0.9, 5), np.linspace(0.8, 0.7, 5)])
    for seed in range(5):
        chosen = choose({"uncertain": uncertain}, {"uncertain": 3}, vectors, np.arange(10), seed=seed)
        assert len({choice.position for choice in chosen}) == 3
        assert {choice.position // 5 for choice in chosen} == {0, 1}
        assert [choice.score for choice in chosen] == sorted((choice.score for choice in chosen), reverse=True)
    scores = {"uncertain": np.array([1.0, 0.5, np.nan, 0.0])}
    near = np.array([0, 0, 1, 2])
    assert len(choose(scores, {"uncertain": 4}, np.eye(4), near)) == 2, "near-copies once"


def test_the_reasons_share_the_queue_without_an_image_too_many() -> None:
    shares: dict[str, Any] = {
        **NO_OTHERS,
        "random_share": 0.3,
        "unknown_share": 0.3,
        "drift_share": 0.3,
        "novel_share": 0.1,
    }
    quotas = experiment(queue_size=5, **shares).labels.quotas()
    assert quotas == {
        "random": 1,
        "unknown": 1,
        "drift": 1,
        "novel": 0,
        "disagreeing": 0,
        "unlabelled": 0,
        "uncertain": 2,
    }


def test_scores_are_as_worked_by_hand() -> None:
    assert uncertainty(np.array([[0.7, 0.2, 0.1], [0.5, 0.5, 0.0]])).tolist() == pytest.approx([0.5, 1.0])
    assert uncertainty(np.array([[0.9, 0.45]]), np.array([0.5, 0.5])).tolist() == pytest.approx([0.9])
    # 0.4 is half of the way from the threshold down to 0, 0.6 a quarter of that up to 1.
    assert uncertainty(np.array([[0.4, 0.6]]), np.array([0.8, 0.2])).tolist() == pytest.approx([0.5])
    known = np.array([[1.0, 0.0], [0.0, 2.0]])
    assert novelty(np.array([[3.0, 0.0], [1.0, 1.0]]), known).tolist() == pytest.approx([0.0, 1 - 2**-0.5])
    assert np.isnan(novelty(known, np.empty((0, 2)))).all()
