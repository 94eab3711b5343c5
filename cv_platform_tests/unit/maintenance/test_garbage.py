"""Garbage collection on a home with one thing of each kind: what goes, what stays, and what happens in between."""

from __future__ import annotations

import json
import os
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from cv_platform.errors import LockHeldError, StorageError, TrackingError
from cv_platform.files import exclusive
from cv_platform.maintenance.garbage import Garbage, collect, find_garbage
from cv_platform.settings import Settings
from cv_platform.storage import CentralStorage, ProductionPointer, WorkerHeartbeat
from cv_platform_tests.support.tiny_models import tiny_metadata

NOW = datetime(2026, 6, 1, tzinfo=UTC)
LONG_AGO = (NOW - timedelta(days=100)).timestamp()
# Ten versions, a day apart, the newest of them 91 days old.
VERSIONS = [f"{NOW - timedelta(days=100 - day):%Y%m%dT%H%M%SZ}-0000000{day}" for day in range(10)]
RUN_LOG = "run-tiny-20260221T000000Z-0000000a.log"
SERVED, PREVIOUS, RUNNING, LAST_GOOD, RECORDED, *OTHERS = VERSIONS


def folder(path: Path, *, age: float = LONG_AGO, content: bytes = b"12345") -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "file").write_bytes(content)
    os.utime(path, (age, age))
    return path


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.from_environment({"CV_HOME": str(tmp_path / "home")})


@pytest.fixture
def home(settings: Settings, tmp_path: Path) -> Path:
    home = settings.home
    storage = CentralStorage(settings.storage_url)
    source = folder(tmp_path / "bundle")
    (source / "file").rename(source / "model.onnx")
    for version in VERSIONS:
        storage.publish_bundle(source, tiny_metadata(version, mlflow_run_id=f"{VERSIONS.index(version):032x}"))
        folder(home / "storage" / "ref_data" / "tiny" / version)
        folder(home / "models" / "tiny" / version)
        folder(home / "evaluation" / "tiny" / version)
        folder(home / "bentoml" / "bentos" / "tiny" / version.lower())
    folder(home / "bentoml" / "bentos" / "tiny" / f"{OTHERS[0].lower()}-2")
    storage.write_pointer("a", pointer(SERVED, PREVIOUS))
    beat = WorkerHeartbeat(worker_id="w", model_name="tiny", version=RUNNING, beat_utc=NOW)
    storage.write_heartbeat("b", beat)
    CentralStorage(home / "cache" / "last_good").write_pointer("a", pointer(LAST_GOOD, None))
    records = home / "records" / "tiny"
    records.mkdir(parents=True)
    (records / "bento.json").write_text(json.dumps({"bento_tag": f"tiny:{RECORDED.lower()}"}))
    (records / "dataset.json").write_text(json.dumps({"directory": str(home / "worktrees" / "tiny" / "used")}))
    vectors = {"directory": str(home / "embeddings" / "tiny" / "used-vectors"), "encoder": "used-encoder"}
    (records / "embeddings.json").write_text(json.dumps(vectors))
    (records / "packed_images.json").write_text(json.dumps({"directory": str(home / "packed" / "used-pack")}))
    for path in (
        "worktrees/tiny/used",
        "worktrees/tiny/old",
        "embeddings/tiny/used-vectors",
        "embeddings/tiny/old-vectors",
        "cache/embeddings/used-encoder",
        "cache/embeddings/old-encoder",
        "packed/used-pack",
        "packed/old-pack",
        "validation/x/old",
        "datasets/.tiny.scratch-0123456789abcdef",
    ):
        folder(home / path)
    folder(home / "worktrees" / "tiny" / "young", age=NOW.timestamp() - 60)
    folder(home / "models" / "tiny" / ".training-old")
    (home / "logs").mkdir()
    for name in (RUN_LOG, "service.log", "service.log.1"):
        (home / "logs" / name).write_text("said")
        os.utime(home / "logs" / name, (LONG_AGO, LONG_AGO))
    folder(home / "dagster" / "logs" / "a-run")
    return home


def pointer(version: str, previous: str | None) -> ProductionPointer:
    return ProductionPointer(
        model_name="tiny",
        version=version,
        previous_model_name="tiny" if previous else None,
        previous_version=previous,
        since_utc=NOW,
    )


