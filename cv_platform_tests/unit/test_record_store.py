"""Records on disk: relative to the home, by version, and those of a run its own."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from pydantic import ValidationError
from pydantic_core import PydanticSerializationError

from cv_platform import record_store
from cv_platform.errors import StorageError
from cv_platform.record_store import RecordStore
from cv_platform.records import DatasetVersion, DriftReport, Evaluation, ReferenceData, TrainedModel
from cv_platform_tests.support.drift_reports import make_report
from cv_platform_tests.support.record_samples import evaluation, identity, trained_model

ONE, TWO, THREE = "11111111-run", "22222222-run", "33333333-run"


@pytest.fixture
def store(tmp_path: Path) -> RecordStore:
    return RecordStore(tmp_path / "home", "pets")


def model(store: RecordStore, version: str) -> TrainedModel:
    return trained_model(store.home / "models" / version, model=identity(version=version))


def test_paths_are_relative_on_disk_and_those_of_the_home_at_hand_in_memory(store: RecordStore, tmp_path: Path) -> None:
    record = model(store, "v1")
    report = make_report(report_url=(store.home / "storage" / "a b.html").as_uri())
    elsewhere = ReferenceData(model=identity(), directory=store.home / "models", url="s3://bucket/a", rows=1)
    for asset, kept in (("model", record), ("drift_report", report), ("reference_data", elsewhere)):
        store.write(asset, kept, run_id=ONE)
    assert all(str(tmp_path) not in path.read_text() for path in store.home.rglob("*.json"))
    assert store.latest(TrainedModel) == record

    shutil.move(store.home, tmp_path / "moved")
    moved = RecordStore(tmp_path / "moved", "pets")
    assert (found := moved.latest(TrainedModel)) is not None
    assert found.keras_path == tmp_path / "moved" / "models" / "v1" / "tiny.keras"
    assert (page := moved.latest(DriftReport)) is not None
    assert page.report_url == (tmp_path / "moved" / "storage" / "a b.html").as_uri()
    assert (data := moved.latest(ReferenceData)) is not None
    assert data.url == "s3://bucket/a"


def test_a_record_is_not_written_or_read_without_its_home(store: RecordStore) -> None:
    record = model(store, "v1")
    with pytest.raises(PydanticSerializationError, match="CV_HOME"):
        record.model_dump_json()
    with pytest.raises(PydanticSerializationError, match="elsewhere"):
        trained_model(Path("/elsewhere")).model_dump_json(context={"home": store.home})
    text = record.model_dump_json(context={"home": store.home})
    with pytest.raises(ValidationError, match="CV_HOME"):
        TrainedModel.model_validate_json(text)
    for path in ("/etc", "models/../../etc"):
        with pytest.raises(ValidationError, match="relative to CV_HOME"):
            TrainedModel.model_validate_json(text.replace("models/v1", path), context={"home": store.home})
    with pytest.raises(ValidationError, match="absolute"):
        trained_model(Path("models"))


def test_a_run_reads_what_it_wrote_and_else_what_it_first_saw(store: RecordStore) -> None:
    first = store.write("model", model(store, "v1"), run_id=ONE)
    assert store.version_for("model", run_id=TWO) == first

    second = store.write("model", model(store, "v2"), run_id=THREE)
    store.write("evaluation", evaluation(store.home / "evaluation"), run_id=THREE)
    assert store.version_for("model", run_id=TWO) == first, "it looked before"
    assert store.version_for("evaluation", run_id=TWO) is None, "there was none"
    assert store.version_for("model", run_id=ONE) == first, "its own"
    assert store.version_for("model", run_id="44444444-run") == second

    own = store.write("model", model(store, "v3"), run_id=TWO)
    assert store.version_for("model", run_id=TWO) == own
    assert store.version_for("model", run_id=THREE) == second
    assert store.read("model", TrainedModel, first).model.version == "v1"
    assert (latest := store.latest(TrainedModel)) is not None
    assert latest.model.version == "v3"
    assert json.loads((store.folder / "model.json").read_text()) == json.loads(
        (store.folder / "model" / f"{own}.json").read_text()
    )


def test_a_damaged_note_of_what_a_run_saw_is_written_anew(store: RecordStore) -> None:
    version = store.write("model", model(store, "v1"), run_id=ONE)
    (store.folder / "runs" / f"{TWO}.json").write_text("")
    assert store.version_for("model", run_id=TWO) == version


def test_versions_follow_each_other_also_when_the_clock_is_set_back(
    store: RecordStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:
            return datetime(2020, 1, 1, tzinfo=UTC)

    versions = [store.write("model", model(store, "v1"), run_id=ONE)]
    monkeypatch.setattr(record_store, "datetime", Clock)
    versions += [store.write("model", model(store, name), run_id=run) for name, run in (("v2", TWO), ("v3", ONE))]
    assert versions == sorted(versions)
    assert (latest := store.latest(TrainedModel)) is not None
    assert latest.model.version == "v3"


def test_a_record_names_what_it_was_made_from_all_the_way_up(store: RecordStore) -> None:
    trained = store.write("model", model(store, "v1"), run_id=ONE)
    made_from = store.made_from(["model", "packed_images"], run_id=ONE)
    assert made_from == {"model": trained}
    judged = evaluation(store.home / "evaluation").model_copy(update={"made_from": made_from})
    version = store.write("evaluation", judged, run_id=ONE)
    assert store.made_from(["evaluation"], run_id=TWO) == {"model": trained, "evaluation": version}


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": 1}'])
def test_a_damaged_record_says_what_to_do(store: RecordStore, content: str) -> None:
    version = store.write("model", model(store, "v1"), run_id=ONE)
    (store.folder / "model" / f"{version}.json").write_text(content)
    with pytest.raises(StorageError, match="Materialise pets/model again"):
        store.read("model", TrainedModel, version)


def test_a_missing_record_says_what_to_do(store: RecordStore) -> None:
    assert store.latest(Evaluation) is None
    version = f"{datetime.now(UTC) + timedelta(days=1):%Y%m%dT%H%M%S%fZ}-00000000"
    with pytest.raises(StorageError, match="Materialise pets/dataset again"):
        store.read("dataset", DatasetVersion, version)
