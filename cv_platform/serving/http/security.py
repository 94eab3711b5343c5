"""Who may call what, and the headers that every answer carries.

Admin routes need `Authorization: Bearer $CV_ADMIN_TOKEN`; with no token set they are closed. With `CV_API_KEYS` set,
predictions need one of them: as `X-API-Key`, or as a Bearer token, which is what BentoML's clients send. Labels need a
key of CV_LABELLER_KEYS, which says whose they are, or the admin token: as a Bearer token, or as X-API-Key. There are no
cookies, so another site's page has no credentials to abuse; it reads nothing unless its origin is one of
CV_CORS_ORIGINS (`allowed_origins`). It could still send a plain form from a visitor's browser into the request log,
and with it into the drift window: `same_site` refuses what a browser says comes from another site.
https://developer.mozilla.org/en-US/docs/Web/HTTP/Reference/Headers/Sec-Fetch-Site
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Callable, Sequence
from typing import Annotated

from fastapi import Depends, Request
from fastapi.params import Security
from fastapi.security import APIKeyHeader, HTTPBearer
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cv_platform.serving.capacity.rate_limit import client_of_address
from cv_platform.serving.http.request_facts import facts_of
from cv_platform.serving.problem import Problem
from cv_platform.settings import Settings

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods that change nothing (RFC 9110, section 9.2.1)."""

PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Content-Security-Policy of the page: its own files, pictures it was given, nothing else."""
PAGE_PERMISSIONS = "camera=(self), microphone=(), geolocation=()"
"""Permissions-Policy of the page, which may ask its visitor for the camera; every other answer forbids that as well."""
ANSWER_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Cache-Control": "no-store",
}
"""What every answer carries, unless a route has set it otherwise."""
_ENCODED_HEADERS = [(name.lower().encode(), value.encode()) for name, value in ANSWER_HEADERS.items()]
_REQUEST_ID = b"x-request-id"


class RequestEnvelope:
    """ASGI middleware: gives each answer X-Request-Id and the security headers; those that a route has set stay."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = facts_of(scope).request_id

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [pair for pair in message["headers"] if pair[0] != _REQUEST_ID]
                there = {name for name, _ in headers}
                own = [pair for pair in _ENCODED_HEADERS if pair[0] not in there]
                message["headers"] = [*headers, (_REQUEST_ID, request_id.encode()), *own]
            await send(message)

        await self.app(scope, receive, with_headers)


def allowed_origins(origins: Sequence[str]) -> list[Middleware]:
    """Returns what lets the pages of these origins, such as `https://app.example.org`, call and read; [] for none."""
    if not origins:
        return []
    methods, headers = ("GET", "POST"), ("X-API-Key", "Idempotency-Key", "X-Request-Id")
    exposed = ("X-Request-Id", "Retry-After")
    return [
        Middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=methods, allow_headers=headers, expose_headers=exposed
        )
    ]


def same_site(origins: Sequence[str] = ()) -> Callable[[Scope], None]:
    """Returns the check that refuses (403) what changes something and was sent by a page of another site.

    Browsers set Sec-Fetch-Site and Origin, and no page can change them; programs send none, and pass.

    Args:
        origins: whose pages may.
    """

    def check(scope: Scope) -> None:
        headers = Headers(scope=scope)
        # A proxy may join several headers into one.
        sites = {site.strip().lower() for site in ",".join(headers.getlist("sec-fetch-site")).split(",")}
        if scope["method"] not in SAFE_METHODS and "cross-site" in sites and headers.get("origin") not in origins:
            raise Problem(
                403,
                "A page of another site sent this. Use this service's own page, or a program.",
                expected="a request that no other site's page has sent (Sec-Fetch-Site)",
                headers={"Connection": "close"},
            )

    return check


