"""A canary as clients see it: which model spoke, in the answer and in the log; and a service that is killed."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from cv_platform.audit import Note
from cv_platform.config import CanaryConfig
from cv_platform.probation import Probation
from cv_platform.serving.app import create_app
from cv_platform.serving.model.probation import LiveProbation
from cv_platform.serving.model.promotion import Claim, Promoter
from cv_platform.serving.model.runtime import LoadedModel
from cv_platform.storage import CentralStorage
from cv_platform_tests.support.app_fixtures import MakeWorker, spooled, spooled_at
from cv_platform_tests.support.http_client import (
    BrightnessRuntime,
    Client,
    FixedModels,
    brightness_model,
    flat_image,
    png,
)
from cv_platform_tests.support.production import SERVICE, point_to
from cv_platform_tests.support.served_app import ServedApp, serve_app
from cv_platform_tests.support.tiny_models import TinyExport, publish_tiny, tiny_metadata
from cv_platform_tests.support.waiting import wait_until

FIRST, SECOND = "20260101T000000Z-00000001", "20260102T000000Z-00000002"
UPLOAD = png(flat_image(200, 10, 10))


class BrokenRuntime(BrightnessRuntime):
    def __call__(self, *_: Any) -> Any:
        raise RuntimeError("out of cheese")


def on_probation(runtime: Any) -> FixedModels:
    probation = Probation(
        probation_id="0123456789abcdef",
        model_name="tiny",
        version=SECOND,
        since_utc=datetime(2026, 1, 1, tzinfo=UTC),
        **CanaryConfig(fraction=0.5).model_dump(),
    )
    live = LiveProbation(probation, LoadedModel(tiny_metadata(SECOND), runtime()))
    return FixedModels(brightness_model(version=FIRST), on_probation=live)


@pytest.mark.parametrize(("runtime", "versions"), [(BrightnessRuntime, {FIRST, SECOND}), (BrokenRuntime, {FIRST})])
def test_answer_and_log_say_which_model_spoke(make_worker: MakeWorker, runtime: Any, versions: set[str]):
    worker = make_worker(models=on_probation(runtime))
    client = Client(create_app(worker))
    answers = [client.predict(UPLOAD).json() for _ in range(12)]
    files = [("files", ("image.png", UPLOAD, "image/png"))] * 8
    answers += client.post("/predict/batch", files=files).json()["results"]
    said = {answer["prediction_id"]: answer["model_version"] for answer in answers}
    assert len(said) == 20
    assert set(said.values()) == versions
    assert {row["prediction_id"]: row["model_version"] for row in spooled(worker)} == said


def test_a_canary_goes_on_in_a_service_that_was_killed_and_ends_with_nobody_waiting(
    tmp_path: Path, hand_made: TinyExport
):
    """The first service is killed while it answers; the next one counts on, and promotes. No 200 is without its row."""
    home, storage = tmp_path / "home", CentralStorage(tmp_path / "storage")
    first, second = publish_tiny(storage, hand_made, FIRST), publish_tiny(storage, hand_made, SECOND)
    point_to(storage, first)
    terms = CanaryConfig(fraction=0.5, minutes=0.01, min_requests=40, max_slowdown=100.0)
    Promoter(storage, SERVICE, home / "cache", home / "lock").begin_probation(
        "tiny", second.version, terms, is_shadow=False, claim=Claim("tiny"), note=Note("a run that was killed since")
    )
    said: dict[str, str] = {}

    def send(served: ServedApp) -> str:
        answer = httpx.post(f"{served.url}/predict?explain=none", files={"file": ("a.png", UPLOAD, "image/png")})
        assert answer.status_code == 200, answer.text
        body = answer.json()
        said[body["prediction_id"]] = body["model_version"]
        return body["model_version"]

    def tallied() -> int:
        probation = pointer_of(storage).probation
        assert probation is not None
        tallies = storage.read_tallies(SERVICE, probation.probation_id)
        return sum(tally.tally.challenger.asked for tally in tallies)

    environment = {"CV_HOME": str(home), "CV_STORAGE": str(tmp_path / "storage")}
    with serve_app({"follows_pointer": True}, **environment) as served:
        wait_until(lambda: send(served) == SECOND)
        while sum(version == SECOND for version in said.values()) < 25:
            send(served)
        wait_until(lambda: tallied() >= 10)
        served.kill()
    assert pointer_of(storage).version == FIRST
    with serve_app({"follows_pointer": True}, **environment) as served:

        def is_promoted() -> bool:
            send(served)
            return pointer_of(storage).version == SECOND

        wait_until(is_promoted)
        wait_until(lambda: send(served) == SECOND)
    probation = pointer_of(storage).probation
    assert probation is not None
    assert probation.state == "promoted"
    assert probation.tally.challenger.asked >= 40
    assert {row["prediction_id"]: row["model_version"] for row in spooled_at(home)} == said


def pointer_of(storage: CentralStorage) -> Any:
    return storage.read_pointer(SERVICE)
