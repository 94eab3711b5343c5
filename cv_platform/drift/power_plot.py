"""How often windows are noticed, by their size, as an SVG. Drawn without pyplot, whose state all threads share."""

# Matplotlib comes without complete types.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cv_platform.drift.power import UNCHANGED, WINDOW_SIZES
from cv_platform.files import whole_file
from cv_platform.records import DetectionRate


def save_power(path: Path, detection: Sequence[DetectionRate], alpha: float) -> None:
    """Draws a line for each shift with its 95 % intervals, false alarms dashed; without any rate it says so."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.axhline(alpha, color="0.6", linewidth=0.8, linestyle=":")
    shifts = dict.fromkeys((row.shift, row.strength) for row in detection)
    for number, (shift, strength) in enumerate(shifts):
        rows = [row for row in detection if (row.shift, row.strength) == (shift, strength)]
        rates = [row.rate for row in rows]
        # An interval by Wilson does not always hold a rate of 0 or 1 to the last digit.
        below = [max(0.0, row.rate - row.low) for row in rows]
        above = [max(0.0, row.high - row.rate) for row in rows]
        is_null = shift == UNCHANGED
        axes.errorbar(
            [row.images * 1.02 ** (number - len(shifts) / 2) for row in rows],  # Side by side, not over each other.
            rates,
            yerr=[below, above],
            label="as they are: false alarms" if is_null else f"{shift}, {strength}",
            color="0.4" if is_null else f"C{number}",
            linestyle="--" if is_null else "-",
            marker="o",
            markersize=4,
            capsize=2,
        )
    axes.set_xscale("log")
    axes.set_xticks(WINDOW_SIZES, labels=[str(size) for size in WINDOW_SIZES])
    axes.minorticks_off()
    axes.set_xlim(8, 650)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("images in a window")
    axes.set_ylabel(f"share of windows that are drift, at {alpha:g}")
    if detection:
        figure.legend(loc="outside right center", frameon=False, fontsize="small")
    else:
        axes.text(70, 0.5, "not measured: too few images", ha="center", va="center")
    with whole_file(path, suffix=".svg") as partial:
        figure.savefig(partial, format="svg", metadata={"Date": None})
