"""The drift report as one HTML file: no script, no request to anywhere, images inside."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from string import Template

import cv2
import numpy as np

from cv_platform.errors import ImageError
from cv_platform.images import decode
from cv_platform.monitoring.sentences import stream_note
from cv_platform.records import DriftReport

_THUMBNAIL_PX = 160
_DETECTOR_TITLES = {
    "bbsd_ks": "Class probabilities (KS per class)",
    "properties_ks": "Pixel statistics (KS per statistic)",
    "features_mmd": "Penultimate features (MMD)",
    "uae_mmd": "Untrained embedding (MMD)",
}
_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --bad: #c2410c; --good: #15803d; --none: #6b7280; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.verdict { display: inline-block; color: #fff; border-radius: .4rem; padding: .2rem .8rem; font-weight: 600; }
.drift { background: var(--bad); } .no-drift { background: var(--good); }
.insufficient-data { background: var(--none); }
table { border-collapse: collapse; width: 100%; } th, td { text-align: left; padding: .3rem .6rem; }
th, td { border-bottom: 1px solid var(--line); } td.number, th.number { text-align: right; }
td.number { font-variant-numeric: tabular-nums; }
tr.fired td { color: var(--bad); font-weight: 600; } .faded { opacity: .5; }
.bar { display: inline-block; height: .6rem; background: currentColor; opacity: .6; vertical-align: middle; }
.images { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: 1rem; }
figure { margin: 0; background: var(--soft); border-radius: .4rem; padding: .5rem; overflow-wrap: anywhere; }
figure img { width: 100%; image-rendering: pixelated; } figcaption { font-size: .8rem; }
.note { color: var(--none); }
</style>
</head>
<body>
$body
</body>
</html>
""")


def thumbnails(uploads: Mapping[str, bytes]) -> tuple[dict[str, str], list[str]]:
    """Shrinks uploads for the page.

    Returns:
        A data URL (JPEG) by sha256, and a sentence for each upload that does not decode.
    """
    pictures: dict[str, str] = {}
    problems: list[str] = []
    for sha256, content in uploads.items():
        try:
            image = decode(content)
        except ImageError as err:
            problems.append(f"Image {sha256[:12]} cannot be shown: {err}")
            continue
        height, width = image.shape[:2]
        scale = _THUMBNAIL_PX / max(height, width)
        if scale < 1:
            size = (max(1, round(width * scale)), max(1, round(height * scale)))
            image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        _, jpeg = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 85])
        pictures[sha256] = f"data:image/jpeg;base64,{base64.b64encode(np.asarray(jpeg).tobytes()).decode()}"
    return pictures, problems


def render_page(report: DriftReport, pictures: Mapping[str, str]) -> str:
    """Returns the report as HTML.

    Args:
        report: the report.
        pictures: data URL by sha256, for those of its top images that were kept.
    """
    parts = [_head(report), _detectors(report), _properties(report), _classes(report), _images(report, pictures)]
    parts += [_accuracy(report), _problems(report)]
    title = escape(f"{report.experiment}: {report.verdict}")
    return _PAGE.substitute(title=title, body="\n".join(part for part in parts if part))


def _head(report: DriftReport) -> str:
    facts = [
        f"Model {escape(report.model.model_name)}, version {escape(report.model.version)}.",
        f"Requests from {report.window_start_utc:%Y-%m-%d %H:%M:%S} (inclusive) "
        f"until {report.window_end_utc:%Y-%m-%d %H:%M:%S} (exclusive), UTC: "
        f"{report.requests}, of which {report.rows} were judged against {report.reference_rows} held-out images.",
    ]
    if report.verdict == "insufficient data":
        facts.append(f"A verdict needs at least {report.min_samples} usable requests.")
    if report.stream is not None:
        facts.append(escape(stream_note(report)))
    return (
        f"<h1>{escape(report.experiment)}: drift report</h1>"
        f'<p><span class="verdict {report.verdict.replace(" ", "-")}">{escape(report.verdict)}</span></p>'
        f"<p>{'<br>'.join(facts)}</p>"
    )


def _detectors(report: DriftReport) -> str:
    if not report.adjusted_p_values:
        return ""
    effects = report.effects
    standardised = effects.mmd_standardised if effects else {}
    largest = {"bbsd_ks": effects.bbsd, "properties_ks": effects.properties} if effects else {}
    rows = []
    for name, adjusted in report.adjusted_p_values.items():
        if name in largest:
            effect = f"KS distance {largest[name].ks_distance:.3f} in {largest[name].dimension}"
        elif effects is not None and name in effects.mmd:
            effect = f"MMD {effects.mmd[name]:.3f}, {standardised[name]:+.1f} standard deviations of its null"
        else:
            effect = f"{report.statistics[name]:.3f}"
        cells = [_DETECTOR_TITLES.get(name, name), f"{report.p_values[name]:.3g}", f"{adjusted:.3g}", effect]
        rows.append((cells, name in report.drifted_detectors))
    note = (
        f"One family-wise test: drift when an adjusted p-value is at most {report.alpha:g}. "
        "Holm's correction over the detectors, Bonferroni's within each KS family."
    )
    head = ("Detector", "p", "adjusted p", "Effect")
    return f'<h2>Tests</h2>{_table(head, rows, numbers={1, 2})}<p class="note">{note}</p>'