class Guard:
    """Checks the secrets of a request.

    Args:
        settings: `admin_token`, `api_keys`, `labeller_keys` and `trusted_proxies`.
    """

    def __init__(self, settings: Settings) -> None:
        self._admin_token = settings.admin_token.get_secret_value().encode() if settings.admin_token else None
        self._labellers = {
            key.encode(): name
            for name, _, key in (pair.get_secret_value().partition("=") for pair in settings.labeller_keys)
        }
        self._api_keys = tuple(key.get_secret_value().encode() for key in settings.api_keys)
        self._proxies = tuple(ipaddress.ip_network(proxy) for proxy in settings.trusted_proxies)

    def require_api_key(self, request: HTTPConnection) -> None:
        """Lets a request pass when there are no API keys, or when it has one of them.

        Raises:
            Problem: 401.
        """
        if not self.is_open and not self.has_key(request):
            raise Problem(
                401,
                "This service is closed by API keys. Send one of them in the header X-API-Key, or as a Bearer token.",
                expected="the header X-API-Key with a valid key, or Authorization: Bearer followed by one",
                headers={"WWW-Authenticate": 'ApiKey realm="predictions", Bearer realm="predictions"'},
            )

    @property
    def is_open(self) -> bool:
        """Whether predictions need no API key."""
        return not self._api_keys

    def has_key(self, request: HTTPConnection) -> bool:
        """Says whether a request carries one of the API keys; False where there are none."""
        given = _given_key(request)
        # All of them, always: how long it takes says nothing about which one was close.
        matches = [hmac.compare_digest(given, key) for key in self._api_keys]
        return any(matches)

    def client_of(self, request: Request) -> bytes:
        """Returns who a request counts for: the API key that it was let pass with; without keys, its address.

        Behind a reverse proxy the address is the proxy's: X-Forwarded-For is not believed, as anybody may send it.
        """
        if self._api_keys:
            return b"key:" + _given_key(request)
        return client_of_address(request.client.host if request.client else None)

    def name_of(self, request: Request) -> str | None:
        """Returns what the log calls the API key of a request that was let pass: 8 hex digits of its SHA-256.

        They tell keys apart, and do not tell the key. None without keys: no address is kept.
        """
        return hashlib.sha256(_given_key(request)).hexdigest()[:8] if self._api_keys else None

    def network_of(self, request: Request) -> str | None:
        """Returns the network of the client, /24 or /48, as a trusted proxy tells its address; None: none does."""
        if not self._proxies or request.client is None or len(told := request.headers.getlist("x-real-ip")) != 1:
            return None
        try:
            proxy, client = _address(request.client.host), _address(told[0].strip())
        except ValueError:
            return None
        if not any(proxy in network for network in self._proxies):
            return None
        return str(ipaddress.ip_network((client, 24 if client.version == 4 else 48), strict=False))

    def require_labeller(self, request: HTTPConnection) -> str:
        """Returns whose key a request carries; `admin` with the admin token.

        Raises:
            Problem: 401 without a key of a labeller, 403 while there are none and no admin token.
        """
        expected = "a key of CV_LABELLER_KEYS, or the admin token, as X-API-Key or Authorization: Bearer"
        known = dict(self._labellers)
        if self._admin_token is not None:
            known[self._admin_token] = "admin"
        if not known:
            raise Problem(
                403,
                "Labelling is closed. To open it, start the service with CV_LABELLER_KEYS or CV_ADMIN_TOKEN set.",
                expected="a service that is started with CV_LABELLER_KEYS",
            )
        given = _given_key(request)
        matches = [name for key, name in known.items() if hmac.compare_digest(given, key)]
        if not matches:
            raise Problem(
                401,
                "This needs a labeller's key.",
                expected=expected,
                headers={"WWW-Authenticate": 'ApiKey realm="labels", Bearer realm="labels"'},
            )
        return matches[0]

    def is_admin(self, request: Request) -> bool:
        """Says whether a request carries the admin token."""
        try:
            self.require_admin(request)
        except Problem:
            return False
        return True

    def require_admin(self, request: HTTPConnection) -> None:
        """Lets a request pass that carries the admin token.

        Raises:
            Problem: 401 without a token, 403 with a wrong one, 403 while no token is configured.
        """
        if self._admin_token is None:
            raise Problem(
                403,
                "The admin routes are closed. To open them, start the service with CV_ADMIN_TOKEN set.",
                expected="a service that is started with CV_ADMIN_TOKEN",
            )
        token = _bearer_token(request)
        expected = "the header Authorization: Bearer, followed by the value of CV_ADMIN_TOKEN"
        if not token:
            raise Problem(
                401,
                "This is an admin route: it needs the admin token.",
                expected=expected,
                headers={"WWW-Authenticate": 'Bearer realm="admin"'},
            )
        if not hmac.compare_digest(token, self._admin_token):
            raise Problem(403, "That is not the admin token of this service.", expected=expected)


def _given_key(request: HTTPConnection) -> bytes:
    # Not every HTTP parser takes away the white space around a value, which is none of it (RFC 9110, section 5.5).
    key = request.headers.get("x-api-key", "").strip(" \t").encode("latin-1")
    return key or _bearer_token(request)


def _bearer_token(request: HTTPConnection) -> bytes:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip().encode("latin-1") if scheme.lower() == "bearer" else b""


def _guard_of(request: HTTPConnection) -> Guard:
    return request.app.state.guard


class _RequiredApiKey(APIKeyHeader):
    # A coroutine, as FastAPI would hand anything else to a thread and wait for it.
    async def __call__(self, request: HTTPConnection) -> None:
        _guard_of(request).require_api_key(request)


class _RequiredAdminToken(HTTPBearer):
    async def __call__(self, request: HTTPConnection) -> None:
        _guard_of(request).require_admin(request)


API_KEY = Security(
    _RequiredApiKey(
        name="X-API-Key",
        scheme_name="apiKey",
        description="Needed while CV_API_KEYS is set; `Authorization: Bearer` with the key does as well.",
        auto_error=False,
    )
)
"""Dependency of the routes that need an API key while there are any; /docs shows it. The app's state has the guard."""


async def _labeller_of(request: Request) -> str:
    return _guard_of(request).require_labeller(request)


Labeller = Annotated[str, Depends(_labeller_of)]
"""Parameter of the routes that need a labeller: who it is."""
ADMIN = Security(
    _RequiredAdminToken(scheme_name="adminToken", description="The value of CV_ADMIN_TOKEN.", auto_error=False)
)
"""Dependency of the routes that need the admin token."""


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Reads an address; one of IPv4 that comes over IPv6 is one of IPv4."""
    address = ipaddress.ip_address(text.partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address
