"""Loopback ports and HTTP health: which port is free, and when a server answers."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

import httpx

from cv_platform.client.loopback import direct_transport
from cv_platform.errors import ServiceError


def free_port() -> int:
    """Returns a loopback port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_http(
    url: str, *, seconds: float, alive: Callable[[], bool] = lambda: True, every_seconds: float = 0.3
) -> None:
    """Waits until `url` answers 200, which is asked `every_seconds`.

    Raises:
        ServiceError: it did not within `seconds`, or `alive` turned false.
    """
    deadline = time.monotonic() + seconds
    last = "no answer"
    with httpx.Client(transport=direct_transport(url), timeout=5) as client:
        while time.monotonic() < deadline:
            if not alive():
                raise ServiceError(f"Expected {url} to answer 200. Its process has ended. Last: {last}.")
            try:
                response = client.get(url)
            except httpx.HTTPError as err:
                last = str(err)
            else:
                if response.status_code == 200:
                    return
                last = f"status {response.status_code}: {response.text[:500]}"
            time.sleep(every_seconds)
    raise ServiceError(f"Expected {url} to answer 200 within {seconds:.0f} s. Received: {last}.")


def is_taken(port: int) -> bool:
    """Returns whether something listens on a loopback port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
        return False
