"""The pages that reports are: one file each, which needs no network and no script. Templates in Jinja2.

`base.html` is every page's frame and style, `parts.html` what several have; what a page says is its domain's template,
such as `validation/report.html`. Values are escaped unless a template says otherwise. https://jinja.palletsprojects.com
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jinja2


def render(template: str, **values: Any) -> str:
    """Returns a page.

    Args:
        template: path below `cv_platform/`.
        values: what the template names; `title` among them. One that is missing is an error.
    """
    return _environment().get_template(template).render(values)


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parents[1]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = _number
    return environment


def _number(value: float | None, form: str = "{:.4g}") -> str:
    return "–" if value is None else form.format(value)
