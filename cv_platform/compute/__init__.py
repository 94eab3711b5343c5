"""Work on shards, by whatever engine an installation has: `map_shards`.

A shard is a small value that names its input, and what is made of it is returned or published by a function that can be
called again: a shard may be worked on twice, by a process that dies and by the next one. What a shard contains is its
stage's part; how many processes there are, and where, is the engine's (`local`, `ray_engine`). The same bytes come out
of every engine.

How to add an engine: a class as `engine.Engine` describes it, and its name in `open_engine` and in `CV_COMPUTE`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from itertools import chain, islice
from typing import TYPE_CHECKING, Generic

from cv_platform.compute.engine import TASK_BYTES, Engine, Outcome, R, S, Salvage, alone
from cv_platform.compute.local import LocalEngine
from cv_platform.compute.progress import Progress
from cv_platform.compute.tries import Tries
from cv_platform.errors import ShardError

if TYPE_CHECKING:  # Late: each process that works on shards imports this package.
    from cv_platform.settings import Settings

logger = logging.getLogger(__name__)

_SHOWN = 5


def open_engine(settings: Settings) -> Engine:
    """Returns the engine of an installation; what it needs is started when it is first used.

    Raises:
        ComputeError: the settings ask for Ray, which is not installed.
    """
    notes = settings.home / "cache" / "tried"
    if settings.compute == "local":
        return LocalEngine(notes=notes)
    from cv_platform.compute.ray_engine import RayEngine

    return RayEngine(settings.ray_address, notes=notes)


def map_shards(
    function: Callable[[S], R],
    shards: Iterable[S],
    *,
    engine: Engine | None,
    title: str,
    total: int,
    in_order: bool = True,
    salvage: Salvage[S, R] | None = None,
    alone_seconds: float = 0.0,
    task_bytes: int = TASK_BYTES,
) -> Iterator[tuple[S, R]]:
    """Yields each shard with what `function` returns of it; no more wait here than a few for each worker.

    A shard whose process dies is tried again. One that kills it each time does not keep the others from being done: it,
    or the image to blame, is named at the end, or saved as far as `salvage` says. One that kills this process, where it
    works alone, is left to others from the next call on, with all that follow. An error that `function` raises ends the
    work at once, unless it is one that passes by itself.

    Args:
        function: of a module, so that another process finds it by its name; it has to bear being called twice.
        shards: taken as the work goes on.
        engine: who does it; None: processes of this machine.
        title: of the work, for the log.
        total: images of all shards.
        in_order: in the order of `shards`; else as they come.
        salvage: what becomes of the rest of a shard that kills its process.
        alone_seconds: of work, from which others are worth asking where each has to load a network first. Until this
            process has so much left, or `engine.worth_seconds` if that is more, it works alone; 0: the engine says.
        task_bytes: memory of a process; `local` starts no more than this machine has it for. Ray's tasks ask for
            `TASK_BYTES` in any case.

    Raises:
        ShardError: shards, or images that `salvage` does not save, have killed each process that worked on them; all
            others are done, or those to blame are more than `salvage.most_lost`.
    """
    engine = engine or LocalEngine()
    if isinstance(engine, LocalEngine):
        engine = engine.with_memory(task_bytes)
    with closing(Progress(title, total)) as progress:
        losses = _Losses(title, salvage)
        shards = iter(shards)
        # Where nobody else is to be asked at all, as with a GPU, others could not do it any better.
        tries = Tries(engine.notes if alone_seconds < math.inf else None, title)
        if (worth_seconds := max(alone_seconds, engine.worth_seconds)) > 0:
            with tries.noted(shards) as noted:
                for shard, result in alone(function, noted, worth_seconds=worth_seconds, total=total):
                    progress.add(shard.images)
                    yield shard, result
        if not (first := tries.left or list(islice(shards, 1))):
            return  # And no cluster is started.
        for outcome in engine.run(function, chain(first, shards), in_order=in_order):
            if outcome.failure is None:
                tries.survived(outcome.shard)
            elif (outcome := losses.save(function, outcome, engine)).failure is not None:
                continue
            progress.add(outcome.shard.images)
            yield outcome.shard, outcome.result
        losses.require_none()


class _Losses(Generic[S, R]):
    """What nobody survives: shards or, with `salvage`, images."""

    def __init__(self, title: str, salvage: Salvage[S, R] | None) -> None:
        self._title, self._salvage = title, salvage
        self._lost: list[str] = []

    def save(self, function: Callable[[S], R], outcome: Outcome[S, R], engine: Engine) -> Outcome[S, R]:
        """Returns what comes of a shard that nobody has survived where its images are tried one by one.

        Raises:
            ShardError: more images end their process than can be to blame.
        """
        if (salvage := self._salvage) is None:
            self._add(outcome)
            return outcome
        shard, results = outcome.shard, list[R]()
        logger.warning("%s: %s %s; its images are tried one by one", self._title, shard.name, outcome.failure)
        known = [outcome] if shard.images == 1 else engine.run(function, salvage.divide(shard), in_order=True)
        for one in known:
            if one.failure is None:
                results.append(one.result)
                continue
            self._add(one)
            if len(self._lost) > salvage.most_lost:
                raise self._error("The work was ended, as so many can hardly be to blame.")
            if salvage.lost is not None:
                results.append(salvage.lost(one.shard, one.failure))
        return Outcome(shard, salvage.join(results)) if len(results) == shard.images else outcome

    def require_none(self) -> None:
        """Returns if all shards have a result.

        Raises:
            ShardError: some have not.
        """
        if self._lost and (self._salvage is None or self._salvage.lost is None):
            raise self._error("All others are done.")

    def _add(self, outcome: Outcome[S, R]) -> None:
        logger.error("%s: %s %s; the rest goes on", self._title, outcome.shard.name, outcome.failure)
        self._lost.append(f"{outcome.shard.name} ({outcome.failure})")

    def _error(self, rest: str) -> ShardError:
        more = f" and {len(self._lost) - _SHOWN} more" if len(self._lost) > _SHOWN else ""
        return ShardError(
            f"{self._title}: expected processes that live. Received: {', '.join(self._lost[:_SHOWN])}{more}. {rest} "
            "Look at these images, and at the memory of the machine; then run it again."
        )