def find(settings: Settings, *, unfinished_runs: tuple[str, ...] = (), **changes: int) -> Garbage:
    changed = settings.model_copy(update=changes)
    return find_garbage(changed, unfinished_runs=unfinished_runs, now=NOW.timestamp())


def names(garbage: Garbage) -> set[str]:
    return {item.name for item in garbage.items}


def everything(home: Path) -> dict[str, int]:
    return {p.relative_to(home).as_posix(): p.stat().st_size for p in home.rglob("*") if p.is_file()}


def test_garbage_is_what_nobody_refers_to(settings: Settings, home: Path) -> None:
    before = everything(home)
    garbage = find(settings)
    # Of the five others, the three newest are kept whoever refers to them.
    needless = OTHERS[:2]
    assert names(garbage) == {
        *(f"bundle tiny {version}" for version in needless),
        *(f"models/tiny/{version}" for version in needless),
        *(f"evaluation/tiny/{version}" for version in needless),
        *(f"bentoml/bentos/tiny/{version.lower()}" for version in needless),
        f"bentoml/bentos/tiny/{OTHERS[0].lower()}-2",
        "models/tiny/.training-old",
        "worktrees/tiny/old",
        "embeddings/tiny/old-vectors",
        "cache/embeddings/old-encoder",
        "packed/old-pack",
        "validation/x/old",
        "datasets/.tiny.scratch-0123456789abcdef",
        f"logs/{RUN_LOG}",
        "logs/service.log.1",
        "dagster/logs/a-run",
    }
    assert everything(home) == before
    sizes = {item.name: item.bytes for item in garbage.items}
    assert (sizes["packed/old-pack"], sizes[f"logs/{RUN_LOG}"]) == (5, 4)


def test_collection_deletes_garbage_and_nothing_else(settings: Settings, home: Path) -> None:
    garbage = find(settings)
    deleted = collect(settings, garbage)
    assert deleted == garbage.items
    storage = CentralStorage(settings.storage_url)
    kept = [SERVED, PREVIOUS, RUNNING, LAST_GOOD, RECORDED, *OTHERS[2:]]
    assert storage.bundle_versions("tiny") == kept
    for kind in ("storage/models", "storage/ref_data", "models", "evaluation"):
        assert sorted(p.name for p in (home / kind / "tiny").glob("2026*")) == kept
    assert sorted(p.name for p in (home / "worktrees" / "tiny").iterdir() if p.is_dir()) == ["used", "young"]
    assert (home / "logs" / "service.log").exists()
    assert names(find(settings)) == set()
    assert collect(settings, garbage) == []


def test_more_days_and_more_versions_keep_more(settings: Settings, home: Path) -> None:
    assert names(find(settings, gc_keep_days=101)) == set()
    assert not any(name.startswith("bundle") for name in names(find(settings, gc_keep_versions=5)))
    fewest = names(find(settings, gc_keep_versions=1))
    assert {f"bundle tiny {version}" for version in OTHERS[:4]} <= fewest
    assert not {f"bundle tiny {version}" for version in (SERVED, PREVIOUS, RUNNING, LAST_GOOD, RECORDED)} & fewest


def test_an_unfinished_run_keeps_all_that_it_may_read(settings: Settings, home: Path) -> None:
    garbage = find(settings, unfinished_runs=("run-1",))
    assert names(garbage) == {f"logs/{RUN_LOG}", "logs/service.log.1", "dagster/logs/a-run"}
    assert "run-1" in garbage.kept[0]


def test_what_somebody_works_on_stays(settings: Settings, home: Path) -> None:
    with exclusive(home / "packed" / ".old-pack.lock"):
        collect(settings, find(settings))
        assert (home / "packed" / "old-pack" / "file").exists()
    collect(settings, find(settings))
    assert not (home / "packed" / "old-pack").exists()


def test_a_version_that_was_promoted_after_the_list_was_made_stays(settings: Settings, home: Path) -> None:
    garbage = find(settings)
    storage = CentralStorage(settings.storage_url)
    storage.write_pointer("a", pointer(OTHERS[0], SERVED))
    collect(settings, garbage)
    assert OTHERS[0] in storage.bundle_versions("tiny")
    assert OTHERS[1] not in storage.bundle_versions("tiny")
    assert (home / "models" / "tiny" / OTHERS[0]).exists()


