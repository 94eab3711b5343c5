"""Engines of other machines, as far as a stage can tell: processes of this one."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cv_platform.compute.engine import Outcome, R, S, call
from cv_platform.compute.local import LocalEngine


class Elsewhere:
    """Works on shards by two processes, and counts those that came back."""

    workers, worth_seconds, notes = 2, 0.0, None

    def __init__(self) -> None:
        self.shards = 0

    def ask(self, question: Callable[[], R]) -> dict[str, R]:
        return {}

    def run(self, function: Callable[[S], R], shards: Iterable[S], *, in_order: bool) -> Iterator[Outcome[S, R]]:
        processes = LocalEngine(self.workers, worth_seconds=0)
        for outcome in processes.run(function, shards, in_order=in_order):
            self.shards += 1
            yield outcome


class Apart:
    """An engine of another machine that does not see a folder of this one: whatever it works on, that folder is away.

    Args:
        hidden: the folder.
    """

    workers, worth_seconds, notes = 1, 0.0, None

    def __init__(self, hidden: Path) -> None:
        self._hidden = hidden
        self.shards = 0

    def ask(self, question: Callable[[], R]) -> dict[str, R]:
        with self._away():
            return {"apart": pickle.loads(pickle.dumps(question))()}

    def run(self, function: Callable[[S], R], shards: Iterable[S], *, in_order: bool) -> Iterator[Outcome[S, R]]:
        for shard in shards:
            sent = pickle.dumps((function, shard))
            with self._away():
                taken, part = pickle.loads(sent)
                answer = pickle.dumps(call(taken, part))
            self.shards += 1
            yield Outcome(shard, pickle.loads(answer))

    @contextmanager
    def _away(self) -> Iterator[None]:
        aside = self._hidden.with_name(f"{self._hidden.name}-away")
        self._hidden.rename(aside)
        try:
            yield
        finally:
            aside.rename(self._hidden)
