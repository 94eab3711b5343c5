from __future__ import annotations

from collections.abc import Iterator

import pytest

from trials import pace


@pytest.fixture(autouse=True)
def _the_reference_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Measures no pace: limits are as they are written."""
    pace.slowness.cache_clear()
    monkeypatch.setattr(pace, "_seconds_of_work", lambda: pace.REFERENCE_SECONDS)
    yield
    pace.slowness.cache_clear()
