"""Runs and trainings as jobs of a Ray cluster: `make test-ray` starts one of two nodes, with its server of jobs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import dagster as dg
import psutil
import pytest

from benchmarks.ray_nodes import ray_nodes
from cv_platform.config import ExperimentConfig
from cv_platform.defs.runs import ray_job as jobs
from cv_platform.errors import ComputeError, ConfigError, TrainingError
from cv_platform.records import PackedImages, TrainedModel
from cv_platform.settings import Settings
from cv_platform.training.trainer import train_model
from cv_platform_tests.support.postgres import own_database
from cv_platform_tests.support.stack_files import DOCKER
from cv_platform_tests.support.tiny_training import experiment, pack_tiny
from cv_platform_tests.support.waiting import wait_until

JOB = "log_retention"


Server = Callable[[], AbstractContextManager[Settings]]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    """Returns what starts the cluster: after a test has set the environment, which its nodes take over."""

    @contextmanager
    def started() -> Iterator[Settings]:
        pytest.importorskip("ray", reason="Ray, of the extra ray")
        with ray_nodes(2, takes_jobs=True) as cluster:
            monkeypatch.setenv("CV_RAY_JOBS_URL", f"http://{cluster.head_node.webui_url}")
            yield Settings.from_environment()

    return started


def trained(
    packed: PackedImages, config: ExperimentConfig, home: Path, settings: Settings | None = None
) -> TrainedModel:
    """Trains in an asset, as the platform's does; in a job of the cluster, if there is one."""

    records: list[TrainedModel] = []

    def model(context):  # Dagster reads no annotation that is a text.
        launch = None if settings is None else jobs.ray_job(context, settings, config.train.job_gpus)
        records.append(train_model(packed, config, directory=home, launch=launch))
        return dg.MaterializeResult()

    with dg.DagsterInstance.ephemeral() as instance:
        dg.materialize([dg.asset(model)], instance=instance)
    return records[0]


@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")  # dagster-ray 0.4.8 uses what Dagster deprecates, and what it previews.
def test_a_training_in_a_job_makes_the_same_weights_and_a_killed_one_goes_on(tmp_path: Path, server: Server) -> None:
    config = experiment(train__epochs=40, train__job_gpus=0)
    packed = pack_tiny(tmp_path, config)
    killed: list[int] = []

    def kill_the_job() -> None:
        def training() -> list[psutil.Process]:
            found: list[psutil.Process] = []
            for process in psutil.process_iter():
                with suppress(psutil.Error):
                    line = process.cmdline()
                    if line[:1] == [sys.executable] and jobs.__name__ in line and str(tmp_path) in line[-1]:
                        found.append(process)
            return found

        wait_until(lambda: list((tmp_path / "job").rglob("epoch-*.json")), seconds=600)
        for process in training():
            process.kill()
            killed.append(process.pid)

    killer = threading.Thread(target=kill_the_job)
    with server() as settings:
        killer.start()
        with pytest.raises(
            TrainingError, match=r"train to the end. Received: .* failed with status FAILED(?s:.*) whole"
        ):
            trained(packed, config, tmp_path / "job", settings)
        killer.join()
        assert killed
        there = trained(packed, config, tmp_path / "job", settings)
    here = trained(packed, config, tmp_path / "home")
    assert there.weights_sha256 == here.weights_sha256
    assert there.epochs_run == here.epochs_run == 40


def test_a_job_needs_a_server_of_jobs() -> None:
    settings = Settings.from_environment({})
    with dg.build_asset_context() as context:
        assert jobs.ray_job(context, settings, None) is None
        with pytest.raises(ComputeError, match=r"train\.job_gpus: 1 needs .* Received: no CV_RAY_JOBS_URL"):
            jobs.ray_job(context, settings, 1)
    with pytest.raises(ConfigError, match=r"train\.job_gpus: expected null, as CV_COMPUTE=ray places the 2"):
        experiment(train__workers=2, train__job_gpus=1)


def test_a_job_without_dagster_ray_says_which_extra_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dagster_ray", None)
    settings = Settings.from_environment({"CV_RAY_JOBS_URL": "http://127.0.0.1:1"})
    with dg.build_asset_context() as context, pytest.raises(ComputeError, match=r"dagster-ray\. .*cv-platform\[ray\]"):
        jobs.ray_job(context, settings, 0)


def test_a_job_is_done_by_the_nodes_own_python_where_the_drivers_is_not(tmp_path: Path) -> None:
    for name in ("python", "python of the driver"):
        (tmp_path / name).write_text('#!/bin/sh\nprintf "%s|" "${0##*/}" "$@"\n')
        (tmp_path / name).chmod(0o755)
    folder, environment = Path("/home of it/.training-1"), {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for there, expected in ((tmp_path / "python of the driver", "python of the driver"), (tmp_path / "none", "python")):
        command = jobs.entrypoint(folder, str(there))
        said = subprocess.check_output(command, shell=True, env=environment, text=True)
        assert said == f"{expected}|-m|{jobs.__name__}|{folder}|"


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_run_of_the_stacks_instance_is_a_job(
    tmp_path: Path, server: Server, postgres_url: str, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queue, the daemon, the launcher and the run of `dagster-ray.yaml`, with its folders below `tmp_path`."""
    text = (DOCKER / "dagster" / "dagster-ray.yaml").read_text()
    (tmp_path / "dagster.yaml").write_text(text.replace("/data/home", str(tmp_path / "home")))
    (tmp_path / "home").mkdir()
    options = json.dumps({"ops": {"delete_expired_log": {"config": {"is_dry_run": True}}}})
    with own_database(postgres_url) as url:
        for name, value in {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # A job's command is `dagster`.
            "DAGSTER_HOME": str(tmp_path),
            "DAGSTER_POSTGRES_URL": url.replace("postgresql://", "postgresql+psycopg2://"),
            "DATABASE_URL": database_url,
            "CV_HOME": str(tmp_path / "home"),
            "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        }.items():
            monkeypatch.setenv(name, value)
        with server(), dg.DagsterInstance.get() as instance:
            program, module = [sys.executable, "-m", "dagster"], ["-m", "cv_platform.definitions"]
            command = [*program, "job", "launch", *module, "-j", JOB, "--config-json", options]
            subprocess.run(command, check=True, timeout=300)
            [run] = instance.get_runs()
            daemon = subprocess.Popen([sys.executable, "-m", "dagster._daemon", "run", *module])
            try:
                wait_until(lambda: (found := instance.get_run_by_id(run.run_id)) and found.is_finished, seconds=600)
            finally:
                daemon.terminate()
                daemon.wait(60)
            events = [event.message for event in instance.all_logs(run.run_id)]
            assert instance.get_run_by_id(run.run_id).status == dg.DagsterRunStatus.SUCCESS, events  # pyright: ignore[reportOptionalMemberAccess]
            assert any("Ray run job created" in message for message in events)
