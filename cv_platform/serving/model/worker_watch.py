"""Tells which workers of a service live: those whose heartbeats are seen to change.

How long a heartbeat has not changed is measured by the observer's own clock. The time in it is never compared with that
clock: the clocks of two machines differ, by seconds or, where one is set wrongly, by hours.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from cv_platform.storage import CentralStorage, WorkerHeartbeat

HEARTBEAT_SECONDS = 2.0
HEARTBEAT_STALE_SECONDS = 10.0
"""A worker whose heartbeat has not changed for so long does not count as running."""


@dataclass(frozen=True)
class Sighting:
    """What is known of one worker.

    Attributes:
        beat: what it last said.
        state: live: seen to beat; dead: watched without a beat for `HEARTBEAT_STALE_SECONDS`; unknown: not watched for
            so long, so that nobody can tell yet.
        still_seconds: since its heartbeat changed, or was first seen.
    """

    beat: WorkerHeartbeat
    state: Literal["live", "unknown", "dead"]
    still_seconds: float


@dataclass(frozen=True)
class _Seen:
    beat: WorkerHeartbeat
    since: float
    is_a_beat: bool
    """Whether it came while the observer watched; else it may be of any time."""


class WorkerWatch:
    """Watches the heartbeats of a service; what it knows comes from being asked to `look` again and again.

    Args:
        storage: central storage.
        service: whose workers.
        clock: in seconds, monotonic.
    """

    def __init__(self, storage: CentralStorage, service: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.storage = storage
        self.service = service
        self._clock = clock
        self._lock = threading.Lock()
        self._looked_at: float | None = None
        self._seen: dict[str, _Seen] = {}

    def look(self) -> list[Sighting]:
        """Reads the heartbeats and says what is known of each worker, by worker id; safe to call from many threads.

        Raises:
            StorageError: they cannot be read.
        """
        with self._lock:  # Also while it reads: an older reading that came last would look like a beat.
            beats = self.storage.read_heartbeats(self.service)
            now = self._clock()
            watches = self._looked_at is not None and now - self._looked_at <= HEARTBEAT_STALE_SECONDS
            self._looked_at = now
            before, self._seen = self._seen, {}
            for beat in beats:
                seen = before.get(beat.worker_id)
                if seen is None or seen.beat != beat:
                    seen = _Seen(beat, now, is_a_beat=watches)
                self._seen[beat.worker_id] = seen
            return [self._sighting(seen, now) for seen in self._seen.values()]

    @staticmethod
    def _sighting(seen: _Seen, now: float) -> Sighting:
        still_seconds = now - seen.since
        if still_seconds > HEARTBEAT_STALE_SECONDS:
            return Sighting(seen.beat, "dead", still_seconds)
        return Sighting(seen.beat, "live" if seen.is_a_beat else "unknown", still_seconds)
