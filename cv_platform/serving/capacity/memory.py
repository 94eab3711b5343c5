"""How many bytes a worker's requests may hold together: uploads, in memory or in the folder for temporary files, which
is memory in a container, and images that are decoded.

Uploads never take what the largest image needs to be decoded. So a decoding only ever waits for others, which end, and
nothing waits for an upload, which may be slow.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager

from cv_platform.errors import ImageError
from cv_platform.images import count_decoded_pixels
from cv_platform.serving.capacity.limits import SHRINK_IMAGE, too_large
from cv_platform.serving.problem import Problem, try_later

DECODING_BYTES_PER_PIXEL = 13
"""The most that any format takes, see docs/reference/service.md."""
_UPLOADS_SHARE = 8
"""One part in so many is for uploads, also where the largest image would need all of it."""


class RequestMemory:
    """One worker's bytes; safe to use from many threads.

    Args:
        limit_bytes: of all together.
        max_upload_bytes: of the largest file.
        max_pixels: of the largest image.
    """

    def __init__(self, limit_bytes: int, *, max_upload_bytes: int, max_pixels: int) -> None:
        largest = max_upload_bytes + DECODING_BYTES_PER_PIXEL * max_pixels
        self.limit_bytes = limit_bytes
        self.uploads_bytes = max(limit_bytes - largest, limit_bytes // _UPLOADS_SHARE)
        self._max_pixels = max_pixels
        self._uploads = 0
        self._decodings = 0
        self._changed = threading.Condition()
        self._turn = threading.Lock()

    @property
    def taken_bytes(self) -> int:
        """What is taken now."""
        return self._uploads + self._decodings

    @contextmanager
    def upload(self, declared_bytes: int) -> Generator[Callable[[int], None]]:
        """Yields what takes the bytes of one body as they arrive; they are given back at the end.

        It is called with the length so far. Nothing is taken for a length that is declared, which costs its sender
        nothing: a few who declare much and send nothing would keep out all others.

        Raises:
            Problem: (so does what is yielded) 413, there never is so much; 429, there is not so much now.
        """
        taken = 0

        def cover(length: int) -> None:
            nonlocal taken
            with self._changed:
                self._require_room(length, length - taken)
                self._uploads += length - taken
                taken = length

        self._require_room(declared_bytes, declared_bytes)
        try:
            yield cover
        finally:
            with self._changed:
                self._uploads -= taken
                self._changed.notify_all()

    def _require_room(self, length: int, more: int) -> None:
        if length > self.uploads_bytes:
            raise too_large(self.uploads_bytes, f"{length} bytes (see CV_REQUEST_MEMORY_BYTES)")
        if self._uploads + more > self.uploads_bytes or self.taken_bytes + more > self.limit_bytes:
            raise try_later(
                429,
                f"This worker is busy with {self.taken_bytes} bytes of uploads and images. Try again.",
                expected=f"at most {self.uploads_bytes} bytes of uploads at a time",
                seconds=1,
            )

    @contextmanager
    def decoding(self, data: bytes, *, seconds: float) -> Generator[None]:
        """Takes what decoding an image needs at most, by its header, to the end of the block; waits for other images.

        It blocks, so call it in a thread that predicts. Who came first is first, so that a large image gets its turn.
        What is no image has no pixels: whoever decodes it says why.

        Raises:
            Problem: 413, the image needs more than there ever is; 503, others have not ended after `seconds`.
        """
        try:
            pixels = count_decoded_pixels(data, max_pixels=self._max_pixels)
        except ImageError:
            pixels = 0
        needed = len(data) + DECODING_BYTES_PER_PIXEL * pixels
        limit = self.limit_bytes - self.uploads_bytes
        if needed > limit:
            raise Problem(
                413,
                f"Expected an image that can be decoded in {limit} bytes (CV_REQUEST_MEMORY_BYTES). Received: "
                f"{pixels} pixels, which may take {needed}. {SHRINK_IMAGE}",
                expected=f"an image of at most {limit // DECODING_BYTES_PER_PIXEL} pixels",
            )
        if not self._wait_and_take(needed, seconds):
            raise try_later(
                503,
                f"The memory for images was taken for {seconds:g} s. Send it again.",
                expected="a service with fewer large images at a time",
            )
        try:
            yield
        finally:
            with self._changed:
                self._decodings -= needed
                self._changed.notify_all()

    def _wait_and_take(self, needed: int, seconds: float) -> bool:
        if not self._turn.acquire(timeout=seconds):
            return False
        try:
            with self._changed:
                if not self._changed.wait_for(lambda: self.taken_bytes + needed <= self.limit_bytes, seconds):
                    return False
                self._decodings += needed
                return True
        finally:
            self._turn.release()
