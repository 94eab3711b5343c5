"""The page of a validation: our checks as a table, Deepchecks' own pages below. It needs no network and no script."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from cv_platform.records import CheckOutcome

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #1c2330; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .45rem .7rem; border-bottom: 1px solid #d9dee7; }
td.number, td.name, td.name code { font-variant-numeric: tabular-nums; white-space: nowrap; }
.passed { color: #176b36; } .warn { color: #8a5300; } .error { color: #a3141f; }
.verdict { font-size: 1.3rem; font-weight: 600; }
code { overflow-wrap: anywhere; }
iframe { width: 100%; height: 42rem; border: 1px solid #d9dee7; }
"""


def render_report(
    *,
    title: str,
    facts: Sequence[tuple[str, str]],
    passed: bool,
    outcomes: Sequence[CheckOutcome],
    quarantined: Sequence[str],
    deepchecks_pages: Mapping[str, str],
) -> str:
    """Renders the page; every text is escaped.

    Args:
        title: heading.
        facts: `(name, value)` lines under it.
        passed: the verdict.
        outcomes: rows of the table.
        quarantined: paths of unreadable images.
        deepchecks_pages: suite → name of the file beside this page.
    """
    blocking = sum(not o.passed and o.severity == "error" for o in outcomes)
    warnings = sum(not o.passed and o.severity == "warn" for o in outcomes)
    verdict = "Passed" if passed else "Failed: nothing is trained on this version"
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
        f"<p class='verdict {'passed' if passed else 'error'}'>{verdict}</p>",
        f"<p>{len(outcomes)} checks: {blocking} failed as errors, {warnings} as warnings.</p>",
        "<table>",
        *(f"<tr><th>{html.escape(name)}</th><td><code>{html.escape(value)}</code></td></tr>" for name, value in facts),
        "</table><h2>Checks</h2><table>",
        "<tr><th>Result</th><th>Check</th><th>Measured</th><th>Limit</th><th>Finding</th></tr>",
        *(_row(o) for o in outcomes),
        "</table>",
    ]
    if quarantined:
        parts.append(f"<h2>Quarantined images</h2>{_list(quarantined)}")
    for heading, page in deepchecks_pages.items():
        name = html.escape(page, quote=True)
        parts.append(
            f"<h2>Deepchecks: {html.escape(heading)}</h2><p><a href='{name}'>Open it on a page of its own</a></p>"
        )
        # Sandboxed: the frame runs Deepchecks' figures and nothing else.
        parts.append(f"<iframe src='{name}' sandbox='allow-scripts' loading='lazy' title='{name}'></iframe>")
    parts.append("</body></html>")
    return "\n".join(parts)


def _row(outcome: CheckOutcome) -> str:
    css = "passed" if outcome.passed else outcome.severity
    result = "✓ passed" if outcome.passed else {"error": "✗ error", "warn": "! warning"}[outcome.severity]
    offenders = ""
    if outcome.offenders:
        offenders = f"<details><summary>{len(outcome.offenders)} named</summary>{_list(outcome.offenders)}</details>"
    return (
        f"<tr><td class='name {css}'>{result}</td><td class='name'><code>{html.escape(outcome.name)}</code></td>"
        f"<td class='number'>{_number(outcome.value)}</td><td class='number'>{_number(outcome.limit)}</td>"
        f"<td>{html.escape(outcome.summary)}{offenders}</td></tr>"
    )


def _list(texts: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li><code>{html.escape(text)}</code></li>" for text in texts) + "</ul>"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
