"""Phase `restore`: a backup under load; then all volumes and docker/.env destroyed, a killed restoration, a whole one.

What came back is compared by a second backup: each file's checksum, and each table's rows.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

from cv_platform.containers import engine
from cv_platform.errors import ServiceError
from cv_platform.maintenance.archive import verify_archive
from cv_platform.maintenance.archive_stream import Manifest
from trials.findings import Findings, wait_until
from trials.stack.checkout import PROJECT, remove_project
from trials.stack.stage import EXPERIMENT, Stage
from trials.traffic import failures, statuses

ANSWERS = 50
"""Before the backup."""
LOAD_SECONDS = 60.0
KILL_SECONDS = 90.0
_KEPT = ("volumes/storage/", "volumes/mlflow/", "volumes/evidently/", "volumes/home/", "configs/")
_RENEWED = ("volumes/home/metrics/", "volumes/home/production_metrics/", "volumes/home/records/")
"""Of them what the restored stack renews by itself: its sensors report on the rows since the last report."""


def destroy_and_restore(stage: Stage, findings: Findings) -> None:
    """Backs the stack up while it answers, destroys it, and restores it; needs the model of the phase `digits`."""
    log = stage.artifacts / "commands.log"
    version = stage.health().get("model_version")
    answered, archive = _back_up_under_load(stage, findings)
    settings = stage.checkout.values
    refusal = _refusal(stage, archive)
    findings.add("a running stack not restored over", refusal, "make stack-down" in refusal and stage.is_well())
    stage.checkout.run("stack-down", log)
    _refuse_damage(stage, findings, archive)
    remove_project()
    stage.checkout.env_file.unlink()
    _kill_restoration(stage, findings, archive)
    begin = time.monotonic()
    stage.checkout.run("stack-restore", log, f"FILE={archive}")
    restored = time.monotonic() - begin
    stage.checkout.run("stack-up", log)
    same = {**stage.checkout.values, engine.SUFFIX: ""} == {**settings, engine.SUFFIX: ""}
    findings.add(
        "all volumes and docker/.env destroyed: restored, the settings too, and healthy by stack-up",
        f"restored after {restored:.0f} s, healthy after {time.monotonic() - begin - restored:.0f} s more, settings "
        + ("the same" if same else "others"),
        same and stage.is_well(),
    )
    missing = stage.missing_rows(answered)
    findings.add(
        "a row for each answer of before the backup", f"{len(answered) - missing} rows for {len(answered)}", not missing
    )
    _compare(stage, findings, verify_archive(archive), version)


def _back_up_under_load(stage: Stage, findings: Findings) -> tuple[set[str], Path]:
    """Returns the predictions that were answered before the backup began, and its archive."""
    with stage.traffic(concurrency=2) as traffic:
        traffic.wait_for(ANSWERS, seconds=LOAD_SECONDS)
        answered = {str(outcome.prediction_id) for outcome in traffic.outcomes if outcome.prediction_id}
        begin = time.monotonic()
        archive = _back_up(stage)
        seconds = time.monotonic() - begin
    failed = failures(traffic.outcomes)
    mode = archive.stat().st_mode & 0o777
    findings.add(
        "a backup under load: no request failed, and its owner alone may read it",
        f"{archive.stat().st_size / 1e6:.0f} MB after {seconds:.0f} s, mode {mode:o}, {statuses(traffic.outcomes)}",
        bool(answered) and not failed and mode == 0o600,
    )
    return answered, archive


def _back_up(stage: Stage) -> Path:
    folder = stage.checkout.folder / "backups"
    before = set(folder.glob("*.tar.gz"))
    stage.checkout.run("stack-backup", stage.artifacts / "commands.log")
    (archive,) = set(folder.glob("*.tar.gz")) - before
    return archive


def _refusal(stage: Stage, archive: Path) -> str:
    """Returns why an archive is not restored; empty, when it was."""
    try:
        stage.checkout.run("stack-restore", stage.artifacts / "commands.log", f"FILE={archive}")
    except ServiceError as err:
        return next((line for line in f"{err}".splitlines() if "error: " in line), f"{err}")
    return ""


def _refuse_damage(stage: Stage, findings: Findings, archive: Path) -> None:
    content = archive.read_bytes()
    half = len(content) // 2
    volumes = engine.volumes(PROJECT)
    for what, damaged in (
        ("truncated", content[:half]),
        ("changed", content[:half] + bytes([content[half] ^ 0x40]) + content[half + 1 :]),
    ):
        path = archive.with_name(f"{what}.tar.gz")
        path.write_bytes(damaged)
        refusal = _refusal(stage, path)
        path.unlink()
        findings.add(
            f"a {what} archive refused, nothing touched",
            refusal,
            "use another" in refusal.lower() and engine.volumes(PROJECT) == volumes,
        )


def _kill_restoration(stage: Stage, findings: Findings, archive: Path) -> None:
    """Kills a restoration while it fills its volumes: nothing may start on them."""
    process = subprocess.Popen(
        stage.checkout.command("stack-restore", f"FILE={archive}"),
        cwd=stage.checkout.folder,
        env=stage.checkout.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_until(
            lambda: any("_home_" in name for name in engine.volumes(PROJECT)) or process.poll() is not None,
            seconds=KILL_SECONDS,
            what="the restoration to make its volumes",
        )
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    try:
        stage.checkout.run("stack-up", stage.artifacts / "commands.log")
        refusal = ""
    except ServiceError as err:
        refusal = f"{err}"
    is_clear = "unfinished restoration" in refusal and "make stack-restore" in refusal
    findings.add(
        "a restoration killed half-way: nothing starts on it, and it says what to do",
        "refused by stack-up" if is_clear else refusal or "started",
        is_clear and not stage.checkout.env_file.exists() and not stage.containers("service"),
    )


def _compare(stage: Stage, findings: Findings, first: Manifest, version: object) -> None:
    evaluation = stage.dagster.latest(EXPERIMENT, "evaluation")
    run = str(evaluation.get("mlflow_run_id"))
    status = stage.get("MLFLOW_PORT", "/api/2.0/mlflow/runs/get", run_id=run)["run"]["info"]["status"]
    served = stage.health().get("model_version")
    findings.add(
        "the same model served, and Dagster and MLflow know it",
        f"{served}, Dagster {evaluation.get('version')}, its run in MLflow {status}",
        served == version == evaluation.get("version") and status == "FINISHED",
    )
    second = verify_archive(_back_up(stage))
    files = [_files(manifest) for manifest in (first, second)]
    rows = [_rows(manifest) for manifest in (first, second)]
    other = sorted(
        name
        for name in files[0]
        if name not in files[1] or (files[0][name] != files[1][name] and not name.startswith(_RENEWED))
    )
    fewer = sorted(table for table in rows[0] if rows[0][table] > rows[1].get(table, 0))
    findings.add(
        "by a second backup: the same files, and no table with fewer rows",
        f"{len(files[0]) - len(other)} files of {len(files[0])} {other[:3] or ''}; {sum(rows[0].values())} rows, now "
        f"{sum(rows[1].values())} {fewer[:3] or ''}",
        bool(files[0]) and not other and not fewer,
    )


def _files(manifest: Manifest) -> dict[str, str]:
    return {member.name: member.sha256 for member in manifest.members if member.name.startswith(_KEPT)}


def _rows(manifest: Manifest) -> dict[str, int]:
    return {
        f"{database}.{table}": count
        for database, tables in manifest.details["rows"].items()
        for table, count in tables.items()
    }
