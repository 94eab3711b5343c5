"""An installation whose folder is moved goes on where it is: MLflow, records and addresses of reports follow."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import pytest
from sqlalchemy import insert, select

from cv_platform.database.connection import database_url, make_engine
from cv_platform.database.embedded import embedded_database
from cv_platform.database.migrate import migrate
from cv_platform.database.schema import drift_reports
from cv_platform.errors import ConfigError
from cv_platform.files import exclusive
from cv_platform.local.environment import prepare_home
from cv_platform.maintenance.moved_home import LOCATION, previous_location, require_settled, settle_home
from cv_platform.record_store import RecordStore
from cv_platform.records import ReferenceData
from cv_platform.settings import Settings
from cv_platform.tracking import start_run
from cv_platform_tests.support.demo_run import cli
from cv_platform_tests.support.record_samples import identity

pytestmark = pytest.mark.timeout(300)

EXPERIMENT = "digits"


@pytest.fixture
def folder() -> Iterator[Path]:
    # Not below pytest's own folder, which is closed to the unprivileged user that runs PostgreSQL for root.
    path = Path(tempfile.mkdtemp(prefix="cv-moved 100% é "))
    path.chmod(0o711)
    yield path
    shutil.rmtree(path)


def settings_of(home: Path) -> Settings:
    return Settings.from_environment({"CV_HOME": str(home)})


def log_run(settings: Settings, text: str) -> None:
    """Keeps a file in a new run, as the assets do."""
    with start_run(
        settings.mlflow_tracking_uri, EXPERIMENT, run_name=text, artifact_root=settings.home / "mlflow" / "artifacts"
    ) as run:
        file = settings.home / f"{text}.txt"
        file.write_text(text)
        run.log_artifact(file)
        file.unlink()


def logged_texts(settings: Settings, into: Path) -> set[str]:
    """Reads what the runs have kept, by MLflow's own client."""
    from mlflow import MlflowClient

    uri = settings.mlflow_tracking_uri
    client = MlflowClient(uri, registry_uri=uri)
    found = set()
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    for run in client.search_runs([experiment.experiment_id]):
        for artifact in client.list_artifacts(run.info.run_id):
            into.mkdir(exist_ok=True)
            found.add(Path(client.download_artifacts(run.info.run_id, artifact.path, str(into))).read_text())
    return found


def report_urls(settings: Settings) -> list[str]:
    with database_url(settings) as url:
        engine = make_engine(url)
        try:
            with engine.connect() as connection:
                return list(connection.execute(select(drift_reports.c.report_url)).scalars())
        finally:
            engine.dispose()


def make_installation(home: Path) -> None:
    """Makes an installation with a run and a report, which name its folder, and a record."""
    settings = settings_of(home)
    prepare_home(settings)
    log_run(settings, "before")
    report = home / "storage" / "reports" / "r" / "report.html"
    reference = ReferenceData(model=identity(), directory=home / "models", url=report.as_uri(), rows=1)
    RecordStore(home, EXPERIMENT).write("reference_data", reference, run_id="a-run")
    now = datetime.now(UTC)
    with embedded_database(home) as url:
        migrate(url)
        engine = make_engine(url)
        with engine.begin() as connection:
            connection.execute(
                insert(drift_reports).values(
                    report_id=uuid4(),
                    experiment=EXPERIMENT,
                    model_name="m",
                    model_version="v",
                    window_start_utc=now,
                    window_end_utc=now,
                    rows=0,
                    verdict="no drift",
                    details={},
                    report_url=report.as_uri(),
                )
            )
        engine.dispose()


def test_an_old_place_that_nobody_can_look_at_was_another_one(tmp_path: Path) -> None:
    old = tmp_path / ("n" * 300)  # As a folder that is closed to us, which root cannot make for a test.
    (tmp_path / LOCATION).write_text(f"{old}\n")
    assert previous_location(tmp_path) == old


def test_a_moved_installation_goes_on_at_its_new_place(folder: Path) -> None:
    old, new = folder / "old home", folder / "new" / "cv 50% ñ"
    make_installation(old)
    new.parent.mkdir(mode=0o711)
    old.rename(new)
    moved = cli({"CV_HOME": str(new)}, "migrate")
    assert moved.returncode == 0, moved.stderr
    assert f"The installation was moved from {old} to {new}" in moved.stderr
    settings = settings_of(new)
    log_run(settings, "after")
    assert logged_texts(settings, folder / "downloads") == {"before", "after"}
    record = RecordStore(new, EXPERIMENT).latest(ReferenceData)
    report = (new / "storage" / "reports" / "r" / "report.html").as_uri()
    assert record is not None
    assert (record.directory, record.url) == (new / "models", report)
    assert report_urls(settings) == [report]
    assert not old.exists(), "nothing may write to the old place"
    assert previous_location(new) is None
    assert "moved" not in cli({"CV_HOME": str(new)}, "migrate").stderr


def test_an_installation_in_use_is_not_rewritten(folder: Path) -> None:
    old, new = folder / "old", folder / "new"
    prepare_home(settings_of(old))
    (old / "spool").mkdir()
    old.rename(new)
    with exclusive(new / "spool" / "worker.lock", timeout_seconds=5), pytest.raises(ConfigError) as caught:
        settle_home(settings_of(new))
    assert f"{new} was moved here from {old}" in str(caught.value)
    assert "a service (worker.lock)" in str(caught.value)
    with pytest.raises(ConfigError, match="run: cv-platform migrate"):
        require_settled(new)
    settle_home(settings_of(new))
    require_settled(new)


def test_a_bare_dagster_run_names_the_command_that_settles_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dagster as dg

    from cv_platform.defs.resources import Installation

    old, new = folder / "old", folder / "new"
    prepare_home(settings_of(old))
    old.rename(new)
    monkeypatch.setenv("CV_HOME", str(new))
    refused = pytest.raises(ConfigError, match=r"moved here from .*old\. Stop what uses it, and run: cv-platform m")
    with refused, Installation().yield_for_execution(dg.build_init_resource_context()):
        pass
    assert cli({"CV_HOME": str(new)}, "migrate").returncode == 0
    with Installation().yield_for_execution(dg.build_init_resource_context()) as installation:
        assert installation.settings().home == new


def test_a_link_to_an_installation_is_no_other_place(folder: Path) -> None:
    home, link = folder / "home", folder / "link"
    prepare_home(settings_of(home))
    link.symlink_to(home)
    assert previous_location(link) is None


def test_a_copy_names_its_own_folder(folder: Path) -> None:
    home, copy = folder / "home", folder / "copy"
    prepare_home(settings_of(home))
    log_run(settings_of(home), "first")
    shutil.copytree(home, copy)
    prepare_home(settings_of(copy))
    log_run(settings_of(copy), "second")
    assert logged_texts(settings_of(home), folder / "a") == {"first"}
    assert logged_texts(settings_of(copy), folder / "b") == {"first", "second"}


def test_an_installation_of_a_release_that_wrote_no_location_is_known_by_its_dagster_instance(folder: Path) -> None:
    old, new = folder / "old", folder / "new: #1"
    prepare_home(settings_of(old))
    (old / LOCATION).unlink()
    old.rename(new)
    assert previous_location(new) == old
    settle_home(settings_of(new))
    assert os.fsdecode((new / LOCATION).read_bytes()) == f"{new}\n"


def test_a_new_folder_has_no_other_place(folder: Path) -> None:
    assert previous_location(folder) is None
    (folder / "dagster").mkdir()
    (folder / "dagster" / "dagster.yaml").write_text("storage: {postgres: {postgres_url: x}}")
    assert previous_location(folder) is None
