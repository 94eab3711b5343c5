"""How many cores a worker takes, and that what has been freed leaves the process."""

import subprocess
import sys

import pytest

from cv_platform.serving.machine import ThreadShare, share_cores

PROGRAM = """
from pathlib import Path
from cv_platform.serving.machine import return_large_blocks

def resident_bytes():
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])

return_large_blocks()
held = []
before = resident_bytes()
for _ in range(8):
    block = bytearray(b"x") * (20 * 2**20)
    held.append(bytearray(b"x") * 2**20)  # Lies behind the block, if both come from the heap.
    del block
print(resident_bytes() - before)
"""


@pytest.mark.parametrize(
    ("cores", "workers", "chosen", "share"),
    [
        (2, 2, None, ThreadShare(1, 1)),
        (2, 1, None, ThreadShare(2, 1)),
        (16, 4, None, ThreadShare(4, 1)),
        (16, 4, 2, ThreadShare(2, 2)),
        (8, 1, 2, ThreadShare(2, 4)),
        (1, 4, None, ThreadShare(1, 1)),
        (2, 2, 8, ThreadShare(8, 1)),
        (6, 4, None, ThreadShare(1, 1)),
    ],
)
def test_workers_predictions_and_model_threads_together_fill_the_cores(
    cores: int, workers: int, chosen: int | None, share: ThreadShare
):
    assert share_cores(cores, workers=workers, predict_threads=chosen) == share


def test_large_blocks_leave_although_smaller_ones_stay() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True, timeout=60)
    # Eight of 1 MiB are still held.
    assert int(done.stdout) < 10 * 2**20


def test_opencv_takes_no_more_threads_than_a_worker_has_for_an_image() -> None:
    program = (
        "import cv2; from cv_platform.serving.machine import bound_opencv; bound_opencv(1); print(cv2.getNumThreads())"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60)
    assert int(done.stdout) == 1
