from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from cv_platform.drift.power_plot import save_power
from cv_platform.records import DetectionRate


def rate(shift: str, images: int, share: float, low: float, high: float) -> DetectionRate:
    facts = {"shift": shift, "strength": "a <bit>", "windows": 20, "independent": 20}
    return DetectionRate.model_validate({**facts, "images": images, "rate": share, "low": low, "high": high})


@pytest.mark.parametrize(
    ("detection", "lines"),
    [
        ([], 0),
        # An interval that misses its rate by rounding is drawn, too.
        ([rate("none", 10, 0.0, 1e-17, 0.1), rate("none", 50, 0.05, 0.01, 0.2), rate("blur", 10, 1.0, 0.8, 0.999)], 2),
    ],
)
def test_the_picture_has_a_line_with_intervals_for_each_shift(
    tmp_path: Path, detection: list[DetectionRate], lines: int
) -> None:
    save_power(tmp_path / "plot.svg", detection, 0.05)
    text = (tmp_path / "plot.svg").read_text()
    found = [element.get("id", "") for element in ElementTree.fromstring(text).iter()]  # noqa: S314: our own file
    assert sum(name.startswith("LineCollection_") for name in found) == 2 * lines, "and in the legend"
    assert len(text) < 100_000
    assert [path.name for path in tmp_path.iterdir()] == ["plot.svg"]
