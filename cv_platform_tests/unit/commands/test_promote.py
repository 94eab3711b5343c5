"""`cv-platform promote` on a real installation's folder: published and unknown versions. No service runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from cv_platform.audit import AuditLog, Note
from cv_platform.cli import main
from cv_platform.commands.promote import promote_version
from cv_platform.errors import VerdictError
from cv_platform.settings import Settings
from cv_platform.storage import CentralStorage
from cv_platform_tests.support.tiny_models import MODEL_NAME, TinyExport, publish_tiny

FIRST, SECOND = "20260101T000000Z-00000001", "20260201T000000Z-00000002"


@pytest.fixture
def storage(tmp_path: Path, hand_made: TinyExport, monkeypatch: pytest.MonkeyPatch) -> CentralStorage:
    monkeypatch.setenv("CV_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CV_CONFIGS", str(tmp_path / "configs"))
    (tmp_path / "configs").mkdir()
    storage = CentralStorage(Settings.from_environment().storage_url)
    for version in (FIRST, SECOND):
        publish_tiny(storage, hand_made, version)
    return storage


def test_a_promotion_and_a_rollback_keep_who_when_and_why(storage, capsys):
    assert main(["promote", FIRST, "--because", "first of all"]) == 0
    assert main(["promote", SECOND, "--because", "it is faster, and the loss is known"]) == 0
    assert f"will serve tiny {SECOND}" in capsys.readouterr().out
    assert main(["rollback", "--because", "complaints"]) == 0
    pointer = storage.read_pointer(Settings.from_environment().service_name)
    assert pointer is not None
    assert [(move.version, move.action, move.because) for move in pointer.history] == [
        (FIRST, "rollback", "complaints"),
        (SECOND, "promote", "it is faster, and the loss is known"),
        (FIRST, "promote", "first of all"),
    ]
    assert pointer.history[0].since_utc == pointer.since_utc
    assert all("@" in move.by for move in pointer.history)
    entries = AuditLog(storage.url).entries()
    assert [entry.action for entry in entries] == ["promote", "promote", "rollback"]
    capsys.readouterr()
    assert main(["audit"]) == 0
    assert f"promote  image_classifier: {MODEL_NAME} {SECOND}  by" in capsys.readouterr().out


def test_an_unknown_version_and_a_blank_reason_change_nothing(storage, capsys):
    assert main(["promote", "20260301T000000Z-00000003", "--because", "why not"]) == 1
    assert "Expected a published version, or the latest model of an experiment" in capsys.readouterr().err
    with pytest.raises(VerdictError, match="Expected a reason"):
        promote_version(Settings.from_environment(), FIRST, [], note=Note("ada", " "), say=print)
    assert storage.read_pointer(Settings.from_environment().service_name) is None
    assert AuditLog(storage.url).entries() == []
