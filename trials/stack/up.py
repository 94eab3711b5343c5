"""Phase `up`: the core from empty volumes to healthy, what it needs when idle, and how large its images are."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence

from cv_platform.containers import engine
from cv_platform.containers.engine import Container
from trials.findings import Findings
from trials.pace import allowed
from trials.stack.stage import Stage

COLD_SECONDS = 240.0
LARGEST_SHARE = 0.5
"""Of the service's image in the platform's."""
IDLE_BYTES = 3 * 2**30
SETTLE_SECONDS = 20.0
_UNITS = {"B": 1, "kB": 10**3, "KiB": 2**10, "MB": 10**6, "MiB": 2**20, "GB": 10**9, "GiB": 2**30}


def start(stage: Stage, findings: Findings) -> None:
    """Starts the core by `make stack-up`."""
    begin = time.monotonic()
    stage.checkout.run("stack-up", stage.artifacts / "commands.log", seconds=1.5 * COLD_SECONDS)
    seconds, limit = time.monotonic() - begin, allowed(COLD_SECONDS)
    found = stage.containers()
    well = sum(container.is_well for container in found)
    findings.add(
        f"the core healthy within {limit:.0f} s, from empty volumes",
        f"{well} of {len(found)} containers after {seconds:.0f} s",
        seconds <= limit and well == len(found) > 0,
    )
    time.sleep(SETTLE_SECONDS)
    used = memory_bytes(found)
    prefix = f"{stage.checkout.project}-"
    parts = [f"{name.removeprefix(prefix)} {size / 2**20:.0f} MiB" for name, size in used.items()]
    findings.add(
        f"the idle core within {IDLE_BYTES / 2**30:g} GiB of memory",
        f"{sum(used.values()) / 2**30:.2f} GiB ({', '.join(parts)})",
        0 < sum(used.values()) <= IDLE_BYTES,
    )
    values = stage.checkout.values
    images = [engine.setting(values, name) for name in ("SERVICE_IMAGE", "PLATFORM_IMAGE")]
    service, platform = map(image_bytes, images)
    findings.add(
        f"the service's image ≤ {LARGEST_SHARE:g} of the platform's",
        f"{service / 1e6:.0f} MB / {platform / 1e6:.0f} MB = {service / platform:.2f}",
        service <= LARGEST_SHARE * platform,
    )


def memory_bytes(containers: Sequence[Container]) -> dict[str, float]:
    """Returns what each of the running containers uses, by its name."""
    ids = [container.id for container in containers if container.state == "running"]
    listing = engine.docker("stats", "--no-stream", "--format", "{{.Name}}\t{{.MemUsage}}", *ids) if ids else ""
    return {name: size_of(usage.split("/")[0]) for name, usage in (line.split("\t") for line in listing.splitlines())}


def size_of(text: str) -> float:
    """Returns the bytes of a size as Docker words it, such as `123.4MiB`."""
    found = re.fullmatch(r"\s*([\d.]+)\s*([A-Za-z]+)\s*", text)
    return float(found[1]) * _UNITS[found[2]] if found and found[2] in _UNITS else 0.0


def image_bytes(image: str) -> int:
    """Returns the size of an image, all its layers."""
    return int(engine.docker("image", "inspect", "--format", "{{.Size}}", image))