def test_a_version_that_another_host_promotes_during_the_collection_stays_whole(settings: Settings, home: Path) -> None:
    items = {item.name: item for item in find(settings).items}
    storage = CentralStorage(settings.storage_url)
    before = everything(home / "storage" / "models" / "tiny" / OTHERS[0])
    storage.swap_pointer("c", None, pointer(OTHERS[0], None))
    assert not items[f"bundle tiny {OTHERS[0]}"].delete()
    assert everything(home / "storage" / "models" / "tiny" / OTHERS[0]) == before
    assert (home / "storage" / "ref_data" / "tiny" / OTHERS[0]).exists()
    (home / "storage" / "services" / "c" / "production.json").write_text("{")
    with pytest.raises(StorageError, match="ProductionPointer"):
        items[f"bundle tiny {OTHERS[0]}"].delete()
    assert everything(home / "storage" / "models" / "tiny" / OTHERS[0]) == before


def test_nothing_is_deleted_while_a_pointer_cannot_be_read(settings: Settings, home: Path) -> None:
    (home / "storage" / "services" / "a" / "production.json").write_text("{")
    with pytest.raises(StorageError, match="ProductionPointer"):
        find(settings)


def test_a_killed_deletion_is_finished_by_the_next(settings: Settings, home: Path) -> None:
    # As a collection leaves it that dies between the renaming and the last file, however young it is.
    now = NOW.timestamp()
    leftover = folder(home / "packed" / ".some-pack.deleting-0123abcd", age=now)
    # A bundle loses its metadata first: it exists for nobody, and goes with the next collection.
    (home / "storage" / "models" / "tiny" / OTHERS[0] / "tiny.yaml").unlink()
    garbage = find(settings)
    assert "packed/.some-pack.deleting-0123abcd" in names(garbage)
    assert f"bundle tiny {OTHERS[0]}" in names(garbage)
    collect(settings, garbage)
    assert not leftover.exists()
    assert not (home / "storage" / "models" / "tiny" / OTHERS[0]).exists()


def test_a_backup_and_a_promotion_keep_the_collector_out(settings: Settings, home: Path) -> None:
    from cv_platform.maintenance.backup import maintenance_lock
    from cv_platform.serving.model.promotion import PROMOTION_LOCK

    before = everything(home)
    for lock in (maintenance_lock(home), home / "cache" / PROMOTION_LOCK):
        with exclusive(lock, timeout_seconds=0), pytest.raises(LockHeldError, match="another process holds"):
            collect(settings, find(settings))
    assert {name: size for name, size in everything(home).items() if not name.endswith(".lock")} == before


@pytest.mark.xdist_group("tracking")
def test_files_of_deleted_and_old_mlflow_runs_go_and_their_numbers_stay(settings: Settings, home: Path) -> None:
    from mlflow import MlflowClient

    from cv_platform.tracking import start_run

    artifacts = home / "mlflow" / "artifacts"
    runs = []
    for _ in range(5):
        with start_run(
            settings.mlflow_tracking_uri, "tiny", run_name="r", tags={"stage": "model"}, artifact_root=artifacts
        ) as run:
            run.log_metrics({"accuracy": 0.5})
            run.log_artifact(home / "logs" / "service.log")
            runs.append(run.run_id)
    client = MlflowClient(settings.mlflow_tracking_uri, registry_uri=settings.mlflow_tracking_uri)
    client.delete_run(runs[4])
    (home / "records" / "tiny" / "model.json").write_text(json.dumps({"mlflow_run_id": runs[0]}))
    later = (datetime.now(UTC) + timedelta(days=31)).timestamp()
    two = settings.model_copy(update={"gc_keep_versions": 2})
    garbage = find_garbage(two, unfinished_runs=(), now=later)
    # runs[0] is recorded, runs[2] and runs[3] are the newest that are not deleted.
    expected = {f"mlflow/artifacts/tiny/{runs[1]}", f"mlflow/artifacts/tiny/{runs[4]}"}
    assert {name for name in names(garbage) if name.startswith("mlflow")} == expected
    collect(two, garbage)
    assert sorted(p.name for p in (artifacts / "tiny").iterdir()) == sorted([runs[0], runs[2], runs[3]])
    assert client.get_run(runs[1]).data.metrics == {"accuracy": 0.5}


