"""What has been freed leaves the process, so that one large upload does not make a worker large for good."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
from pathlib import Path
from cv_platform.serving.capacity.memory import return_large_blocks

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


def test_large_blocks_leave_although_smaller_ones_stay() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True, timeout=60)
    # Eight of 1 MiB are still held.
    assert int(done.stdout) < 10 * 2**20
