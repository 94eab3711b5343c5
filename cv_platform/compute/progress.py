"""How far a work on many images is: said in the log every few seconds, or drawn as a bar on a terminal."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, NoReturn, TypeVar

if TYPE_CHECKING:
    from tqdm import tqdm

logger = logging.getLogger(__name__)

_EVERY_SECONDS = 10.0
T = TypeVar("T")


class Progress:
    """Counts images, and shows how many there are, how fast they come and when the last one will.

    By a bar where standard error is a terminal, until it is closed, else by lines in the log; nothing of no images.

    Args:
        title: of the work.
        total: images of all of it.
    """

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total, self._done = title, total, 0
        self._started = self._said = time.monotonic()
        self._bar: tqdm[NoReturn] | None = None
        if total > 0 and sys.stderr.isatty():
            from tqdm import tqdm  # Late: each process that works on shards imports this package.

            self._bar = tqdm(total=total, desc=title, unit=" images", dynamic_ncols=True, file=sys.stderr)

    def add(self, images: int) -> None:
        """Counts images that are done."""
        self._done += images
        if self._bar is not None:
            self._bar.update(images)
            return
        now = time.monotonic()
        if now - self._said >= _EVERY_SECONDS:
            self._said = now
            logger.info(self.line(now - self._started))

    def close(self) -> None:
        """Ends the bar, which stays on the terminal as it is."""
        if self._bar is not None:
            self._bar.close()

    def line(self, seconds: float) -> str:
        """Returns what there is to say after so many seconds."""
        rate = self._done / max(seconds, 1e-9)
        left = max(0, self._total - self._done) / max(rate, 1e-9)
        share = f"{self._done:,} of {self._total:,} images"
        return f"{self._title}: {share}, {rate:,.0f} per second, {_clock(left)} left"


def _clock(seconds: float) -> str:
    """Returns a time as the bar says it: minutes and seconds, such as 05:00, from an hour on with hours, as 9:43:20."""
    from tqdm import tqdm  # Late, as above.

    return tqdm.format_interval(round(seconds))


def watched(images: Sequence[T], title: str) -> Iterator[T]:
    """Yields images, and shows how far it is.

    Args:
        images: of the work, or what stands for each of them.
        title: of the work.
    """
    with closing(Progress(title, len(images))) as progress:
        for image in images:
            yield image
            progress.add(1)
