"""A used installation, backed up while its service and PostgreSQL work, destroyed, and restored to another folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import unquote, urlsplit
from uuid import UUID, uuid4

import numpy as np
import pytest
from sqlalchemy import insert, text

from cv_platform.database.connection import make_engine
from cv_platform.database.embedded import embedded_database
from cv_platform.database.migrate import migrate
from cv_platform.database.schema import drift_reports
from cv_platform.errors import BackupError, DiskSpaceError
from cv_platform.local.environment import HOME_FORMAT, platform_environment, prepare_home
from cv_platform.maintenance.archive import verify_archive, write_archive
from cv_platform.maintenance.backup import Backup, back_up
from cv_platform.maintenance.restore import restore
from cv_platform.record_store import RecordStore
from cv_platform.records import RECORDS, DriftReport, Evaluation, TrainedModel
from cv_platform.serving.log.entry import LogEntry
from cv_platform.serving.log.request_log import RequestLog
from cv_platform.serving.log.tables import find_prediction
from cv_platform.serving.model.runtime import load_bundle
from cv_platform.settings import Settings
from cv_platform.storage import CentralStorage, ProductionPointer
from cv_platform.tracking import start_run
from cv_platform_tests.support.log_entries import answered, append_to, wait_until_drained
from cv_platform_tests.support.record_samples import trained_model
from cv_platform_tests.support.tiny_models import TinyExport, export_tiny, publish_tiny
from cv_platform_tests.support.waiting import wait_until

pytestmark = [pytest.mark.xdist_group("tensorflow"), pytest.mark.timeout(600)]

REPOSITORY = Path(__file__).parents[2]
IN_DATABASE = 40
MATERIALISE = """
import sys, warnings
import dagster as dg

@dg.asset(key=["tiny", "model"])
def model():
    return dg.MaterializeResult(metadata={"keras": dg.MetadataValue.path(sys.argv[1])})

with dg.DagsterInstance.get() as instance:
    assert dg.materialize([model], instance=instance).success
"""
ASSET = """
import json, sys
import dagster as dg

with dg.DagsterInstance.get() as instance:
    event = instance.get_latest_materialization_event(dg.AssetKey(["tiny", "model"]))
    runs = instance.get_run_records()
    path = event.asset_materialization.metadata["keras"].path
    json.dump({"path": path, "runs": [r.dagster_run.status.value for r in runs]}, sys.stdout)
