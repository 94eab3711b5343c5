"""The Python client on an app in this process."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

from cv_platform.client import Client
from cv_platform.serving.app import create_app
from cv_platform.serving.routes.parts import WorkerParts


class AppTransport(httpx.BaseTransport):
    """Hands each request to an ASGI app in an event loop of its own."""

    def __init__(self, app: Any) -> None:
        self._app = app

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self._app, raise_app_exceptions=False)
            response = await transport.handle_async_request(
                httpx.Request(request.method, request.url, headers=request.headers, content=request.read())
            )
            return httpx.Response(response.status_code, headers=response.headers, content=await response.aread())

        return asyncio.run(send())


def client_of(worker: WorkerParts, **options: Any) -> Client:
    return Client("http://service", transport=AppTransport(create_app(worker)), **options)
