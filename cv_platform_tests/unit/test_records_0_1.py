"""Records of release 0.1: `home_0_1/` has those that its demo left (commit d1777a5), with shorter lists."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cv_platform.errors import StorageError
from cv_platform.record_store import RecordStore
from cv_platform.records import (
    RECORDS,
    DatasetVersion,
    DriftReport,
    Evaluation,
    ModelBundle,
    PackedImages,
    ReferenceData,
    TrainedModel,
    ValidationVerdict,
)

WRITTEN = Path(__file__).parent / "home_0_1"


@pytest.fixture
def store(tmp_path: Path) -> RecordStore:
    """The records in a home that was moved since: they name `/srv/old home`."""
    store = RecordStore(tmp_path / "home", "digits")
    shutil.copytree(WRITTEN, store.folder)
    return store


NEWER = {
    *("embeddings", "challenger_replay", "labeling_queue", "batch_scores", "batch_drift_report", "labelled_version"),
}


@pytest.mark.parametrize("asset", [asset for asset in RECORDS if asset not in NEWER])
def test_every_record_is_read_and_names_the_home_at_hand(store: RecordStore, asset: str) -> None:
    record = store.latest(RECORDS[asset])
    assert record is not None
    directory = getattr(record, "directory", store.home)
    assert directory.is_relative_to(store.home)
    assert "old home" not in record.model_dump_json(context={"home": store.home}, exclude={"url", "report_url"})


def test_what_they_say_is_kept(store: RecordStore) -> None:
    dataset, packed = store.latest(DatasetVersion), store.latest(PackedImages)
    trained, judged = store.latest(TrainedModel), store.latest(Evaluation)
    verdict = store.latest(ValidationVerdict)
    assert dataset is not None
    assert packed is not None
    assert trained is not None
    assert judged is not None
    assert verdict is not None
    old = json.loads((WRITTEN / "model.json").read_text())
    assert dataset.provenance == packed.provenance == trained.provenance
    assert (trained.provenance.ds_name, trained.provenance.dvc_tag) == ("digits", "v2.0.0")
    assert trained.task == packed.task
    assert trained.pack == packed.directory.name
    assert trained.keras_path.relative_to(store.home) == Path(old["keras_path"]).relative_to("/srv/old home")
    assert (trained.epochs_run, trained.temperature) == (old["epochs_run"], old["temperature"])
    assert judged.model == trained.model
    assert judged.plots["reliability"] == judged.directory / "reliability.png"
    assert dataset.manifest_path.parent == dataset.directory
    assert verdict.manifest == dataset.manifest
    assert verdict.report_path.parent.parent == store.home / "validation" / "digits"


def test_an_evaluation_gets_the_threshold_of_its_models_config(store: RecordStore) -> None:
    path = store.folder / "model.json"
    path.write_text(path.read_text().replace('"threshold": 0.5', '"threshold": 0.25'))
    assert (judged := store.latest(Evaluation)) is not None
    assert judged.threshold == 0.25


def test_addresses_of_what_lies_in_the_home_follow_it(store: RecordStore) -> None:
    for kind, field in ((ModelBundle, "url"), (ReferenceData, "url"), (DriftReport, "report_url")):
        asset = next(asset for asset, known in RECORDS.items() if known is kind)
        old = json.loads((WRITTEN / f"{asset}.json").read_text())[field]
        (store.home / "storage" / old.partition("/storage/")[2]).mkdir(parents=True)
        record = store.latest(kind)
        assert getattr(record, field) == f"{(store.home / 'storage').as_uri()}/{old.partition('/storage/')[2]}"


def test_the_first_new_record_leaves_it_to_the_runs_that_saw_it(store: RecordStore) -> None:
    assert store.version_for("model", run_id="11111111-run") == "0.1"
    trained = store.latest(TrainedModel)
    assert trained is not None
    new = store.write("model", trained.model_copy(update={"temperature": 7.0}), run_id="22222222-run")
    assert store.version_for("model", run_id="11111111-run") == "0.1"
    assert store.read("model", TrainedModel, "0.1") == trained
    assert store.version_for("model", run_id="33333333-run") == new
    assert store.made_from(["model"], run_id="11111111-run") == {"model": "0.1"}
    assert (judged := store.latest(Evaluation)) is not None
    assert judged.threshold == 0.5


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model_name": "m"}'])
def test_a_damaged_one_says_what_to_do(store: RecordStore, content: str) -> None:
    (store.folder / "model.json").write_text(content)
    with pytest.raises(StorageError, match="Materialise digits/model again"):
        store.latest(TrainedModel)