"""


@dataclass(frozen=True)
class Used:
    """An installation after some work."""

    settings: Settings
    backup: Backup
    version: str
    mlflow_run_id: str
    entries: list[LogEntry]
    waiting: list[LogEntry]
    images: np.ndarray
    probabilities: np.ndarray


def settings_of(home: Path) -> Settings:
    return Settings.from_environment({"CV_HOME": str(home)})


def run_python(code: str, settings: Settings, *arguments: str) -> str:
    # Started as the platform starts everything, and ended before anybody looks.
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        env=platform_environment(settings),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    # Not below pytest's own folder, which is closed to the unprivileged user that runs PostgreSQL for root.
    place = Path(tempfile.mkdtemp(prefix="cv-backup-"))
    place.chmod(0o711)
    yield place
    shutil.rmtree(place)


@pytest.fixture(scope="module")
def tiny_export(tmp_path_factory: pytest.TempPathFactory) -> TinyExport:
    return export_tiny(tmp_path_factory.mktemp("tiny") / "one", seed=1)


@pytest.fixture(scope="module")
def used(place: Path, tiny_export: TinyExport) -> Used:
    # A space and an umlaut, as they are written differently in JSON and in URLs.
    settings = settings_of(place / "old hömé")
    home = settings.home
    prepare_home(settings)
    storage = CentralStorage(settings.storage_url)
    with start_run(
        settings.mlflow_tracking_uri, "tiny", run_name="tiny model", artifact_root=home / "mlflow" / "artifacts"
    ) as run:
        run.log_metrics({"accuracy": 0.75})
        run.log_artifact(tiny_export.keras_path, "training")
    metadata = publish_tiny(storage, tiny_export, mlflow_run_id=run.run_id)
    pointer = ProductionPointer(model_name="tiny", version=metadata.version, since_utc=datetime.now(UTC))
    storage.write_pointer("image_classifier", pointer)
    trained = home / "models" / "tiny" / metadata.version
    trained.mkdir(parents=True)
    shutil.copyfile(tiny_export.keras_path, trained / "tiny.keras")
    RecordStore(home, "tiny").write("model", trained_model(trained), run_id="a-run")
    (home / "worktrees" / "tiny").mkdir(parents=True)
    (home / "worktrees" / "tiny" / "a.png").write_bytes(b"made again")
    repository = home / "datasets" / "tiny"
    (repository / ".dvc" / "cache" / "files").mkdir(parents=True)
    (repository / ".dvc" / "cache" / "files" / "image").write_bytes(b"pixels")
    for command in (["init", "-q", "--template="], ["commit", "-q", "--allow-empty", "-m", "first"], ["tag", "v1"]):
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", "-C", str(repository), *identity, *command], check=True, timeout=30)
    run_python(MATERIALISE, settings, str(trained / "tiny.keras"))
    answer = load_bundle(storage, "tiny", metadata.version, cache=home / "cache").predict_batch(tiny_export.images)
    entries = [answered(prediction_id=uuid4()) for _ in range(IN_DATABASE)]
    waiting = [answered(prediction_id=uuid4()) for _ in range(5)]
    with embedded_database(home) as url:
        migrate(url)
        engine = make_engine(url)
        with engine.begin() as connection:
            report = (home / "storage" / "reports" / "tiny" / "r1").as_uri()
            connection.execute(
                insert(drift_reports).values(
                    report_id=uuid4(), experiment="tiny", model_name="tiny", model_version=metadata.version,
                    window_start_utc=datetime.now(UTC), window_end_utc=datetime.now(UTC), rows=1, verdict="no drift",
                    details={}, report_url=report,
                )
            )  # fmt: skip
        engine.dispose()
        with (
            RequestLog(home / "spool", url) as connected,
            # A replica that cannot reach the database: what it answered is in its spool only.
            RequestLog(home / "spool", None) as cut_off,
        ):
            for entry in entries:
                append_to(connected, entry)
            wait_until_drained(connected)
            for entry in waiting:
                append_to(cut_off, entry)
            backup = back_up(settings, place / "backups")
    return Used(
        *(settings, backup, metadata.version, run.run_id, entries, waiting, tiny_export.images, answer.probabilities)
    )


@pytest.fixture(scope="module")
def restored(place: Path, used: Used) -> Settings:
    used.settings.home.rename(place / "destroyed")
    settings = settings_of(place / "elsewhere" / "new home")
    result = restore(used.backup.path, settings.home, home_format=HOME_FORMAT, spare_bytes=0)
    prepare_home(settings)
    assert result.previous is None
    return settings


def test_the_backup_says_what_it_holds(used: Used) -> None:
    contents = used.backup.contents
    assert contents.database is not None
    assert contents.database.rows == {
        "alembic_version": 1,
        "api_log": IN_DATABASE,
        "deletions": 0,
        "drift_reports": 1,
        "feedback": 0,
        "images": contents.database.rows["images"],
        "labeling_items": 0,
        "shadow_answers": 0,
        "upload_vectors": 0,
        "predictions": IN_DATABASE,
    }
    assert contents.files["spool"] == 2
    assert contents.left_out == ()
    names = {member.name for member in verify_archive(used.backup.path).members}
    assert not any("worktrees" in name or name.endswith((".lock", "-wal", "-shm", "password")) for name in names)


def test_every_answer_is_there_those_too_that_had_not_reached_the_database(used: Used, restored: Settings) -> None:
    with embedded_database(restored.home) as url:
        engine = make_engine(url)
        try:
            with engine.connect() as connection:
                assert connection.execute(text("SELECT count(*) FROM api_log")).scalar() == IN_DATABASE
            # A service that starts adopts what the copied spools hold.
            with RequestLog(restored.home / "spool", url) as log:
                wait_until(lambda: find_prediction(engine, _id(used.waiting[-1])) is not None)
                wait_until_drained(log)
            with engine.connect() as connection:
                rows = connection.execute(text("SELECT entry_id FROM api_log")).scalars().all()
                report_url = connection.execute(text("SELECT report_url FROM drift_reports")).scalar()
            for entry in (*used.entries, *used.waiting):
                found = find_prediction(engine, _id(entry))
                assert found is not None
                assert (found.prediction_json, found.image) == (entry.prediction_json, entry.image)
        finally:
            engine.dispose()
    assert sorted(rows) == sorted(entry.entry_id for entry in (*used.entries, *used.waiting))
    assert report_url == (restored.home / "storage" / "reports" / "tiny" / "r1").as_uri()


def test_the_production_model_answers_as_before(used: Used, restored: Settings) -> None:
    storage = CentralStorage(restored.storage_url)
    pointer = storage.read_pointer("image_classifier")
    assert pointer is not None
    assert pointer.version == used.version
    model = load_bundle(storage, pointer.model_name, pointer.version, cache=restored.home / "cache")
    answered = model.predict_batch(used.images).probabilities
    np.testing.assert_allclose(answered, used.probabilities, atol=8 * float(np.finfo(np.float32).eps))


def test_mlflow_shows_the_run_and_reads_its_artifact(used: Used, restored: Settings, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(restored.mlflow_tracking_uri, registry_uri=restored.mlflow_tracking_uri)
    run = client.get_run(used.mlflow_run_id)
    assert run.data.metrics == {"accuracy": 0.75}
    copy = Path(client.download_artifacts(used.mlflow_run_id, "training/tiny.keras", str(tmp_path)))
    original = restored.home / "models" / "tiny" / used.version / "tiny.keras"
    assert copy.read_bytes() == original.read_bytes()


def test_dagster_and_the_records_name_the_new_folder(used: Used, restored: Settings) -> None:
    keras = restored.home / "models" / "tiny" / used.version / "tiny.keras"
    assert json.loads(run_python(ASSET, restored)) == {"path": str(keras), "runs": ["SUCCESS"]}
    record = RecordStore(restored.home, "tiny").latest(TrainedModel)
    assert record is not None
    assert record.keras_path == keras
    tags = subprocess.run(
        ["git", "-C", str(restored.home / "datasets" / "tiny"), "tag", "--contains", "HEAD"],
        capture_output=True, text=True, check=True, timeout=30,
    )  # fmt: skip
    assert tags.stdout == "v1\n"
    assert (restored.home / "datasets" / "tiny" / ".dvc" / "cache" / "files" / "image").read_bytes() == b"pixels"


def test_a_backup_that_release_0_1_made_is_restored_to_another_folder(place: Path) -> None:
    """`back_up` of commit d1777a5 made it at `/srv/old home`: its demo's records, with short files where they point."""
    settings = settings_of(place / "taken over")
    restore(Path(__file__).with_name("backup_0_1.tar.gz"), settings.home, home_format=HOME_FORMAT, spare_bytes=0)
    prepare_home(settings)
    records = RecordStore(settings.home, "digits")
    read = {path.stem: records.latest(RECORDS[path.stem]) for path in records.folder.glob("*.json")}
    assert len(read) == 11
    assert None not in read.values()
    trained, judged, drift = (read[asset] for asset in ("model", "evaluation", "drift_report"))
    assert isinstance(trained, TrainedModel)
    assert isinstance(judged, Evaluation)
    assert isinstance(drift, DriftReport)
    assert trained.keras_path.is_relative_to(settings.home)
    assert trained.keras_path.read_text() == "the model"
    assert (judged.directory / "report.html").read_text() == "<p>the evaluation</p>"
    page = Path(unquote(urlsplit(drift.report_url).path))
    assert page.is_relative_to(settings.home)
    assert page.read_text() == "<p>the drift</p>"
    with embedded_database(settings.home) as url:
        engine = make_engine(url)
        with engine.connect() as connection:
            assert connection.execute(text("SELECT report_url FROM drift_reports")).scalar() == drift.report_url
        engine.dispose()


