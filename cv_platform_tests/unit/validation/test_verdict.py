"""Who may build upon a verdict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cv_platform.errors import VerdictError
from cv_platform.records import CheckOutcome, ValidationVerdict
from cv_platform.validation.verdict import require_verdict

LEAKED = CheckOutcome(name="train_test_leakage", passed=False, severity="error", summary="3 test images are in train")


def verdict(**changes: object) -> ValidationVerdict:
    fields = {
        "dvc_md5": "a1",
        "manifest": "m1",
        "passed": True,
        "outcomes": (),
        "quarantined": (),
        "directory": Path("/validation"),
    }
    return ValidationVerdict.model_validate({**fields, **changes})


def test_a_passed_verdict_on_the_same_version_and_splits_is_accepted() -> None:
    assert require_verdict(verdict(), dvc_md5="a1", manifest="m1") is None


@pytest.mark.parametrize("asked", [{"dvc_md5": "b2"}, {"dvc_md5": "a1", "manifest": "m2"}])
def test_a_verdict_on_another_version_or_other_splits_is_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(VerdictError, match="Materialise validation_report"):
        require_verdict(verdict(), **asked)


def test_a_failed_verdict_names_what_failed() -> None:
    failed = verdict(passed=False, outcomes=(LEAKED,))
    with pytest.raises(VerdictError, match="train_test_leakage: 3 test images are in train"):
        require_verdict(failed, dvc_md5="a1")
    assert require_verdict(failed, dvc_md5="a1", must_pass=False) is None


def test_a_finding_names_the_limit_that_did_not_hold() -> None:
    leaked = LEAKED.model_copy(update={"summary": "3 of 9 leaked.", "limit": 0.05})
    assert leaked.finding() == "3 of 9 leaked. The limit in `validate` is 0.05."
    assert leaked.model_copy(update={"passed": True}).finding() == "3 of 9 leaked."
    assert leaked.model_copy(update={"limit": None}).finding() == "3 of 9 leaked."
