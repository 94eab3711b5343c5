"""Phase g: tens of thousands of damaged files, bombs and polyglots, over HTTP."""

from __future__ import annotations

from benchmarks.services import worker_pids
from cv_platform.serving.capacity.limits import ServingLimits
from trials.findings import Findings
from trials.hostile_load import send_hostile
from trials.mutations import hostile_upload, prepare
from trials.soak.stage import Scale, Stage
from trials.soak.workers import forget_peak_memory, peak_memory_bytes
from trials.traffic import Traffic, failures

UPLOADS = 20_000
CONCURRENCY = 8
PIXEL_BYTES = 8
"""Of one of these images on its way through a decoder: two of RGB at most, or in Pillow, which has four bytes for a
pixel, two while it is turned upright. The sequence has no progressive JPEG of four channels, which takes 11."""


def send_hostile_uploads(stage: Stage, scale: Scale) -> Findings:
    """Sends the sequence of the stage's seed; no 5xx, nothing late, memory within what the limits allow."""
    findings = Findings()
    count = scale.count(UPLOADS, least=500)
    prepare()
    with stage.service("hostile") as server:
        with Traffic(server.base_url, stage.uploads) as warm_up:
            warm_up.wait_for(100, seconds=30)
        workers = worker_pids(server.pid)
        for pid in workers:
            forget_peak_memory(pid)
        before = [peak_memory_bytes(pid) for pid in workers]
        folder = stage.keep / f"hostile-uploads-seed-{stage.seed}"
        result = send_hostile(
            server.base_url,
            lambda number: hostile_upload(stage.seed, number),
            count,
            concurrency=CONCURRENCY,
            answer_seconds=stage.settings.predict_timeout_seconds,
            failures=folder,
        )
        same = worker_pids(server.pid) == workers
        peaks = [peak_memory_bytes(pid) for pid in workers] if same else []
        with Traffic(server.base_url, stage.uploads) as afterwards:
            afterwards.wait_for(100, seconds=30)
    shown = ", ".join(f"{status or 'none'} × {number}" for status, number in sorted(result.statuses.items()))
    findings.add(
        f"{count} uploads of seed {stage.seed}: only 200, 400, 413, 415, each within "
        f"{stage.settings.predict_timeout_seconds:.0f} s",
        f"{shown} in {result.seconds:.0f} s, slowest {result.slowest_seconds:.1f} s ({result.slowest})"
        + (f"; wrong ones in {folder}: {'; '.join(result.wrong[:3])}" if result.wrong else ""),
        result.sent == count and not result.wrong,
    )
    findings.add("no worker died", "none" if same else "one did", same)
    threads = ServingLimits.of(stage.settings).predict_threads
    allowed = threads * PIXEL_BYTES * stage.settings.max_upload_pixels
    findings.add(
        f"peak memory (VmHWM) of a worker at most {allowed / 2**20:.0f} MiB above its memory before ({PIXEL_BYTES} "
        f"bytes for each of {stage.settings.max_upload_pixels} pixels, {threads} predictions at a time)",
        ", ".join(
            f"{(peak - base) / 2**20:.0f} MiB above {base / 2**20:.0f}"
            for base, peak in zip(before, peaks, strict=False)
        ),
        bool(peaks) and all(peak - base <= allowed for base, peak in zip(before, peaks, strict=True)),
    )
    findings.add("predicts afterwards", f"{len(afterwards.outcomes)} answers", not failures(afterwards.outcomes))
    return findings
