"""A challenger on probation in one worker and in several, by models that compute by hand."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import numpy as np
import pytest

from cv_platform.audit import AuditLog, Note
from cv_platform.config import CanaryConfig
from cv_platform.errors import CorruptBundleError, ImageError
from cv_platform.probation import Probation, Tally, WorkerTally
from cv_platform.serving.model.probation import LiveProbation, ProbationKeeper
from cv_platform.serving.model.promotion import Claim, Promoter
from cv_platform.serving.model.runtime import LoadedModel, Prediction
from cv_platform.serving.routes.answer import Predicted, predict_upload
from cv_platform.storage import BundleMetadata, CentralStorage, ProductionPointer
from cv_platform_tests.support.http_client import BrightnessRuntime, brightness_model, flat_image, png
from cv_platform_tests.support.production import SERVICE, point_to
from cv_platform_tests.support.tiny_models import tiny_metadata

FIRST, SECOND = "20260101T000000Z-00000001", "20260102T000000Z-00000002"
UPLOAD = png(flat_image(200, 10, 10))
CHAMPION = brightness_model(version=FIRST)


class BrokenRuntime(BrightnessRuntime):
    def __call__(self, images: np.ndarray, class_index: np.ndarray) -> Prediction:
        raise RuntimeError("out of cheese")


class NoNumberRuntime(BrightnessRuntime):
    def __call__(self, images: np.ndarray, class_index: np.ndarray) -> Prediction:
        answer = super().__call__(images, class_index)
        answer.probabilities[:] = np.nan
        return answer


def challenger(runtime: Any = BrightnessRuntime) -> LoadedModel:
    return LoadedModel(tiny_metadata(SECOND), runtime())


def probation(**terms: float) -> Probation:
    terms = {"fraction": 0.5, "minutes": 1e-6, "min_requests": 20, **terms}
    return Probation(
        probation_id="0123456789abcdef",
        model_name="tiny",
        version=SECOND,
        since_utc=datetime(2026, 1, 1, tzinfo=UTC),
        **CanaryConfig.model_validate(terms).model_dump(),
    )


def ask(live: LiveProbation | None, times: int = 1) -> list[Predicted]:
    return [predict_upload(CHAMPION, UPLOAD, max_pixels=10_000, probation=live) for _ in range(times)]


def test_the_draw_follows_from_the_ids_and_has_the_share_that_was_asked_for():
    ids = [UUID(int=n, version=4) for n in range(4000)]
    drawn = [probation(fraction=0.1).draws(name) for name in ids]
    assert drawn == [probation(fraction=0.1).draws(name) for name in ids]
    assert sum(drawn) == pytest.approx(400, abs=3 * np.sqrt(4000 * 0.1 * 0.9))
    answers = ask(LiveProbation(probation(), challenger()), 60)
    assert {a.model.version == SECOND for a in answers if probation().draws(a.prediction_id)} == {True}
    assert {a.model.version for a in answers} == {FIRST, SECOND}


@pytest.mark.parametrize("runtime", [BrokenRuntime, NoNumberRuntime])
def test_what_the_challenger_fails_is_answered_by_the_champion_and_counted(runtime: Any):
    live = LiveProbation(probation(), challenger(runtime))
    answers = ask(live, 40)
    assert {answer.model.version for answer in answers} == {FIRST}
    assert all(np.isfinite(answer.prediction.probabilities).all() for answer in answers)
    drawn = sum(probation().draws(answer.prediction_id) for answer in answers)
    tally = live.tally()
    assert (tally.challenger.asked, tally.challenger.failed) == (drawn, drawn) != (0, 0)
    assert (tally.champion.asked, tally.champion.failed) == (40, 0)


def test_an_upload_that_is_no_image_is_nobodys_failure():
    live = LiveProbation(probation(), challenger())
    for _ in range(10):
        with pytest.raises(ImageError):
            predict_upload(CHAMPION, b"no image", max_pixels=10_000, probation=live)
    assert live.tally() == Tally()


# Several workers


@pytest.fixture
def storage(tmp_path: Path) -> CentralStorage:
    """Two published versions, of which the first one serves; their files are none, as nothing loads them here."""
    storage = CentralStorage(tmp_path / "storage")
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "model.onnx").write_bytes(b"none")
    for version in (FIRST, SECOND):
        storage.publish_bundle(tmp_path / "bundle", tiny_metadata(version))
    point_to(storage, storage.read_metadata("tiny", FIRST))
    return storage


@pytest.fixture
def begin(storage: CentralStorage, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ProductionPointer]:
    def load(self: Promoter, model_name: str, version: str) -> BundleMetadata:
        return storage.read_metadata(model_name, version)

    monkeypatch.setattr(Promoter, "_load", load)

    def begin(version: str = SECOND, **terms: float) -> ProductionPointer:
        given = CanaryConfig.model_validate({"fraction": 0.5, "minutes": 1e-6, "min_requests": 20, **terms})
        promoter = Promoter(storage, SERVICE, cache, cache / "lock")
        move = promoter.begin_probation(
            "tiny", version, given, is_shadow=False, claim=Claim("tiny"), note=Note("a run", "it has passed its gate")
        )
        assert move is not None
        return move.pointer

    return begin


def keeper(storage: CentralStorage, name: str, model: LoadedModel | None = None) -> ProbationKeeper:
    def load(model_name: str, version: str) -> LoadedModel:
        if model is None:
            raise CorruptBundleError(f"{model_name} {version}: expected a model. Received: none.")
        return model

    return ProbationKeeper(storage, SERVICE, name, load, tell_seconds=0.0)


def follow(storage: CentralStorage, *keepers: ProbationKeeper) -> ProductionPointer:
    """Lets each of the workers look once."""
    for each in keepers:
        each.follow(storage.read_pointer(SERVICE))
    pointer = storage.read_pointer(SERVICE)
    assert pointer is not None
    return pointer


def ended(pointer: ProductionPointer) -> tuple[str, str, str]:
    assert pointer.probation is not None
    return pointer.version, pointer.probation.state, pointer.probation.reason


def test_all_workers_together_have_seen_enough_and_one_of_them_promotes(storage: CentralStorage, begin: Any):
    begin(min_requests=30)
    workers = [keeper(storage, name, challenger()) for name in ("a", "b")]
    assert ended(follow(storage, *workers))[:2] == (FIRST, "running")
    for worker in workers:
        ask(worker.current(), 45)  # About 22 of the challenger's in each.
    pointer = follow(storage, *workers)
    assert ended(pointer)[:2] == (SECOND, "promoted")
    assert (pointer.previous_version, pointer.history[0].by) == (FIRST, f"the probation on {SERVICE}")
    assert [move.action for move in pointer.history] == ["promote", "probation"]
    assert [entry.action for entry in AuditLog(storage.url).entries()] == ["probation", "promote"]
    assert pointer.probation is not None
    assert pointer.probation.tally.challenger.asked + pointer.probation.tally.champion.asked == 90
    follow(storage, *workers)
    assert [worker.current() for worker in workers] == [None, None]


def test_a_challenger_that_fails_goes_back_and_the_numbers_stay(storage: CentralStorage, begin: Any):
    begin()
    worker = keeper(storage, "a", challenger(BrokenRuntime))
    follow(storage, worker)
    assert {answer.model.version for answer in ask(worker.current(), 60)} == {FIRST}
    pointer = follow(storage, worker)
    assert ended(pointer) == (FIRST, "returned", "It fails more often than the champion")
    assert [move.action for move in pointer.history] == ["return", "probation"]
    assert "failed" in pointer.history[0].because
    assert pointer.probation is not None
    assert pointer.probation.tally.challenger.failed > 10


def test_workers_that_start_again_go_on_from_what_was_told(storage: CentralStorage, begin: Any):
    pointer = begin(minutes=30, give_up_minutes=60)
    assert pointer.probation is not None
    first = keeper(storage, "a", challenger())
    follow(storage, first)
    ask(first.current(), 60)
    follow(storage, first)
    seen = storage.read_tallies(SERVICE, pointer.probation.probation_id)[0]
    assert seen.tally.challenger.asked >= 20
    # Half an hour later the worker is killed, and another one starts.
    storage.write_tally(SERVICE, "a", seen.model_copy(update={"watched_seconds": 1800.0}))
    del first
    assert ended(follow(storage, keeper(storage, "b", challenger())))[:2] == (SECOND, "promoted")


@pytest.mark.parametrize(("minutes", "version"), [(59, FIRST), (61, FIRST)])
def test_too_few_requests_send_it_back_only_when_it_is_time_to_give_up(
    storage: CentralStorage, begin: Any, minutes: float, version: str
):
    pointer = begin(give_up_minutes=60)
    assert pointer.probation is not None
    name = pointer.probation.probation_id
    storage.write_tally(SERVICE, "b", WorkerTally(probation_id=name, worker_id="b", watched_seconds=60 * minutes))
    now = ended(follow(storage, keeper(storage, "a", challenger())))
    assert now[:2] == (version, "running" if minutes < 60 else "returned")
    assert minutes < 60 or "0 of at least 20 requests came" in now[2]


def test_a_worker_that_cannot_take_it_up_sends_it_back(storage: CentralStorage, begin: Any):
    begin()
    follow(storage, keeper(storage, "a", challenger()))
    pointer = follow(storage, keeper(storage, "b"))
    assert ended(pointer)[:2] == (FIRST, "returned")
    assert "b could not take it up: tiny" in ended(pointer)[2]


def test_a_retry_joins_and_a_persons_move_ends_it(storage: CentralStorage, begin: Any, cache: Path):
    pointer = begin()
    assert begin() == pointer
    worker = keeper(storage, "a", challenger())
    follow(storage, worker)
    Promoter(storage, SERVICE, cache, cache / "lock").promote("tiny", FIRST)
    assert follow(storage, worker).probation is None
    assert worker.current() is None


def test_what_is_garbage_leaves_the_challenger_alone(storage: CentralStorage, begin: Any):
    assert ("tiny", SECOND) in begin().references
    assert ("tiny", SECOND) not in follow(storage, keeper(storage, "a")).references


def test_tallies_of_another_probation_do_not_count(storage: CentralStorage, begin: Any):
    storage.write_tally(SERVICE, "old", WorkerTally(probation_id=uuid4().hex[:16], worker_id="old", load_error="no"))
    begin()
    assert ended(follow(storage, keeper(storage, "a", challenger())))[1] == "running"
