"""Phase e: bundles that cannot be served, and central storage that is away; the last good model goes on serving."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from benchmarks.servers import Server
from cv_platform.storage import ProductionPointer, new_version
from trials.findings import Findings, wait_until
from trials.soak.stage import MODEL_NAME, SWAP_SECONDS, WORKERS, Stage, add_rows
from trials.traffic import Traffic, failures, statuses

NOTICE_SECONDS = 20.0


def break_storage(stage: Stage) -> Findings:
    """Tries a corrupt bundle, a half-written one and storage that is away: while serving, and at the next start."""
    findings = Findings()
    good = stage.versions[0]
    corrupt, half = _corrupt_bundle(stage), _half_written_bundle(stage)
    with stage.service("storage faults") as server, Traffic(server.base_url, stage.uploads, concurrency=2) as traffic:
        stage.move_production(server, good)
        _wait_for_workers(stage, server, good)
        for what, version, refusal in (("corrupt", corrupt, 409), ("half-written", half, 404)):
            status = stage.move_production(server, version)
            findings.add(f"{what} bundle: {refusal} to /update_model", status, status == refusal)
            _point_at(stage, version)
            findings.add(f"{what} bundle in production: workers say so", *_says_swap_failed(stage, server, version))
        _point_at(stage, good)
        with _storage_away(stage):
            findings.add("storage away: /health_check says so", *_says_storage_is_away(stage, server))
            traffic.wait_for(50, seconds=30)
    outcomes = traffic.outcomes
    findings.add("all of it under load: 0 failed", statuses(outcomes), bool(outcomes) and not failures(outcomes))
    versions = {outcome.model_version for outcome in outcomes[-50:]}
    findings.add("the good version answers", "it does" if versions == {good} else versions, versions == {good})
    _point_at(stage, corrupt)
    findings.add("start on a corrupt bundle: last good", *_starts_with(stage, good))
    with _storage_away(stage):
        findings.add("start with storage away: last good", *_starts_with(stage, good))
    _point_at(stage, good)
    add_rows(findings, stage, outcomes)
    return findings


def _corrupt_bundle(stage: Stage) -> str:
    """Publishes a bundle, then changes a byte of its largest file."""
    version = _copy_of_good(stage)
    largest = max(
        (path for path in _folder(stage, version).rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    )
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 0xFF
    largest.write_bytes(content)
    return version


def _half_written_bundle(stage: Stage) -> str:
    """Leaves what a process that died while publishing leaves: files, and no metadata."""
    version = _copy_of_good(stage)
    (_folder(stage, version) / f"{MODEL_NAME}.yaml").unlink()
    return version


def _copy_of_good(stage: Stage) -> str:
    version = new_version(datetime.now(UTC) + timedelta(days=1))
    folder, metadata = stage.storage.fetch_bundle(MODEL_NAME, stage.versions[0], stage.folder / "cache")
    stage.storage.publish_bundle(folder, metadata.model_copy(update={"version": version}))
    return version


def _folder(stage: Stage, version: str) -> Path:
    return Path(stage.settings.storage_url) / "models" / MODEL_NAME / version


def _point_at(stage: Stage, version: str) -> None:
    """Moves the pointer past the load test, as somebody with an editor would."""
    pointer = ProductionPointer(model_name=MODEL_NAME, version=version, since_utc=datetime.now(UTC))
    stage.storage.write_pointer(stage.settings.service_name, pointer)


def _wait_for_workers(stage: Stage, server: Server, version: str) -> None:
    wait_until(
        lambda: list(stage.workers_on(server).values()) == [version] * WORKERS,
        seconds=SWAP_SECONDS,
        what=f"both workers on {version}",
    )


def _says_swap_failed(stage: Stage, server: Server, version: str) -> tuple[str, bool]:
    def workers_say_so() -> bool:
        _, answer = stage.get(server, "/models/current")
        live = [worker for worker in answer.get("workers", []) if worker["is_live"]]
        return len(live) == WORKERS and all(
            worker["failed_version"] == version and worker["last_swap_error"] for worker in live
        )

    wait_until(workers_say_so, seconds=NOTICE_SECONDS, what="/models/current to name the refused version")
    status, health = stage.get(server, "/health_check")
    said = bool(health.get("model", {}).get("last_swap_error"))
    return f"/models/current does, /health_check {status} {'does' if said else 'does not'}", said and status == 200


def _says_storage_is_away(stage: Stage, server: Server) -> tuple[str, bool]:
    def health_says_so() -> bool:
        status, health = stage.get(server, "/health_check")
        return status == 200 and bool(health.get("model", {}).get("storage_error"))

    seconds = wait_until(health_says_so, seconds=NOTICE_SECONDS, what="/health_check to name the storage that is away")
    status, answer = stage.get(server, "/models/current")
    is_said = status == 503 or (status == 200 and answer["production"] is None)
    return f"after {seconds:.1f} s, with 200; /models/current {'shows no production' if is_said else status}", is_said


def _starts_with(stage: Stage, version: str) -> tuple[str, bool]:
    with stage.service("restarted") as server, Traffic(server.base_url, stage.uploads, concurrency=2) as traffic:
        traffic.wait_for(20, seconds=30)
        _, health = stage.get(server, "/health_check")
    outcomes = traffic.outcomes
    source = health.get("model", {}).get("model_source")
    versions = {outcome.model_version for outcome in outcomes if outcome.status == 200}
    is_right = versions == {version} and source == "last good" and not failures(outcomes)
    return f"{source}, {statuses(outcomes)}", is_right


@contextmanager
def _storage_away(stage: Stage) -> Iterator[None]:
    """Renames the storage's folder for the block, as an unmounted disk leaves nothing in its place."""
    storage = Path(stage.settings.storage_url)
    away = storage.with_name("storage-away")
    storage.rename(away)
    try:
        yield
    finally:
        wait_until(lambda: _put_back(away, storage), seconds=NOTICE_SECONDS, what="the storage's folder to be put back")


def _put_back(away: Path, storage: Path) -> bool:
    shutil.rmtree(storage, ignore_errors=True)  # The workers have made the folder anew for their heartbeats.
    try:
        away.rename(storage)
    except OSError:  # One of them was faster.
        return False
    return True
