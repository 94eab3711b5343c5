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
from typing import TYPE_CHECKING

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

    A shard whose process dies is tried again. One that kills it each time does not keep the others from being done: it
    is named at the end, or saved as far as `salvage` says. One that kills this process, where it works alone, is left
    to others from the next call on, with all that follow. An error that `function` raises ends the work at once, unless
    it is one that passes by itself.

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
        ShardError: shards have killed each process that worked on them; all others are done.
    """
    engine = engine or LocalEngine()
    if isinstance(engine, LocalEngine):
        engine = engine.with_memory(task_bytes)
    with closing(Progress(title, total)) as progress:
        lost: list[str] = []
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
                result = outcome.result
                tries.survived(outcome.shard)
            elif salvage is not None:
                logger.warning("%s: %s %s; its images are tried one by one", title, outcome.shard.name, outcome.failure)
                result = salvage.join(
                    [_saved(one, salvage, title) for one in _singles(function, outcome, salvage, engine)]
                )
            else:
                logger.error("%s: %s %s; the rest goes on", title, outcome.shard.name, outcome.failure)
                lost.append(f"{outcome.shard.name} ({outcome.failure})")
                continue
            progress.add(outcome.shard.images)
            yield outcome.shard, result
        if lost:
            raise _lost_shards(title, lost)


def _singles(
    function: Callable[[S], R], outcome: Outcome[S, R], salvage: Salvage[S, R], engine: Engine
) -> Iterator[Outcome[S, R]]:
    """Yields what came of each image of a shard that nobody has survived; of one alone that is known."""
    if outcome.shard.images == 1:
        return iter((outcome,))
    return engine.run(function, salvage.divide(outcome.shard), in_order=True)


def _saved(one: Outcome[S, R], salvage: Salvage[S, R], title: str) -> R:
    if one.failure is None:
        return one.result
    logger.error("%s: %s %s; the rest goes on", title, one.shard.name, one.failure)
    return salvage.lost(one.shard, one.failure)


def _lost_shards(title: str, lost: list[str]) -> ShardError:
    more = f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
    return ShardError(
        f"{title}: expected every shard. Received: {', '.join(lost[:_SHOWN])}{more}. All others are done. Look at the "
        "images of these shards, and at the memory of the machine; then run it again."
    )
