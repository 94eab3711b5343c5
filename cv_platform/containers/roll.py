"""Replaces the service's replicas one by one, without a failed request.

For each replica: a new one is started beside it and gets requests once it is ready; then nginx stops sending to the old
one, which ends when it has answered what it has. A new one that does not become healthy is removed again, and the rest
stay as they are; so they do when nginx refuses its configuration. What nginx does is docker/nginx/upstream.sh's part.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable

from cv_platform.containers import engine
from cv_platform.containers.engine import Container
from cv_platform.errors import ServiceError

READY_SECONDS = 240.0
_LOOK_SECONDS = 1.0
_UPSTREAM = "/etc/nginx/stack/upstream.sh"


def roll(project: str, say: Callable[[str], None]) -> int:
    """Replaces every running replica by one of the image and settings of now; returns how many.

    Raises:
        ServiceError: the stack does not run, a new replica did not become healthy, or nginx refused its configuration;
            the old ones that are left go on.
    """
    old = [c for c in engine.containers(project, "service") if c.state == "running"]
    doors = [c for c in engine.containers(project, "nginx") if c.is_well]
    if not old or not doors:
        raise ServiceError("Expected a running stack with nginx and a replica. Received: none. Run: make stack-up")
    door = doors[0]
    say("The request log's schema: brought up to date before anything that needs it starts.")
    engine.compose("run", "--rm", "--no-deps", "migrate")
    say("From now on answers close their connections, so that nginx can be reloaded unnoticed.")
    _upstream(door, "begin")
    try:
        for number, replica in enumerate(old, 1):
            say(f"[{number}/{len(old)}] {replica.name}")
            _replace(project, door, replica, len(old), say)
    finally:
        _upstream(door, "end")
    return len(old)


def _replace(project: str, door: Container, old: Container, count: int, say: Callable[[str], None]) -> None:
    before = {c.id for c in engine.containers(project, "service")}
    engine.compose("up", "--detach", "--no-deps", "--no-recreate", "--scale", f"service={count + 1}", "service")
    fresh = [c for c in engine.containers(project, "service") if c.id not in before]
    if len(fresh) != 1:
        raise ServiceError(
            f"Expected one new replica beside {old.name}. Received: {len(fresh)}. See: make stack-status"
        )
    new = fresh[0]
    try:
        _wait(lambda: _is_well(project, new), READY_SECONDS, f"{new.name} to become healthy")
        address = service_address(new, project)
        # A replica without a model is well, but gets requests only while none has one.
        _wait(lambda: _gets_requests(door, address), READY_SECONDS, f"nginx to send requests to {new.name} ({address})")
    except ServiceError as err:
        log = engine.last_lines(new)
        engine.docker("rm", "--force", new.id)
        with contextlib.suppress(ServiceError):  # Why nginx refuses is `err` already; it looks again by itself.
            _upstream(door, "update")
        raise ServiceError(f"{err} It is removed again; the others go on. The end of its log:\n{log}") from err
    say(f"  {new.name} is ready and gets requests")
    address = service_address(old, project)
    try:
        drained = _upstream(door, "drain", address)
    except ServiceError as err:
        raise ServiceError(
            f"Expected nginx to send {old.name} nothing more. Received: {err} Both it and {new.name} go on. "
            "Mend what nginx names, then: make stack-up"
        ) from err
    say(f"  {old.name} gets no more: {drained}")
    engine.docker("stop", "--time", "45", old.id, seconds=90)
    engine.docker("rm", old.id)
    _upstream(door, "undrain", address)
    say(f"  {old.name} has ended")


def service_address(container: Container, project: str) -> str:
    """Returns the address at which nginx reaches a container."""
    networks = json.loads(engine.docker("inspect", "--format", "{{json .NetworkSettings.Networks}}", container.id))
    return str(networks[f"{project}_service"]["IPAddress"])


def _is_well(project: str, container: Container) -> bool:
    for now in engine.containers(project, "service"):
        if now.id == container.id:
            if now.is_lost:
                raise ServiceError(f"Expected {now.name} to become healthy. Received: {now.status}.")
            return now.is_well
    raise ServiceError(f"Expected {container.name} to become healthy. Received: it is gone.")


def _gets_requests(door: Container, address: str) -> bool:
    _upstream(door, "update")
    return address in _upstream(door, "list").split()


def _upstream(door: Container, *arguments: str) -> str:
    return engine.docker("exec", door.id, _UPSTREAM, *arguments, seconds=180)


def _wait(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise ServiceError(f"Waited {seconds:.0f} s for {what}.")
        time.sleep(_LOOK_SECONDS)
