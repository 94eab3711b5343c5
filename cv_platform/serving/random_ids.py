"""Identifiers of requests and predictions: UUIDv4, as `uuid.uuid4` makes them, without its call of the system for each.

That call lets go of Python's lock, for which the event loop then waited behind a prediction: a sixth of its time with
eight requests in flight.
"""

from __future__ import annotations

import os
from collections import deque
from uuid import UUID

_BYTES = 16
_AT_ONCE = 256
_unused: deque[bytes] = deque()
os.register_at_fork(after_in_child=_unused.clear)


def new_id() -> UUID:
    """Returns a random identifier that nobody can guess; from any thread."""
    try:
        own = _unused.pop()
    except IndexError:
        drawn = os.urandom(_BYTES * _AT_ONCE)
        own, *others = (drawn[at : at + _BYTES] for at in range(0, len(drawn), _BYTES))
        _unused.extend(others)
    return UUID(bytes=own, version=4)