def test_files_of_a_servers_runs_go_where_its_folder_is_named(settings: Settings, home: Path, tmp_path: Path) -> None:
    from cv_platform.tracking import start_run

    # As a server keeps them: by number of the experiment, with the files one folder deeper.
    artifacts = tmp_path / "server"
    server = settings.model_copy(update={"mlflow_tracking_uri": f"sqlite:///{tmp_path}/server.db"})
    runs = []
    for _ in range(2):
        with start_run(server.mlflow_tracking_uri, "tiny", run_name="r", artifact_root=tmp_path / "unused") as run:
            folder(artifacts / "1" / run.run_id / "artifacts")
            runs.append(run.run_id)
    folder(artifacts / "1" / ".0.deleting-00")
    later = (datetime.now(UTC) + timedelta(days=31)).timestamp()
    left_alone = find_garbage(server, unfinished_runs=(), now=later)
    assert [line for line in left_alone.kept if "MLflow" in line]
    one = server.model_copy(update={"gc_keep_versions": 1, "mlflow_artifacts": artifacts})
    garbage = find_garbage(one, unfinished_runs=(), now=later)
    assert {name for name in names(garbage) if name.startswith("mlflow")} == {
        "mlflow/1/.0.deleting-00",
        f"mlflow/1/{runs[0]}",
    }
    collect(one, garbage)
    assert [path.name for path in (artifacts / "1").iterdir()] == [runs[1]]


@pytest.mark.xdist_group("tracking")
def test_nothing_is_deleted_when_mlflow_knows_none_of_the_runs_whose_files_are_there(
    settings: Settings, home: Path, tmp_path: Path
) -> None:
    from cv_platform.tracking import start_run

    artifacts = tmp_path / "server"
    lost = [folder(artifacts / "1" / f"{number:032x}") for number in (90, 91)]
    other = settings.model_copy(
        update={"mlflow_tracking_uri": f"sqlite:///{tmp_path}/other.db", "mlflow_artifacts": artifacts}
    )
    with pytest.raises(TrackingError, match=r"the 2 whose files .* Received: 0 runs.* MLFLOW_TRACKING_URI"):
        find(other)
    with start_run(other.mlflow_tracking_uri, "tiny", run_name="r", artifact_root=tmp_path / "unused") as run:
        pass
    with pytest.raises(TrackingError, match=r"Received: 1 runs, none of them"):
        find(other)
    assert all(path.is_dir() for path in lost)
    # One that it knows: then it is the same server, and what it does not know it has deleted.
    folder(artifacts / "1" / run.run_id)
    assert {name for name in names(find(other)) if name.startswith("mlflow")} == {f"mlflow/1/{p.name}" for p in lost}


def test_old_versions_of_records_go_but_not_those_that_the_deployment_was_made_from(
    settings: Settings, home: Path
) -> None:
    records = home / "records" / "tiny"
    versions = [f"2026010{day}T000000000000Z-0000000{day}" for day in range(1, 6)]
    (records / "deployment.json").write_text(json.dumps({"made_from": {"model": versions[1], "gone": "x"}}))
    (records / "model").mkdir()
    (records / "runs").mkdir()
    for path in (*(records / "model" / f"{v}.json" for v in versions), records / "runs" / "a-run.json"):
        path.write_text("{}")
        os.utime(path, (LONG_AGO, LONG_AGO))
    (records / "runs" / "new-run.json").write_text("{}")
    (records / "model" / f"{versions[1]}.json").write_text('{"directory": "packed/unused-pack"}')
    garbage = find(settings.model_copy(update={"gc_keep_versions": 2}))
    found = {name for name in names(garbage) if name.startswith("records")}
    gone = [f"records/tiny/model/{versions[0]}.json", f"records/tiny/model/{versions[2]}.json"]
    assert found == {*gone, "records/tiny/runs/a-run.json"}
    (records / "deployment.json").write_text("[]")
    with pytest.raises(StorageError, match=r"deployment\.json: expected a record"):
        find(settings)


def test_downloads_go_but_not_of_what_is_served(settings: Settings, home: Path, tmp_path: Path) -> None:
    for version in (SERVED, LAST_GOOD, OTHERS[4]):
        folder(home / "cache" / "tiny" / version)
    folder(home / "cache" / "last_good" / "models")
    found = {name for name in names(find(settings)) if name.startswith("cache")}
    assert found == {f"cache/tiny/{OTHERS[4]}", "cache/embeddings/old-encoder"}
    shutil.rmtree(home / "records")
    assert {name for name in names(find(settings)) if name.startswith("cache")} > found
