"""Images per minute of each client, counted together by all workers of one host.

Each client may send a minute's images at once; then they come back evenly (a token bucket, kept as the one moment at
which it would be full again: the generic cell rate algorithm, https://en.wikipedia.org/wiki/Generic_cell_rate_algorithm).

The moments lie in one memory-mapped file of fixed size, so that memory is bounded whatever clients do, and a restart
forgives nobody. Clients are known by a keyed hash, whose key lies in the same file: neither API keys nor addresses can
be read out of it. What it guarantees: with up to `WAYS` busy clients per set nobody exceeds the limit; where more share
a set (`SETS` of them), the one that has been quiet for longest is forgotten and starts afresh. Hosts count separately.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import ipaddress
import math
import mmap
import os
import secrets
import struct
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from cv_platform.errors import ServiceError

SETS = 1024
WAYS = 8
_WINDOW_SECONDS = 60.0
_HEADER = struct.Struct("<8s16s")
_MAGIC = b"cvrate01"
_SLOT = struct.Struct("<16sd")
_SET_BYTES = WAYS * _SLOT.size
_FILE_BYTES = _HEADER.size + SETS * _SET_BYTES
_LOCK_ATTEMPTS = 200


class RateLimiter:
    """Counts the images of each client against one limit; safe to use from many threads and processes.

    Args:
        path: the file that the workers of this host share; made when it is missing, with mode 600.
        images_per_minute: of each client.
        clock: seconds since the epoch, the same for all workers.

    Raises:
        ServiceError: the file cannot be made or mapped.
    """

    def __init__(self, path: Path, images_per_minute: int, *, clock: Callable[[], float] = time.time) -> None:
        self.images_per_minute = images_per_minute
        self._interval = _WINDOW_SECONDS / images_per_minute
        self._clock = clock
        self._thread_lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._handle, fcntl.LOCK_EX)
            if os.fstat(self._handle).st_size != _FILE_BYTES:
                os.ftruncate(self._handle, 0)
                os.ftruncate(self._handle, _FILE_BYTES)
            self._table = mmap.mmap(self._handle, _FILE_BYTES)
            magic, self._salt = _HEADER.unpack_from(self._table, 0)
            if magic != _MAGIC:
                self._salt = secrets.token_bytes(16)
                self._table[:] = bytes(_FILE_BYTES)
                _HEADER.pack_into(self._table, 0, _MAGIC, self._salt)
            fcntl.flock(self._handle, fcntl.LOCK_UN)
        except OSError as err:
            raise ServiceError(
                f"Expected to count images per minute in {path}. Received: {err}. Check the folder's rights, or start "
                "without CV_RATE_LIMIT_PER_MINUTE."
            ) from err

    def take(self, client: bytes, images: int = 1) -> int | None:
        """Counts a client's images, all or none.

        Args:
            client: who sends them: an API key, or what `client_of_address` returns.
            images: how many.

        Returns:
            None when they are within the limit; else the whole seconds after which they would be. More than
            `images_per_minute` never are.
        """
        digest = hashlib.blake2b(client, digest_size=16, key=self._salt).digest()
        start = _HEADER.size + int.from_bytes(digest[:4], "little") % SETS * _SET_BYTES
        now = self._clock()
        with self._locked():
            offset, full_at = self._slot(start, digest, now)
            after = full_at + images * self._interval
            excess = after - now - _WINDOW_SECONDS
            if excess > 1e-6:
                return max(1, math.ceil(excess))
            _SLOT.pack_into(self._table, offset, digest, after)
            return None

    def close(self) -> None:
        """Lets go of the file; what it holds stays."""
        self._table.close()
        os.close(self._handle)

    def _slot(self, start: int, digest: bytes, now: float) -> tuple[int, float]:
        """Returns the client's place and when its bucket is full again, in seconds since the epoch, not before `now`.

        A client without a place gets that of the one whose bucket is full, or fullest.
        """
        quietest, quietest_full_at = start, math.inf
        for offset in range(start, start + _SET_BYTES, _SLOT.size):
            known, full_at = _SLOT.unpack_from(self._table, offset)
            if known == digest:
                if full_at > now + _WINDOW_SECONDS + 1:
                    # The clock was put back, which must not shut anybody out for longer than one window.
                    full_at = now + _WINDOW_SECONDS
                    _SLOT.pack_into(self._table, offset, digest, full_at)
                return offset, max(full_at, now)
            if full_at < quietest_full_at:
                quietest, quietest_full_at = offset, full_at
        return quietest, now

    @contextmanager
    def _locked(self) -> Generator[None]:
        """Keeps threads and other workers out for some microseconds; runs on the event loop, so it never sleeps.

        Should a worker be frozen just then, the others go on without its lock: two of them may then count as one.
        """
        with self._thread_lock:
            is_locked = False
            for _ in range(_LOCK_ATTEMPTS):
                try:
                    fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    os.sched_yield()
                else:
                    is_locked = True
                    break
            try:
                yield
            finally:
                if is_locked:
                    fcntl.flock(self._handle, fcntl.LOCK_UN)


@functools.lru_cache(maxsize=4096)
def client_of_address(host: str | None) -> bytes:
    """Returns who an address is to the limiter; for IPv6 its /64 network, as one client has all addresses of it."""
    if host is None:
        return b"address:"
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return b"address:" + host.encode("utf-8", "replace")
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return b"address:" + address.ipv4_mapped.packed
        return b"network:" + address.packed[:8]
    return b"address:" + address.packed
