"""The stack's volumes as streams: what is sent comes back, in the order in which names follow what they name."""

from __future__ import annotations

import io
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from cv_platform.errors import LockHeldError
from cv_platform.files import exclusive
from cv_platform.maintenance import volumes
from cv_platform.maintenance.archive_stream import ArchiveReader, packing
from cv_platform.maintenance.backup import maintenance_lock

FILES = {
    "home/records/digits/model.json": b"{}",
    "home/models/digits/1/digits.keras": b"weights",
    "home/datasets/digits/.git/objects/aa/bb": b"object",
    "home/datasets/digits/.git/refs/tags/v1": b"aabb",
    "home/production_metrics/digits/1.json": b"{}",
    "home/dagster/logs/run/out": b"printed",
    "storage/services/image_classifier/production.json": b"pointer",
    "storage/models/digits/1/model.onnx": b"bundle",
    "storage/ref_data/digits/1/x.npz": b"reference",
    "storage/reports/digits/r/index.html": b"report",
    "mlflow/1/run/artifacts/model.keras": b"artifact",
    "evidently/project/metadata.json": b"project",
    "notebooks/tour.ipynb": b"notebook",
}
LEFT_OUT = (
    "home/worktrees/digits/a.png",
    "home/cache/promotion.lock",
    "home/models/digits/.training-1/state",
    "storage/services/image_classifier/workers/1.json",
    "storage/models/digits/.writing-2/model.onnx",
    "spool/spool/replica.lock",
    "spool/cache/last_good/models/x",
)


@pytest.fixture
def mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "before"
    monkeypatch.setattr(volumes, "MOUNTS", {name: root / name for name in volumes.MOUNTS})
    for name in (*FILES, *LEFT_OUT):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(FILES.get(name, b"not in a backup"))
    (root / "home" / "run").mkdir()
    with closing(sqlite3.connect(root / "spool" / "spool" / "replica.sqlite")) as spool:
        spool.execute("CREATE TABLE entries (entry TEXT)")
        spool.execute("INSERT INTO entries VALUES ('answered')")
        spool.commit()
    return root


class Standard(io.TextIOWrapper):
    """Standard input or output, of bytes."""

    def __init__(self, content: bytes = b"") -> None:
        self.raw_bytes = io.BytesIO(content)
        super().__init__(self.raw_bytes)


def send(phase: str, monkeypatch: pytest.MonkeyPatch) -> bytes:
    with monkeypatch.context() as patched:
        output = Standard()
        patched.setattr(sys, "stdout", output)
        assert volumes.main(["send", phase]) == 0
        return output.raw_bytes.getvalue()


def receive(stream: bytes, monkeypatch: pytest.MonkeyPatch) -> int:
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdin", Standard(stream))
        return volumes.main(["receive"])


def names(stream: bytes) -> list[str]:
    return [info.name for info, content in ArchiveReader("x", io.BytesIO(stream)) if content is not None]


def test_what_is_sent_comes_back_in_empty_volumes(
    mounts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = [send(phase, monkeypatch) for phase in volumes.phases()]
    after = tmp_path / "after"
    monkeypatch.setattr(volumes, "MOUNTS", {name: after / name for name in volumes.MOUNTS})
    for stream in streams:
        assert receive(stream, monkeypatch) == 0
    received = {str(path.relative_to(after)): path.read_bytes() for path in after.rglob("*") if path.is_file()}
    spool = after / "spool" / "spool" / "replica.sqlite"
    del received["spool/spool/replica.sqlite"]
    assert received == FILES
    with closing(sqlite3.connect(spool)) as copy:
        assert copy.execute("SELECT entry FROM entries").fetchall() == [("answered",)]
    assert (after / "spool" / "spool").stat().st_mode & 0o777 == 0o700


def test_names_are_copied_before_what_they_name(mounts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(volumes.phases()) == ["spool", "names", "things"]
    assert names(send("names", monkeypatch)) == [
        "home/records/digits/model.json",
        "storage/services/image_classifier/production.json",
    ]
    things = names(send("things", monkeypatch))
    tag, git_object = "home/datasets/digits/.git/refs/tags/v1", "home/datasets/digits/.git/objects/aa/bb"
    assert things.index(tag) < things.index(git_object)


def test_volumes_that_hold_something_are_not_filled(
    mounts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = send("names", monkeypatch)
    (mounts / "home" / "records" / "digits" / "model.json").write_bytes(b"newer")
    assert receive(stream, monkeypatch) == 1
    assert "Expected empty volumes" in capsys.readouterr().err
    assert (mounts / "home" / "records" / "digits" / "model.json").read_bytes() == b"newer"


def test_a_stream_that_ends_early_or_leads_elsewhere_is_refused(
    mounts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = send("things", monkeypatch)
    monkeypatch.setattr(volumes, "MOUNTS", {name: tmp_path / "after" / name for name in volumes.MOUNTS})
    assert receive(stream[: len(stream) // 2], monkeypatch) == 1
    stranger = io.BytesIO()
    with packing(stranger, kind="x", product_version="") as writer:
        writer.add_stream(io.BytesIO(b"evil"), "postgres/pg_hba.conf", size=4)
    assert receive(stranger.getvalue(), monkeypatch) == 1
    assert "Received: 'postgres'" in capsys.readouterr().err


def test_the_lock_is_held_until_the_input_ends(mounts: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from cv_platform.maintenance import volumes\n"
        "volumes.MOUNTS = {name: Path(sys.argv[1]) / name for name in volumes.MOUNTS}\n"
        "sys.exit(volumes.main(['hold']))"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(mounts)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    # At least what the small files have; SQLite's count twice, as they are copied first.
    assert '"bytes": ' in holder.stdout.readline()
    with (
        pytest.raises(LockHeldError, match="another process holds"),
        exclusive(maintenance_lock(mounts / "home"), timeout_seconds=0.0),
    ):
        pass
    holder.communicate(timeout=30)
    assert holder.returncode == 0
    with exclusive(maintenance_lock(mounts / "home"), timeout_seconds=0.0):
        pass
