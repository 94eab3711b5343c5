"""The pages that reports are: one file each, which needs no network, and most no script. Templates in Jinja2.

`base.html` is every page's frame and style, `parts.html` what several have; what a page says is its domain's template,
such as `validation/report.html`. Values are escaped unless a template says otherwise. https://jinja.palletsprojects.com
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from pathlib import Path
from typing import Any

import cv2
import jinja2

from cv_platform import images
from cv_platform.errors import ImageError


def render(template: str, **values: Any) -> str:
    """Returns a page.

    Args:
        template: path below `cv_platform/`.
        values: what the template names; `title` among them. One that is missing is an error.
    """
    return _environment().get_template(template).render(values)


def sealed(page: str) -> str:
    """Returns a page whose browser runs and loads what is written in it, and nothing else.

    Its Content-Security-Policy names the style and the script by their hashes, so that a name from the dataset cannot
    become a script even if a template forgets to escape it. https://www.w3.org/TR/CSP3/
    """
    sources = {
        kind: " ".join(f"'sha256-{_digest(text)}'" for text in re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.DOTALL))
        for kind in ("script", "style")
    }
    policy = "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'"
    policy += "".join(f"; {kind}-src {source}" for kind, source in sources.items() if source)
    return page.replace("<title>", f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<title>', 1)


def thumbnail(path: Path, side_px: int, sample_bits: int | None = None) -> str | None:
    """Returns an image as the address of a JPEG of at most `side_px`, for a page; None: it does not decode.

    `sample_bits` is what `images.Preprocessing` says of it.
    """
    try:
        return picture(path.read_bytes(), side_px, sample_bits)
    except OSError:
        return None


def picture(content: bytes, side_px: int, sample_bits: int | None = None) -> str | None:
    """Returns an image's bytes as `thumbnail` does."""
    made = images.Preprocessing(sample_bits=sample_bits)
    try:
        image = images.decode(content, max_pixels=images.MAX_LOCAL_PIXELS, preprocessing=made)
    except ImageError:
        return None
    height, width = image.shape[:2]
    scale = min(1.0, side_px / max(height, width))
    small = images.resize(image, (max(1, round(height * scale)), max(1, round(width * scale))))
    encoded, jpeg = cv2.imencode(".jpg", small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])
    assert encoded
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg.tobytes()).decode()}"


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


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
