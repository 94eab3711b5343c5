"""Which refusals of predictions are logged: every one is counted (`cv_refusals_total`), not every one gets an entry.

An entry that is durable before the refusal leaves has what a client with an API key sent, and on a service without keys
as much as `KEPT` allows. Of the rest, which anybody can send as fast as the network takes it, `SAMPLED` are logged, and
nobody waits for the disk: else strangers could fill the spool, its disk and the database. Refusals for load or rate
(429) are among them, as they are what bounds a client with a key.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from cv_platform.serving.telemetry.metrics import RefusalLogging

_NEVER_KEPT = frozenset({401, 403, 421, 429})
"""A stranger's, another site's, another host's, and too much of anybody's."""


class Rate(NamedTuple):
    """How many refusals of one kind a worker logs."""

    at_once: int
    a_second: float


KEPT = Rate(100, 1.0)
"""Durable ones on a service without API keys."""
SAMPLED = Rate(20, 1.0)


class Allowance:
    """A token bucket for one thread: what `rate` allows at once is there at first, and comes back evenly."""

    def __init__(self, rate: Rate) -> None:
        self._rate = rate
        self._left = float(rate.at_once)
        self._at = time.monotonic()

    def take(self) -> bool:
        """Says whether one more is allowed, and counts it if so."""
        now = time.monotonic()
        self._left = min(self._rate.at_once, self._left + (now - self._at) * self._rate.a_second)
        self._at = now
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True


class RefusalBounds:
    """What one worker still logs of refusals; used by its event loop alone."""

    def __init__(self) -> None:
        self._kept = Allowance(KEPT)
        self._sampled = Allowance(SAMPLED)

    def choose(self, status: int, *, has_key: bool, is_open: bool) -> RefusalLogging:
        """Returns how a refusal is logged.

        Args:
            status: HTTP status of the refusal.
            has_key: whether the request carried a valid API key.
            is_open: whether the service has no API keys.
        """
        if status not in _NEVER_KEPT and (has_key or (is_open and self._kept.take())):
            return "durable"
        return "sampled" if self._sampled.take() else "counted"
