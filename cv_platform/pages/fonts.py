"""Finds fonts of this machine that can write a text: those that come along have no Chinese, Japanese or Korean.

For what is drawn into pictures; pages leave it to the browser.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import groupby

logger = logging.getLogger(__name__)

PACKAGE = "fonts-droid-fallback"
"""Of Debian and Ubuntu, 2 MB to load: Chinese, Japanese and Korean in one font."""

_told: set[int] = set()
"""Letters that no font has, as it was said: each text of a picture asks anew."""


@cache
def fonts_for(letters: frozenset[str]) -> tuple[str, ...]:
    """Returns the files of the fonts that together write `letters`, Matplotlib's own first.

    What no font of this machine can write is told once, with what to install.
    """
    from matplotlib import font_manager

    chosen = [str(font_manager.findfont("DejaVu Sans"))]
    missing = {ord(letter) for letter in letters if letter.isprintable()} - _code_points(chosen[0])
    # Not from Matplotlib's list: it is kept in a cache, which knows nothing of fonts that were installed later.
    others = sorted(font_manager.findSystemFonts(), key=lambda path: ("regular" not in path.lower(), path))
    while missing and others:
        best = max(others, key=lambda path: len(missing & _code_points(path)))
        if not missing & _code_points(best):
            break
        chosen.append(best)
        missing -= _code_points(best)
    if missing - _told:
        _told.update(missing)
        logger.warning(
            "Expected a font with the letters %s. Received: none of this machine has them, so pictures show boxes "
            "in their place. Install one, such as the package %s of Debian and Ubuntu.",
            "".join(map(chr, sorted(missing)[:20])),
            PACKAGE,
        )
    return tuple(chosen)


def matplotlib_families(texts: Iterable[str]) -> list[str]:
    """Makes the fonts that write `texts` known to Matplotlib, and returns them as its families, in order."""
    from matplotlib import font_manager

    fonts = fonts_for(frozenset("".join(texts)))
    known = {entry.name for entry in font_manager.fontManager.ttflist}
    # By their files, since several of one family may have different letters.
    entries = [font_manager.FontEntry(fname=font, name=font) for font in fonts if font not in known]
    font_manager.fontManager.ttflist.extend(entries)
    return list(fonts)


def by_font(text: str) -> Iterator[tuple[str, str]]:
    """Cuts a text into runs that one font writes: yields each with the font's file."""
    fonts = fonts_for(frozenset(text))
    for font, run in groupby(text, lambda letter: next((f for f in fonts if ord(letter) in _code_points(f)), fonts[0])):
        yield "".join(run), font


@cache
def _code_points(path: str) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError, ValueError):  # Not a font, or one of a kind that FreeType does not know.
        return frozenset()
