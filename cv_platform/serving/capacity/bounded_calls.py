"""Calls that may hang (a database that is frozen, an object store that does not answer), kept from everything else.

They run on a few threads of their own, never on those that Starlette has for all routes, and whoever waits for one gets
an answer in time. The thread stays where it hangs: nothing can end a blocking call from outside. Its place is therefore
held for as long; what waits behind it is told so in time, and when no place is left the next call is refused at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from cv_platform.serving.capacity.limits import Gate, overloaded
from cv_platform.serving.capacity.worker_threads import WorkerThreads
from cv_platform.serving.problem import Problem, try_later

_T = TypeVar("_T")
_PLACES_PER_THREAD = 8
_STOP_SECONDS = 10.0


class BoundedCalls:
    """Runs up to `threads` calls at a time, each answered within `seconds`, its wait for a thread included.

    Args:
        what: the plural of what is called, for messages.
        waits_for: what does not answer when a call hangs, for messages.
        threads: how many at a time.
        seconds: the longest wait of whoever asks.
        places: calls under way or waiting for a thread; beyond, 429. None: eight for each thread.
        may_succeed: whether what a call has begun may still be done after its time: then nobody is told to come again.
    """

    def __init__(
        self,
        what: str,
        waits_for: str,
        *,
        threads: int,
        seconds: float,
        places: int | None = None,
        may_succeed: bool = False,
    ) -> None:
        self.gate = Gate(places or _PLACES_PER_THREAD * threads)
        self.seconds = seconds
        self._what = what
        self._waits_for = waits_for
        self._may_succeed = may_succeed
        self._threads = WorkerThreads(threads, what)

    async def run(self, work: Callable[[], _T], *, seconds: float | None = None) -> _T:
        """Runs `work` in one of the threads, and returns what it returns.

        Args:
            work: what may hang.
            seconds: the longest wait for this one.

        Raises:
            Problem: 429 when too many are under way, 503 when it does not end in time (504 if it may succeed later) or
                the service stops.
        """
        if not self.gate.enter():
            raise overloaded(self._what, self.gate.limit)
        seconds = seconds or self.seconds
        expected = f"an answer of {self._waits_for} within {seconds:g} s"
        if self._may_succeed:
            late = Problem(
                504,
                f"No answer after {seconds:g} s: {self._waits_for} takes longer, and may still succeed. "
                "Look before you send it again.",
                expected=expected,
            )
        else:
            text = f"No answer after {seconds:g} s: {self._waits_for} hangs. Try again later."
            late = try_later(503, text, expected=expected)
        return await run_admitted(self._threads, self.gate, work, seconds, late)

    def close(self, seconds: float = _STOP_SECONDS) -> None:
        """Finishes what is under way, for at most `seconds`; what hangs for longer is left behind."""
        self._threads.close(seconds)


async def run_admitted(threads: WorkerThreads, gate: Gate, work: Callable[[], _T], seconds: float, late: Problem) -> _T:
    """Runs work whose place in the gate is taken, and returns what it returns; the place is given back with the thread.

    Raises:
        Problem: `late` after `seconds`, 503 while the service stops.
    """
    try:
        job = threads.submit(work)
    except RuntimeError as err:
        gate.leave()
        raise try_later(503, "The service is stopping. Send it again.", expected="a running service") from err
    # Also called when the job is cancelled before it began: each place is given back exactly once.
    job.add_done_callback(lambda _: gate.leave())
    try:
        return await asyncio.wait_for(asyncio.wrap_future(job), seconds)
    except TimeoutError as err:
        raise late from err
