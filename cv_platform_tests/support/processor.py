"""What a test needs of the processor, or of what it is told to be."""

from __future__ import annotations

import os

import pytest

needs_bfloat16 = pytest.mark.skipif(
    "ONEDNN_MAX_CPU_ISA" in os.environ,
    reason="ONEDNN_MAX_CPU_ISA tells oneDNN to refuse bfloat16, which TensorFlow chooses by the processor",
)
