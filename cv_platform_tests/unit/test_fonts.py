from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

from cv_platform.evaluation.plots import save_confusion_matrix
from cv_platform.pages import fonts


def make_font(path: Path, letters: str) -> Path:
    """Writes a font whose letters are solid squares, one em wide."""
    pen = TTGlyphPen(None)
    for at, place in enumerate(((0, 0), (0, 900), (900, 900), (900, 0))):
        (pen.lineTo if at else pen.moveTo)(place)
    pen.closePath()
    square = pen.glyph()
    names = [".notdef", *(f"uni{ord(letter):04X}" for letter in letters)]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(letter): name for letter, name in zip(letters, names[1:], strict=True)})
    builder.setupGlyf({name: TTGlyphPen(None).glyph() if name == ".notdef" else square for name in names})
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return path


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """Fonts of a machine: one of Han and kana, one of Hangul, and a file that is none."""
    files = [make_font(tmp_path / "Squares.ttf", "猫犬ネ"), make_font(tmp_path / "Hangul.ttf", "개")]
    files.append(tmp_path / "broken.ttf")
    files[-1].write_bytes(b"no font")
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [str(file) for file in reversed(files)])
    monkeypatch.setattr(fonts, "_told", set())
    fonts.fonts_for.cache_clear()
    yield files
    fonts.fonts_for.cache_clear()


def test_takes_as_few_fonts_as_have_all_letters_the_bundled_one_first(installed: list[Path]) -> None:
    bundled = FT2Font(fonts.fonts_for(frozenset("cat é"))[0]).family_name
    assert bundled == "DejaVu Sans"
    assert len(fonts.fonts_for(frozenset("cat é"))) == 1
    assert [Path(font).stem for font in fonts.fonts_for(frozenset("cat 猫 ネ"))[1:]] == ["Squares"]
    assert [Path(font).stem for font in fonts.fonts_for(frozenset("개 猫 犬"))[1:]] == ["Squares", "Hangul"]


def test_cuts_a_text_where_another_font_begins(installed: list[Path]) -> None:
    runs = [(run, Path(font).stem) for run, font in fonts.by_font("a 猫犬 개.")]
    assert runs == [
        ("a ", "DejaVuSans"),
        ("猫犬", "Squares"),
        (" ", "DejaVuSans"),
        ("개", "Hangul"),
        (".", "DejaVuSans"),
    ]


def test_pictures_show_the_letters(installed: list[Path], tmp_path: Path) -> None:
    # The fonts draw solid squares, where a missing letter would be an empty box: count dark pixels in the labels.
    dark = {}
    for names in (("猫犬", "개개"), ("  ", "  ")):
        save_confusion_matrix(tmp_path / "matrix.png", np.zeros((2, 2), dtype=int), names)
        dark[names] = int((cv2.imread(str(tmp_path / "matrix.png"), cv2.IMREAD_GRAYSCALE) < 30).sum())
    # Ten points at 110 dpi: eight squares of 0.9 em, 14 px.
    assert dark[("猫犬", "개개")] - dark[("  ", "  ")] > 8 * 12 * 12


def test_says_once_which_letters_no_font_has_and_what_to_install(
    installed: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="cv_platform.pages.fonts"):
        for letters in ("猫鸟ぽ", "猫鸟ぽ", "鸟"):  # Each name in a contact sheet, and each plot, asks anew.
            fonts.fonts_for(frozenset(letters))
        assert len(fonts.fonts_for(frozenset("猫鸟ぽ"))) == 2
    (record,) = caplog.records
    assert "the letters ぽ鸟." in record.getMessage()
    assert "fonts-droid-fallback" in record.getMessage()
