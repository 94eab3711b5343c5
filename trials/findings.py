"""What a phase expected and received, and how long it waits for it."""

from __future__ import annotations

import time
from collections.abc import Callable

from benchmarks.harness import Check
from cv_platform.errors import ServiceError
from trials.pace import allowed


class Findings:
    """What one phase expected and received; its line is printed when it ends."""

    def __init__(self) -> None:
        self._things: list[tuple[str, str, bool]] = []

    def add(self, expected: str, received: object, held: bool) -> None:
        """Adds one thing that was looked at."""
        self._things.append((expected, f"{received}", held))

    @property
    def held(self) -> bool:
        """Whether all of it was as expected."""
        return all(held for _, _, held in self._things)

    def check(self, what: str) -> Check:
        """Returns all of it as one check."""
        return Check(
            what=what,
            expected="; ".join(expected for expected, _, _ in self._things),
            received="; ".join(received if held else f"NOT: {received}" for _, received, held in self._things),
            held=self.held,
        )

    def checks(self, what: str) -> list[Check]:
        """Returns each thing as a check of its own."""
        return [
            Check(what=what, expected=expected, received=received, held=held)
            for expected, received, held in self._things
        ]


def wait_until(condition: Callable[[], object], *, seconds: float, what: str) -> float:
    """Waits for `condition`, as long as `seconds` come to on this machine, and returns the seconds it took.

    Raises:
        ServiceError: it did not come about in time.
    """
    begin, limit = time.monotonic(), allowed(seconds)
    while not condition():
        if time.monotonic() - begin > limit:
            raise ServiceError(f"Expected {what} within {limit:.0f} s. Received: nothing of it.")
        time.sleep(0.1)
    return time.monotonic() - begin
