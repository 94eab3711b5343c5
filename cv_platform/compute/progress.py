"""How far a work on shards is, said in the log every few seconds."""

from __future__ import annotations

import logging
import time

logger = logging.getLogger(__name__)

_EVERY_SECONDS = 10.0


class Progress:
    """Counts images, and says how many there are, how fast they come and when the last one will.

    Args:
        title: of the work.
        total: images of all of it.
    """

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total, self._done = title, total, 0
        self._started = self._said = time.monotonic()

    def add(self, images: int) -> None:
        """Counts images that are done."""
        self._done += images
        now = time.monotonic()
        if now - self._said >= _EVERY_SECONDS:
            self._said = now
            logger.info(self.line(now - self._started))

    def line(self, seconds: float) -> str:
        """Returns what there is to say after so many seconds."""
        rate = self._done / max(seconds, 1e-9)
        left = max(0, self._total - self._done) / max(rate, 1e-9)
        share = f"{self._done:,} of {self._total:,} images"
        return f"{self._title}: {share}, {rate:,.0f} per second, {left:,.0f} s left"
