"""The program of a process that works on shards for `local`: it ends with the one that has started it."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

from cv_platform.compute.engine import answer, use_one_thread
from cv_platform.errors import ComputeError

_LOOK_SECONDS = 0.5


def serve(connection: Connection[Any, Any], *, parent: int) -> None:
    """Takes a function, says that it is ready, then works on the shards that come until nothing more does.

    An answer is `(error, result)`, of which one is None.

    Args:
        connection: to who gives out the shards.
        parent: its process id.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who gives out the shards.
    end_with(parent)
    function = connection.recv()
    use_one_thread()
    connection.send((None, None))
    while True:
        try:
            shard = connection.recv()
        except EOFError:
            return
        answered = answer(function, shard)
        try:
            connection.send(answered)
        except (pickle.PicklingError, TypeError, AttributeError) as err:
            said = answered[0] or err
            connection.send((ComputeError(f"{shard.name}: {type(said).__name__}: {said}"), None))


def end_with(parent: int) -> None:
    """Has this process end soon after the one that has started it, however that ends."""

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_SECONDS)
        os._exit(1)

    threading.Thread(target=look, daemon=True).start()
