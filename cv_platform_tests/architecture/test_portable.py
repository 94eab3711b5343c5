"""That the tests on older CPUs hold instruction sets back indeed, and find what they name."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from cv_platform.local.environment import REPOSITORY
from cv_platform_tests.portable import NUMERICAL, settings, simd_found

LOOK = """
import cv2, numpy
print(" ".join(numpy.show_config(mode="dicts")["SIMD Extensions"].get("found", [])))
"""


@pytest.mark.parametrize("name", settings())
def test_instruction_sets_are_held_back_without_a_complaint(name: str) -> None:
    environment = settings()[name]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", LOOK],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = set(simd_found())
    assert set(done.stdout.split()) == found - set(environment["NPY_DISABLE_CPU_FEATURES"].split())


def test_every_numerical_test_is_there() -> None:
    assert [path for path in NUMERICAL if not (REPOSITORY / "cv_platform_tests" / path).exists()] == []
