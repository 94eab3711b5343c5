"""What evaluation hands on, and its page: one file with the pictures inside, which needs no network and no script."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from cv_platform.errors import VerdictError


class Evaluation(BaseModel):
    """How a model does on the test split, and whether it may be promoted."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model_name: str
    version: str
    passed: bool = Field(description="the promotion gate's verdict")
    reasons: tuple[str, ...] = Field(description="what failed; when nothing did, what was satisfied")
    metrics: dict[str, float] = Field(
        description="see compute_metrics; and `images`, `temperature`, `ece_uncalibrated`"
    )
    per_class: list[dict[str, Any]] = Field(description="per class: class, precision, recall, f1, auc, support")
    confusion: list[list[int]] = Field(description="see metrics.confusion_matrix")
    predictions_path: Path = Field(
        description="parquet: path, sha256, label, predicted_class, correct, confidence, probabilities"
    )
    plots: dict[str, Path] = Field(description="PNG files by name")
    report_path: Path
    mlflow_run_id: str | None


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #1c2330; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; }
th, td { text-align: left; padding: .35rem .8rem; border-bottom: 1px solid #d9dee7; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.passed { color: #176b36; } .failed { color: #a3141f; }
.verdict { font-size: 1.3rem; font-weight: 600; }
figure { margin: 0 0 1.5rem; } img { max-width: 100%; }
"""


def render_report(
    *,
    title: str,
    facts: Sequence[tuple[str, str]],
    passed: bool,
    reasons: Sequence[str],
    metrics: Mapping[str, float],
    per_class: Sequence[Mapping[str, Any]],
    plots: Mapping[str, Path],
) -> str:
    """Renders the page; every text is escaped, and the PNG files of `plots` are read into it."""
    columns = ("precision", "recall", "f1", "auc", "support")
    verdict = "Passed" if passed else "Failed"
    lines = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>",
        f"<p class='verdict {verdict.lower()}'>{verdict} the promotion gate</p>",
        "<ul>" + "".join(f"<li>{html.escape(reason)}</li>" for reason in reasons) + "</ul>",
        "<table>"
        + "".join(f"<tr><th>{html.escape(n)}</th><td>{html.escape(v)}</td></tr>" for n, v in facts)
        + "</table>",
        "<h2>Metrics</h2><table>",
        *(
            f"<tr><th>{html.escape(name)}</th><td class='number'>{_cell(value, name)}</td></tr>"
            for name, value in metrics.items()
        ),
        "</table><h2>Classes</h2><table>",
        "<tr><th>class</th>" + "".join(f"<th>{column}</th>" for column in columns) + "</tr>",
    ]
    for row in per_class:
        cells = "".join(f"<td class='number'>{_cell(row[column], column)}</td>" for column in columns)
        lines.append(f"<tr><th>{html.escape(str(row['class']))}</th>{cells}</tr>")
    lines.append("</table><h2>Plots</h2>")
    for name, path in plots.items():
        picture = base64.b64encode(path.read_bytes()).decode()
        words = html.escape(name.replace("_", " "))
        lines.append(f"<figure><img alt='{words}' src='data:image/png;base64,{picture}'>")
        lines.append(f"<figcaption>{words}</figcaption></figure>")
    lines.append("</body></html>")
    return "\n".join(lines)


def _cell(value: float | None, column: str) -> str:
    if value is None:
        return "–"
    return f"{value:.0f}" if column in {"support", "images"} else f"{value:.4f}"


def require_promotion(evaluation: Evaluation, *, version: str) -> None:
    """Refuses to go on without a passed evaluation of this very model version; in later runs too.

    Raises:
        VerdictError: the latest evaluation is of another version, or it failed.
    """
    if evaluation.version != version:
        raise VerdictError(
            f"Expected an evaluation of {evaluation.model_name} {version}. Received: one of {evaluation.version}. "
            "Materialise evaluation, then this asset."
        )
    if not evaluation.passed:
        raise VerdictError(
            f"Expected a model that passes its promotion gate. Received: {evaluation.model_name} {version}: "
            f"{'; '.join(evaluation.reasons)}. Train a better model, or change the limits in `evaluate`."
        )
