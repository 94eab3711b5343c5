"""A tiny packed dataset: 3 classes, 16×16 pixels, through the real manifest and packing."""

from __future__ import annotations

import pytest

from cv_platform.records import PackedImages
from cv_platform_tests.support.tiny_training import pack_tiny


@pytest.fixture(scope="session")
def tiny_packed(tmp_path_factory: pytest.TempPathFactory) -> PackedImages:
    return pack_tiny(tmp_path_factory.mktemp("tiny"))
