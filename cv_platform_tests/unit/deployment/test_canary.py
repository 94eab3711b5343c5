"""Deployments that try a version out on live traffic first, with real holders and bundles."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cv_platform.config import DeployConfig
from cv_platform.defs.deployment import _probation_metadata
from cv_platform.deployment import rollout
from cv_platform.deployment.rollout import deploy
from cv_platform.errors import ChallengerReturnedError, DeploymentError
from cv_platform.probation import Probation
from cv_platform.records import Deployment
from cv_platform.serving.model.holder import ModelHolder, Pace
from cv_platform.serving.model.runtime import LoadedModel
from cv_platform.serving.model.worker_watch import WorkerWatch
from cv_platform.serving.routes.answer import predict_upload
from cv_platform.storage import BundleMetadata, CentralStorage
from cv_platform_tests.support.http_client import BrightnessRuntime, flat_image, png
from cv_platform_tests.support.production import SERVICE, point_to, version_of
from cv_platform_tests.support.record_samples import model_bundle
from cv_platform_tests.support.tiny_models import TinyExport, publish_tiny

UPLOAD = png(flat_image(10, 200, 30))


class BrokenRuntime(BrightnessRuntime):
    def __call__(self, images: Any, class_index: Any) -> Any:
        raise RuntimeError("out of cheese")


@pytest.fixture
def storage(tmp_path: Path) -> CentralStorage:
    return CentralStorage(tmp_path / "storage")


@pytest.fixture
def versions(storage: CentralStorage, hand_made: TinyExport) -> tuple[BundleMetadata, BundleMetadata]:
    """Two published versions, of which the first one serves."""
    first, second = publish_tiny(storage, hand_made), publish_tiny(storage, hand_made)
    point_to(storage, first)
    return first, second


@pytest.fixture
def workers(storage: CentralStorage, tmp_path: Path, versions: Any) -> Iterator[list[ModelHolder]]:
    """Two workers that answer requests all the time."""
    holders = [
        ModelHolder(
            WorkerWatch(storage, SERVICE),
            worker_id=name,
            cache=tmp_path / f"cache-{name}",
            pace=Pace(poll_seconds=0.02, tell_seconds=0.05),
        )
        for name in ("a", "b")
    ]
    stopping = threading.Event()

    def send() -> None:
        while not stopping.wait(0.005):
            for holder in holders:
                model = holder.current()
                assert model is not None
                predict_upload(model, UPLOAD, max_pixels=10_000, probation=holder.probation())

    for holder in holders:
        holder.start()
    clients = threading.Thread(target=send)
    clients.start()
    yield holders
    stopping.set()
    clients.join(timeout=30)
    for holder in holders:
        holder.stop()


def deploy_tried(storage: CentralStorage, cache: Path, metadata: BundleMetadata, **canary: float) -> Deployment:
    terms = {"fraction": 0.5, "minutes": 0.001, "min_requests": 40, "max_slowdown": 100.0, **canary}
    config = DeployConfig.model_validate({"service": SERVICE, "canary": terms})
    return deploy(model_bundle(metadata).model, config, experiment="tiny", storage=storage, cache=cache)


def test_a_canary_that_stands_is_promoted_and_confirmed_by_every_worker(
    storage: CentralStorage, cache: Path, versions: Any, workers: list[ModelHolder]
):
    first, second = versions
    done = deploy_tried(storage, cache, second)
    assert done.confirmed_workers == ("a", "b")
    assert (done.model.version, done.previous_version) == (second.version, first.version)
    assert "On probation, champion: " in done.message
    assert "challenger, canary: answers " in done.message
    assert [version_of(worker) for worker in workers] == [second.version] * 2
    pointer = storage.read_pointer(SERVICE)
    assert pointer is not None
    assert [move.action for move in pointer.history] == ["promote", "probation"]


def test_a_canary_that_fails_leaves_the_champion_and_its_numbers(
    storage: CentralStorage, cache: Path, versions: Any, workers: list[ModelHolder], monkeypatch: pytest.MonkeyPatch
):
    first, second = versions
    monkeypatch.setattr(workers[0]._keeper, "_load", lambda *_: LoadedModel(second, BrokenRuntime()))
    with pytest.raises(ChallengerReturnedError, match="It fails more often than the champion") as raised:
        deploy_tried(storage, cache, second, min_requests=100_000)
    assert [version_of(worker) for worker in workers] == [first.version] * 2
    tally: Any = raised.value.numbers["tally"]
    failed, asked = (tally["challenger"][name] for name in ("failed", "asked"))
    assert failed >= 5
    shown = _probation_metadata(Probation.model_validate(raised.value.numbers))["champion_and_challenger"]
    rows = {str(row.data["model"]): row.data for row in shown.records}
    assert rows["challenger, canary"]["failed"] == f"{failed / asked:.1%} ({failed})"
    assert rows["champion"]["failed"] == "0.0% (0)"


def test_a_deployment_that_is_interrupted_sends_the_challenger_back(
    storage: CentralStorage,
    cache: Path,
    versions: Any,
    workers: list[ModelHolder],
    monkeypatch: pytest.MonkeyPatch,
):
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(rollout, "_wait_for_end", interrupted)
    with pytest.raises(KeyboardInterrupt):
        deploy_tried(storage, cache, versions[1], minutes=60)
    pointer = storage.read_pointer(SERVICE)
    assert pointer is not None
    assert pointer.probation is not None
    assert (pointer.version, pointer.probation.state) == (versions[0].version, "returned")
    assert version_of(workers[0]) == versions[0].version


def test_without_a_running_service_nothing_is_tried_out_and_nothing_moves(
    storage: CentralStorage, cache: Path, versions: Any
):
    with pytest.raises(DeploymentError, match="Expected a running worker"):
        deploy_tried(storage, cache, versions[1])
    pointer = storage.read_pointer(SERVICE)
    assert pointer is not None
    assert (pointer.version, pointer.probation) == (versions[0].version, None)


def test_the_first_version_of_a_service_has_nothing_to_be_tried_beside(
    storage: CentralStorage, cache: Path, hand_made: TinyExport
):
    metadata = publish_tiny(storage, hand_made)
    assert deploy_tried(storage, cache, metadata).model.version == metadata.version
