"""Where our app and BentoML's meet: ours has the first say, and BentoML's routes are behind it.

BentoML's first process has the middleware too, and serves nothing: so this module imports no web framework.
https://docs.bentoml.com/en/latest/build-with-bentoml/asgi.html
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_KEY = "cv_platform.bentoml"
_DOCUMENTS = frozenset({"/schema.json", "/docs.json"})
"""What BentoML would make anew for each request, for as long as several predictions take; it does not change."""


class AnswerFirst:
    """ASGI middleware of BentoML's app: hands each request to ours, which may give it back to `bentomls`.

    What goes to BentoML at once is the lifespan, in which the worker is opened and closed.

    Args:
        app: BentoML's, without the middleware around this one.
        ours: returns what answers, which is there from the end of BentoML's start on.
    """

    def __init__(self, app: ASGIApp, *, ours: Callable[[], ASGIApp]) -> None:
        self.app = app
        self.ours = ours
        self.documents: dict[str, list[Message]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope[_KEY] = self, scope["app"]  # Our app sets itself there, as each of Starlette's does.
        await self.ours()(scope, receive, send)


def bentomls(scope: Scope) -> ASGIApp | None:
    """Returns what answers a request by one of BentoML's own routes; None where none takes it.

    Neither its mounted apps are asked, which are ours and BentoML's page, nor does it redirect.
    """
    if _KEY not in scope:
        return None
    middleware, outer = scope[_KEY]
    taking = (route for route in outer.routes if _takes(route, scope))
    route = next(taking, None)
    if route is None:
        return None

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        scope.update(app=outer, route=route)
        made: list[Message] = []

        async def kept(message: Message) -> None:
            made.append(message)

        if route.path not in _DOCUMENTS:
            await middleware.app(scope, receive, send)
            return
        answered = middleware.documents.get(route.path, made)
        if answered is made:
            await middleware.app(scope, receive, kept)
            if made[0]["status"] == 200:
                middleware.documents[route.path] = made
        for message in answered:
            await send({**message, "headers": [*message["headers"]]} if "headers" in message else message)

    return answer


def _takes(route: Any, scope: Scope) -> bool:
    from starlette.routing import Match, Route

    return isinstance(route, Route) and route.matches(scope)[0] is Match.FULL
