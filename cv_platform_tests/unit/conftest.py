"""Fixtures of several suites: tiny models, exported once for all of them."""

from pathlib import Path

import pytest

from cv_platform_tests.support.hand_made import hand_made_export
from cv_platform_tests.support.tiny_models import TinyExport, export_tiny


@pytest.fixture(scope="session")
def tiny_export(tmp_path_factory: pytest.TempPathFactory) -> TinyExport:
    return export_tiny(tmp_path_factory.mktemp("tiny") / "one", seed=1)


@pytest.fixture(scope="session")
def hand_made(tmp_path_factory: pytest.TempPathFactory) -> TinyExport:
    """A bundle that needs no training framework to be made."""
    return hand_made_export(tmp_path_factory.mktemp("hand") / "made")


@pytest.fixture(scope="session")
def other_hand_made(tmp_path_factory: pytest.TempPathFactory) -> TinyExport:
    return hand_made_export(tmp_path_factory.mktemp("hand") / "other", seed=4)


@pytest.fixture(scope="session")
def tensorflow_export(tmp_path_factory: pytest.TempPathFactory) -> TinyExport:
    """The model of `tiny_export`, exported for TensorFlow."""
    return export_tiny(tmp_path_factory.mktemp("tiny") / "tf", seed=1, runtime="tensorflow")


@pytest.fixture(scope="session")
def other_export(tmp_path_factory: pytest.TempPathFactory) -> TinyExport:
    return export_tiny(tmp_path_factory.mktemp("tiny") / "two", seed=2)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"
