"""What people look at: the page, the labelling, the description of the API, and their files; nothing from elsewhere.

`templates/frame.html` is the frame of all three: header, notice, dialog for the key.

The description is rendered by `page/docs.js`. Swagger UI (5.12, as BentoML carries it) works under the same policy, but
dozens of its texts are harder to read than WCAG allows and its pictures have no names
(`test_the_description_of_the_api_is_rendered_readably`); it knows no dark scheme either.
"""

from __future__ import annotations

import functools
from pathlib import Path

import jinja2
from fastapi import APIRouter
from starlette.responses import HTMLResponse, Response
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from cv_platform.serving.http.problems import method_not_allowed
from cv_platform.serving.http.security import PAGE_PERMISSIONS, PAGE_POLICY

_READ = ("GET", "HEAD")
PAGE = Path(__file__).parents[1] / "page"
TEMPLATES = Path(__file__).parents[1] / "templates"
# Browsers ask each time whether a file has changed, so that a new release is seen at once.
_HEADERS = {"Content-Security-Policy": PAGE_POLICY, "Cache-Control": "no-cache"}


class _PageFiles(StaticFiles):
    """The page's files, each with the page's headers."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        if scope["method"] not in _READ:
            raise method_not_allowed(f"/page/{ascii(path)[1:-1][:200]}", scope["method"], _READ)
        response = await super().get_response(path, scope)
        response.headers.update(_HEADERS)
        return response


router = APIRouter(include_in_schema=False)
files = Mount("/page", _PageFiles(directory=PAGE, check_dir=False), name="page")
"""Styles, scripts, icon."""


@router.get("/")
def page() -> Response:
    """Returns the page."""
    return _page("index", {"Permissions-Policy": PAGE_PERMISSIONS})


@router.get("/labelling")
def labelling() -> Response:
    """Returns the page where people say what images show."""
    return _page("labelling")


@router.get("/docs")
def docs() -> Response:
    """Returns the description of the API."""
    return _page("docs")


def _page(name: str, headers: dict[str, str] | None = None) -> Response:
    return HTMLResponse(_rendered(name), headers={**_HEADERS, **(headers or {})})


@functools.cache
def _rendered(name: str) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(f"{name}.html").render()
