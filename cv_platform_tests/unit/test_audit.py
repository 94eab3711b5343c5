from __future__ import annotations

from pathlib import Path

import pytest

from cv_platform.audit import AuditLog, Note
from cv_platform.errors import DeploymentError, StorageError, VerdictError
from cv_platform.evaluation.report import require_promotion
from cv_platform_tests.support.record_samples import VERSION, evaluation, identity

WHO = Note("ada@lab", "the customer needs the new class today")


def test_entries_are_kept_in_order_and_say_who_did_what_and_why(tmp_path: Path):
    log = AuditLog(tmp_path)
    log.write("promote", "digits: tiny 1", WHO)
    log.write("rollback", "digits: tiny 0", Note("bob@lab"))
    assert [(entry.action, entry.subject, entry.by, entry.because) for entry in log.entries()] == [
        ("promote", "digits: tiny 1", "ada@lab", "the customer needs the new class today"),
        ("rollback", "digits: tiny 0", "bob@lab", ""),
    ]


def test_an_action_that_fails_is_followed_by_why(tmp_path: Path):
    log = AuditLog(tmp_path)
    with pytest.raises(DeploymentError), log.noted("take-over", "digits: tiny 1", WHO):
        raise DeploymentError("no worker took it")
    assert [entry.failure for entry in log.entries()] == [None, "DeploymentError: no worker took it"]


def test_what_cannot_be_noted_is_not_done(tmp_path: Path):
    (tmp_path / "audit").write_text("no folder")
    done = []
    with pytest.raises(StorageError), AuditLog(tmp_path).noted("delete", "bundle tiny 1", WHO):
        done.append(True)
    assert done == []


def test_a_refused_model_goes_on_only_by_an_override_of_this_version(tmp_path: Path):
    log = AuditLog(tmp_path / "storage")
    refused = evaluation(tmp_path, passed=False, reasons=("loses 0.2",))
    with pytest.raises(VerdictError, match=f"loses 0.2.*promote {VERSION} --because"):
        require_promotion(refused, identity(), log.override("tiny", VERSION))
    log.overrule("tiny", VERSION, WHO)
    require_promotion(refused, identity(), log.override("tiny", VERSION))
    assert log.override("tiny", "20260101T000000Z-00000002") is None
    (entry,) = log.entries()
    assert (entry.action, entry.subject, entry.because) == ("override", f"tiny {VERSION}", WHO.because)