def test_an_installation_in_use_is_not_replaced(used: Used, restored: Settings) -> None:
    before = (restored.home / "records" / "tiny" / "model.json").read_bytes()
    with embedded_database(restored.home), pytest.raises(BackupError, match=r"PostgreSQL \(process"):
        restore(used.backup.path, restored.home, home_format=HOME_FORMAT, spare_bytes=0)
    with RequestLog(restored.home / "spool", None), pytest.raises(BackupError, match="a service"):
        restore(used.backup.path, restored.home, home_format=HOME_FORMAT, spare_bytes=0)
    sleeper = subprocess.Popen(
        [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"],
        env={**os.environ, "CV_HOME": str(restored.home)},
        stdout=subprocess.PIPE,
    )
    try:
        assert sleeper.stdout is not None
        sleeper.stdout.readline()
        with pytest.raises(BackupError, match=f"process {sleeper.pid}"):
            restore(used.backup.path, restored.home, home_format=HOME_FORMAT, spare_bytes=0)
    finally:
        sleeper.kill()
        sleeper.communicate()
    assert (restored.home / "records" / "tiny" / "model.json").read_bytes() == before


def test_what_does_not_fit_is_not_begun(used: Used, restored: Settings) -> None:
    total = shutil.disk_usage(restored.home).total
    with pytest.raises(DiskSpaceError, match="the restored installation"):
        restore(used.backup.path, restored.home, home_format=HOME_FORMAT, spare_bytes=total)
    with pytest.raises(DiskSpaceError, match="the backup"):
        back_up(restored.model_copy(update={"spare_disk_bytes": total}), restored.home.parent / "never")
    with pytest.raises(BackupError, match="Expected a folder to write the backup to"):
        back_up(restored, restored.home / "FORMAT_VERSION")
    assert list((restored.home.parent / "never").iterdir()) == []


def test_a_killed_restoration_leaves_the_old_installation_and_the_next_one_succeeds(
    used: Used, restored: Settings
) -> None:
    kept = restored.home / "records" / "kept.json"
    kept.write_text("{}")
    parent = restored.home.parent
    for ready in ("*/home/records", "*/home/postgres/data/postmaster.pid"):
        process = subprocess.Popen(
            [sys.executable, "-m", "cv_platform.cli", "restore", str(used.backup.path)],
            cwd=REPOSITORY,
            env={**os.environ, "CV_HOME": str(restored.home)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        wait_until(lambda ready=ready: list(parent.glob(f".new home.restoring-{ready}")), process=process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert kept.exists()
        with embedded_database(restored.home) as url:
            engine = make_engine(url)
            with engine.connect() as connection:
                assert connection.execute(text("SELECT count(*) FROM api_log")).scalar() == IN_DATABASE + 5
            engine.dispose()
    result = restore(used.backup.path, restored.home, home_format=HOME_FORMAT, spare_bytes=0)
    assert result.previous is not None
    assert (result.previous / "records" / "kept.json").exists()
    assert not kept.exists()
    assert sorted(path.name for path in parent.glob(".*")) == []


@pytest.mark.parametrize(
    ("details", "message"),
    [
        ({"home_format": "2"}, "format 1. Received: 2"),
        ({"database": {"server_major": 99, "rows": {}}}, "PostgreSQL 18 or older. Received: of 99"),
        ({"surprise": 1}, "expected details"),
    ],
)
def test_archives_of_another_release_are_refused(
    used: Used, tmp_path: Path, details: dict[str, object], message: str
) -> None:
    path = tmp_path / "x.tar.gz"
    (tmp_path / "content").write_text("1")
    with write_archive(path, kind="embedded installation", product_version="9") as writer:
        writer.add_file(tmp_path / "content", "home/FORMAT_VERSION")
        writer.add_file(tmp_path / "content", "database/request_log.dump")
        writer.details = {**used.backup.contents.model_dump(mode="json"), **details}
    with pytest.raises(BackupError, match=message):
        restore(path, tmp_path / "home", home_format=HOME_FORMAT, spare_bytes=0)
    assert not (tmp_path / "home").exists()


def _id(entry: LogEntry) -> UUID:
    assert entry.prediction_id is not None
    return entry.prediction_id
