"""What becomes of entries that were written before their answers were made: message and time follow later."""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future

from cv_platform.errors import SpoolFullError
from cv_platform.serving.log.entry import LogEntry, Outcome
from cv_platform.serving.log.group_commit import GroupCommit
from cv_platform.serving.log.spool_file import settle_entries

logger = logging.getLogger(__name__)

_AT_ONCE = 500
"""Of one transaction, behind which the next entry waits; and so many wait at most, which is what a crash may take."""


class Outcomes:
    """Those of one spool; safe to use from many threads.

    Args:
        writer: of its file.
        on_settled: is called after each settling.

    Attributes:
        unsettled: ids of entries that were begun and whose outcome is not on disk; a successor drains them as they are.
    """

    def __init__(self, writer: GroupCommit, on_settled: Callable[[], None]) -> None:
        self.unsettled: set[str] = set()
        self._writer = writer
        self._on_settled = on_settled
        self._waiting: deque[Outcome] = deque()

    @property
    def are_waiting(self) -> bool:
        """Whether some are not queued for the disk yet."""
        return bool(self._waiting)

    @contextlib.contextmanager
    def begun(self, entry: LogEntry) -> Generator[Callable[[str, float], None]]:
        """Yields what settles an entry; it counts as begun unless the block, which queues it, fails."""
        entry_id, prediction_id = str(entry.entry_id), str(entry.prediction_id)

        def settle(message: str, seconds: float) -> None:
            self._waiting.append(Outcome(entry_id, prediction_id, message, seconds))
            if len(self._waiting) >= _AT_ONCE:
                self.queue()
            self._on_settled()

        self.unsettled.add(entry_id)
        try:
            yield settle
        except BaseException:
            self.unsettled.discard(entry_id)
            raise

    def queue(self) -> Future[None]:
        """Queues one transaction of them; the future is done once the entries can be drained."""
        part: list[Outcome] = []
        with contextlib.suppress(IndexError):  # Another thread may take some, too.
            while len(part) < _AT_ONCE:
                part.append(self._waiting.popleft())
        settled: Future[None] = Future()

        def settle(err: BaseException | None) -> None:
            if err is not None:
                logger.warning("The log keeps message and time of entries as they began (%d): %s", len(part), err)
            self.unsettled.difference_update(outcome.entry_id for outcome in part)
            settled.set_result(None)

        try:
            written = self._writer.submit(lambda connection: settle_entries(connection, part))
        except SpoolFullError as err:
            settle(err)
        else:
            written.add_done_callback(lambda done: settle(done.exception()))
        return settled