def _properties(report: DriftReport) -> str:
    if report.effects is None:
        return ""
    rows = []
    for shift in report.effects.property_shifts:
        moved = "reference is constant" if shift.shift_sds is None else f"{shift.shift_sds:+.2f}"
        spread = "reference is constant" if shift.spread_ratio is None else f"{shift.spread_ratio:.2f}"
        means = [f"{shift.reference_mean:.4g}", f"{shift.current_mean:.4g}"]
        rows.append(([shift.name, *means, moved, spread, f"{shift.ks_distance:.3f}"], False))
    head = ("Statistic", "Reference mean", "Current mean", "Shift (reference SDs)", "Spread ratio", "KS distance")
    return f"<h2>Pixel statistics</h2>{_table(head, rows, numbers={1, 2, 3, 4, 5})}"


def _classes(report: DriftReport) -> str:
    if not report.classes:
        return ""
    rows = []
    for movement in report.classes:
        shares = (_bar(movement.reference_share), _bar(movement.current_share))
        cells = [movement.class_name, f"{movement.ks_distance:.3f}", *shares, f"{movement.adjusted_p_value:.3g}"]
        rows.append((cells, movement.has_moved))
    head = ("Class", "KS distance", "Share in reference", "Share now", "adjusted p")
    note = (
        "Coloured: moved, by its probability or by its share of the predictions (Holm over both tests of all classes)."
    )
    if report.moved_classes and report.verdict == "no drift":
        note += (
            " The verdict, no drift, decides: it corrects for all detectors together, this table for its classes alone."
        )
    return f'<h2>Classes</h2>{_table(head, rows, numbers={1, 4}, markup={2, 3})}<p class="note">{note}</p>'


def _images(report: DriftReport, pictures: Mapping[str, str]) -> str:
    if not report.top_images:
        return ""
    figures = []
    for row in report.top_images:
        picture = pictures.get(row["image_sha256"] or "")
        shown = f'<img src="{picture}" alt="">' if picture else '<p class="note">upload not kept</p>'
        figures.append(
            f"<figure>{shown}<figcaption>{escape(str(row['predicted_class']))}, score {row['score']:.2f}<br>"
            f"<span class='note'>{escape(row['prediction_id'])}</span></figcaption></figure>"
        )
    title = "Images that drive the difference" if report.verdict == "drift" else "Most unusual images"
    note = "Ranked by the MMD witness function over features, untrained embedding and pixel statistics."
    return f'<h2>{title}</h2><div class="images">{"".join(figures)}</div><p class="note">{note}</p>'


def _accuracy(report: DriftReport) -> str:
    parts = []
    if report.feedback_accuracy is not None:
        parts.append(
            f"<p>Measured on {report.feedback_rows} requests with feedback: {report.feedback_accuracy:.3f}.</p>"
        )
    estimate = report.accuracy_estimate
    if estimate is not None:
        rows = [
            (["Difference of confidences (DoC)", f"{estimate.difference_of_confidences:.3f}"], False),
            (["Thresholded confidence (ATC)", f"{estimate.thresholded_confidence:.3f}"], False),
            (["Average confidence", f"{estimate.average_confidence:.3f}"], False),
        ]
        reliability = (
            "Estimated without labels, from the model's confidence."
            if estimate.is_reliable
            else "Not reliable: drift breaks the calibration that these estimates rest on."
        )
        faded = "" if estimate.is_reliable else ' class="faded"'
        if report.feedback_accuracy is not None:
            reliability += (
                " It may differ from the feedback's: people comment on mistakes more often than on hits, and a change "
                "of what the classes look like shows in feedback alone."
            )
        parts.append(f"<p>Measured on the labelled reference: {estimate.reference_accuracy:.3f}. {reliability}</p>")
        parts.append(f"<div{faded}>{_table(('Estimate', 'Accuracy'), rows, numbers={1})}</div>")
    return f"<h2>Accuracy</h2>{''.join(parts)}" if parts else ""


def _problems(report: DriftReport) -> str:
    items = "".join(f"<li>{escape(problem)}</li>" for problem in report.problems)
    return f"<h2>Notes</h2><ul>{items}</ul>" if items else ""


def _bar(share: float) -> str:
    return f'<span class="bar" style="width:{share * 8:.2f}rem"></span> {share:.1%}'


def _table(
    head: Sequence[str],
    rows: Iterable[tuple[Sequence[str], bool]],
    *,
    numbers: set[int],
    markup: frozenset[int] | set[int] = frozenset(),
) -> str:
    """Returns a table; `numbers` are right-aligned columns, `markup` columns that are HTML already."""

    def cell(tag: str, column: int, value: str) -> str:
        opening = f'{tag} class="number"' if column in numbers else tag
        content = value if tag == "td" and column in markup else escape(value)
        return f"<{opening}>{content}</{tag}>"

    header = "".join(cell("th", column, value) for column, value in enumerate(head))
    body: list[str] = []
    for values, fired in rows:
        opening = 'tr class="fired"' if fired else "tr"
        body.append(f"<{opening}>{''.join(cell('td', column, value) for column, value in enumerate(values))}</tr>")
    return f"<table><thead><tr>{header}</tr></thead><tbody>{''.join(body)}</tbody></table>"
