"""A challenger that is asked beside the champion, in the machine's spare time: a process of its own, one a worker.

The process runs in Linux's idle class (`sched(7)`, SCHED_IDLE): it gets a core when nobody else wants it, and gives it
back at once. As a thread it would hold Python's lock of the worker meanwhile. It reads uploads from its input and
writes a line of JSON for each (`python -m cv_platform.serving.model.shadow`). The worker keeps a few uploads for it and
drops what comes while it is busy: no request waits for a shadow, and one that dies takes nothing with it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any
from uuid import UUID

import numpy as np

from cv_platform.images import preprocess
from cv_platform.probation import Probation, ShadowAnswer, ShadowTally
from cv_platform.serving.model.runtime import load_bundle, predicted_classes
from cv_platform.serving.telemetry.metrics import ServingMetrics
from cv_platform.storage import CentralStorage

logger = logging.getLogger(__name__)

_MAX_WAITING = 16
_MAX_WAITING_BYTES = 8_000_000
_LOG_SECONDS = 2.0
_REST, _LONGEST_REST_SECONDS = 20.0, 1.0
"""After each image, so many times as long as it took: what the process, handing over and counting cost the champion,
most requests do not meet, and fewer still where cores are busy, as it takes longer then."""
_STARTS = 3
"""Of a process that dies; then the challenger counts as failing, for each image that it is asked about."""


@dataclass(frozen=True)
class ShadowPlace:
    """What the shadow's process needs beside the version.

    Attributes:
        storage_url: of central storage.
        cache: folder for downloads.
        max_pixels: largest height × width of an upload.
        log: keeps answers, and returns how many of those it was given are lost.
        metrics: count them; None: nobody does.
    """

    storage_url: str
    cache: Path
    max_pixels: int
    log: Callable[[Sequence[ShadowAnswer]], int]
    metrics: ServingMetrics | None = None


@dataclass(frozen=True)
class _Waiting:
    prediction_id: UUID
    data: bytes
    classes: tuple[str, ...]
    unknown_score: float | None


class Shadow:
    """A challenger's process and what waits for it; safe to use from many threads. `close` ends it."""

    def __init__(self, probation: Probation, place: ShadowPlace) -> None:
        self._probation, self._place = probation, place
        self._tally = ShadowTally()
        self._waiting: deque[_Waiting] = deque()
        self._waiting_bytes = 0
        self._changed = threading.Condition()
        self._is_closed = False
        self._process: subprocess.Popen[bytes] | None = None
        self._starts = 0
        self._unlogged: list[ShadowAnswer] = []
        self._thread = threading.Thread(target=self._run, name="shadow", daemon=True)
        self._thread.start()

    def offer(self, prediction_id: UUID, data: bytes, classes: tuple[str, ...], unknown_score: float | None) -> None:
        """Lets the challenger see an upload that the champion has answered, unless it is busy.

        Args:
            prediction_id: of the answer.
            data: the upload.
            classes: what the champion says.
            unknown_score: likewise.
        """
        with self._changed:
            full = len(self._waiting) >= _MAX_WAITING or self._waiting_bytes + len(data) > _MAX_WAITING_BYTES
            if full or self._is_closed:
                self._tally += ShadowTally(dropped=1)
            else:
                self._waiting.append(_Waiting(prediction_id, data, classes, unknown_score))
                self._waiting_bytes += len(data)
                self._changed.notify()
        if full and self._place.metrics is not None:
            self._place.metrics.shadow_answered(self._probation.version, "dropped")

    def tally(self) -> ShadowTally:
        """Returns what was counted so far."""
        with self._changed:
            return self._tally

    def close(self) -> None:
        """Ends it; what waits is not asked any more."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        process = self._process
        if process is not None:
            process.kill()
        self._thread.join(timeout=10.0)

    def _run(self) -> None:
        logged = time.monotonic()
        while not self._is_closed:
            with self._changed:
                if not self._waiting:
                    self._changed.wait(_LOG_SECONDS)
                waiting = self._waiting.popleft() if self._waiting else None
                self._waiting_bytes -= len(waiting.data) if waiting else 0
            if waiting is not None:
                began = time.monotonic()
                self._note(waiting, self._ask(waiting))
                time.sleep(min(_REST * (time.monotonic() - began), _LONGEST_REST_SECONDS))
            if time.monotonic() - logged >= _LOG_SECONDS:
                self._log()
                logged = time.monotonic()
        self._end_process()
        self._log()

    def _end_process(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):  # Of what it never read.
                    if pipe is not None:
                        pipe.close()

    def _ask(self, waiting: _Waiting) -> dict[str, Any] | None:
        """Returns what the process says; None where it fails."""
        try:
            if self._process is None or self._process.poll() is not None:
                if self._starts >= _STARTS:
                    return None
                self._starts += 1
                self._end_process()
                self._process = _start(self._probation, self._place)
            said = _exchange(self._process, waiting.data)
        except (OSError, ValueError) as err:
            if not self._is_closed:
                logger.warning("The shadow of %s fails: %s", self._probation.version, err)
            return None
        return None if "error" in said else said

    def _note(self, waiting: _Waiting, said: dict[str, Any] | None) -> None:
        if self._is_closed:
            return
        metrics, version = self._place.metrics, self._probation.version
        if said is None:
            counted, outcome = ShadowTally(asked=1, failed=1), "failed"
        else:
            answer = ShadowAnswer(
                prediction_id=waiting.prediction_id,
                model_name=self._probation.model_name,
                model_version=version,
                answered_on=datetime.now(UTC),
                agrees=tuple(said["classes"]) == waiting.classes,
                **said,
            )
            self._unlogged.append(answer)
            by_champion = waiting.unknown_score is not None and waiting.unknown_score > 1
            by_challenger = answer.unknown_score is not None and answer.unknown_score > 1
            counted = ShadowTally(
                asked=1,
                agreed=int(answer.agrees),
                unknown_both=int(by_champion and by_challenger),
                unknown_challenger=int(by_challenger and not by_champion),
                unknown_champion=int(by_champion and not by_challenger),
                seconds=answer.seconds,
            )
            outcome = "agreed" if answer.agrees else "differed"
        with self._changed:
            self._tally += counted
        if metrics is not None:
            seconds = None if said is None else float(said["seconds"])
            metrics.shadow_answered(version, outcome, seconds, is_unknown=counted.unknown_challenger > 0)

    def _log(self) -> None:
        answers, self._unlogged = self._unlogged, []
        if answers:
            lost = self._place.log(answers)
            with self._changed:
                self._tally += ShadowTally(unlogged=lost)


def _start(probation: Probation, place: ShadowPlace) -> subprocess.Popen[bytes]:
    wanted = (place.storage_url, probation.model_name, probation.version, str(place.cache), str(place.max_pixels))
    return subprocess.Popen(
        [sys.executable, "-m", "cv_platform.serving.model.shadow", *wanted],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # Of its worker these are the shares: it has one thread, and its counts are the worker's.
        env={k: v for k, v in os.environ.items() if k != "PROMETHEUS_MULTIPROC_DIR"} | {"OMP_NUM_THREADS": "1"},
    )


def _exchange(process: subprocess.Popen[bytes], data: bytes) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(len(data).to_bytes(8, "big") + data)
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise OSError("expected an answer of its process. Received: its end.")
    return json.loads(line)


def main(storage_url: str, model_name: str, version: str, cache: str, max_pixels: str) -> None:
    """Answers the uploads that come in, until no more do."""
    with contextlib.suppress(OSError, AttributeError):  # Where there is no idle class it is at least the last in turn.
        os.nice(19)
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    answers, sys.stdout = sys.stdout.buffer, sys.stderr  # What a library prints is no answer.
    model = load_bundle(CentralStorage(storage_url), model_name, version, cache=Path(cache), threads=1)

    def answer(data: bytes) -> dict[str, Any]:
        began = time.monotonic()
        size = model.metadata.image_size
        pixels = preprocess(data, size, max_pixels=int(max_pixels), preprocessing=model.preprocessing)
        prediction = model.predict(pixels)
        if not np.isfinite(prediction.probabilities).all():
            raise ArithmeticError("Expected probabilities. Received: what is no number.")
        rule = model.unknown
        return {
            "classes": predicted_classes(prediction.probabilities, model.metadata),
            "probabilities": [float(p) for p in prediction.probabilities],
            "unknown_score": None if rule is None else float(rule.score(prediction.features[np.newaxis])[0]),
            "seconds": time.monotonic() - began,
        }

    while (data := _received(sys.stdin.buffer)) is not None:
        try:
            said = answer(data)
        # Whatever one upload meets, the next one is asked.
        except Exception as err:
            logger.exception("An image fails")
            said = {"error": str(err) or type(err).__name__}
        answers.write(json.dumps(said).encode() + b"\n")
        answers.flush()


def _received(stream: IO[bytes]) -> bytes | None:
    head = stream.read(8)
    return stream.read(int.from_bytes(head, "big")) if len(head) == 8 else None


if __name__ == "__main__":
    main(*sys.argv[1:])
