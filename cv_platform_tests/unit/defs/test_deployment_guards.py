"""What the asset `deployment` refuses before anything moves."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from cv_platform.audit import AuditEntry
from cv_platform.defs.deployment import require_replay
from cv_platform.errors import VerdictError
from cv_platform.records import Replay
from cv_platform_tests.support.record_samples import identity

NEW = identity("pets", "20260201T000000Z-00000002")


def test_a_refused_replay_stops_the_deployment_unless_somebody_has_overruled_it(tmp_path: Path) -> None:
    passed = Replay(model=NEW, champion=None, directory=tmp_path)
    require_replay(passed, NEW, None)
    refused = passed.model_copy(update={"passed": False, "reasons": ("40 of 60 answers stay as they are",)})
    with pytest.raises(VerdictError, match="40 of 60 answers stay as they are"):
        require_replay(refused, NEW, None)
    require_replay(refused, NEW, AuditEntry(at_utc=datetime.now(UTC), action="override", subject="pets", by="ada"))
    with pytest.raises(VerdictError, match="Received: of pets 20260201T000000Z-00000002"):
        require_replay(passed, identity("pets", "20260301T000000Z-00000003"), None)
