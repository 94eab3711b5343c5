"""Runs the numerical tests again with instruction sets held back, so that one machine stands for several.

`make test-portable`. Rounding differs with the width of the registers and with fused multiply-adds: NumPy, OpenBLAS,
OpenCV, libjpeg-turbo, oneDNN (TensorFlow) and the C library's mathematics each choose their code by the CPU, and each
can be told to choose an older one's. ONNX Runtime cannot; its answers are compared with those of the others.

https://numpy.org/doc/1.26/reference/simd/build-options.html, https://www.openblas.net,
https://uxlfoundation.github.io/oneDNN/dev_guide_cpu_dispatcher_control.html,
https://www.gnu.org/software/libc/manual/html_node/Hardware-Capability-Tunables.html,
https://github.com/libjpeg-turbo/libjpeg-turbo/blob/main/simd/x86_64/jsimd.c
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys

from cv_platform.compute.ray_engine import simd_found
from cv_platform.local.environment import REPOSITORY

NUMERICAL = (
    "unit/deployment/test_export.py",
    "unit/deployment/test_signature.py",
    "unit/drift",
    "unit/encoders",
    "unit/evaluation/test_metrics.py",
    "unit/serving/model/test_explain.py",
    "unit/serving/model/test_runtime.py",
    "unit/test_images.py",
    "unit/test_properties.py",
    "unit/training/test_network.py",
    "unit/training/test_calibration.py",
    "unit/training/test_schedules.py",
    "unit/validation/checks/test_checks.py",
    "unit/validation/checks/test_label_issues.py",
)
"""Folders and modules whose results are computed floats. A new one is added here."""


def settings() -> dict[str, dict[str, str]]:
    """Returns the environment of each older CPU that this one can stand for, by its name."""
    # Only what NumPy dispatches to and this CPU has: it warns of others. What is held back already stays so.
    found = os.environ.get("NPY_DISABLE_CPU_FEATURES", "").split()
    found += simd_found()
    oldest = {"NPY_DISABLE_CPU_FEATURES": " ".join(found), "TF_ENABLE_ONEDNN_OPTS": "0", "JSIMD_FORCENONE": "1"}
    if platform.machine() != "x86_64":
        return {f"the plainest {platform.machine()}": {**oldest, "OPENBLAS_CORETYPE": "ARMV8"}}
    wide = [feature for feature in found if feature.startswith("AVX512")]
    avx2 = {
        "NPY_DISABLE_CPU_FEATURES": " ".join(wide),
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "OPENBLAS_CORETYPE": "Haswell",
        "OPENCV_CPU_DISABLE": "AVX512-SKX",
        "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX512F,-AVX512VL",
    }
    sse = {
        **oldest,
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "OPENBLAS_CORETYPE": "Nehalem",
        "OPENCV_CPU_DISABLE": "AVX512-SKX,AVX2,FMA3,FP16,AVX",
        "OPENCV_IPP": "disabled",
        "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX512F,-AVX512VL,-AVX2,-FMA,-FMA4,-AVX",
    }
    return ({"AVX2 without AVX-512": avx2} if wide else {}) | {"SSE4.2 without AVX": sse}


def main() -> int:
    """Runs the tests under each setting; returns 1 if one of them failed."""
    failed = False
    for name, environment in settings().items():
        sys.stdout.write(f"The numerical tests on {name}: {environment}\n")
        sys.stdout.flush()
        tests = [f"cv_platform_tests/{path}" for path in NUMERICAL]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-n", "2", *tests, *sys.argv[1:]],
            env={**os.environ, **environment},
            cwd=REPOSITORY,
            check=False,
        )
        failed |= done.returncode != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
