"""The page of an evaluation: one file with the pictures inside, which needs no network and no script.

And the guard of those who need an evaluation that passed.
"""

from __future__ import annotations

import base64
import html

from cv_platform.errors import VerdictError
from cv_platform.records import Evaluation, ModelIdentity, Provenance, Task

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #1c2330; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; }
th, td { text-align: left; padding: .35rem .8rem; border-bottom: 1px solid #d9dee7; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.passed { color: #176b36; } .failed { color: #a3141f; }
.verdict { font-size: 1.3rem; font-weight: 600; }
figure { margin: 0 0 1.5rem; } img { max-width: 100%; }
"""


def render_report(evaluation: Evaluation, provenance: Provenance, task: Task) -> str:
    """Renders the page; every text is escaped, and the PNG files of the plots are read into it."""
    title = f"Evaluation of {evaluation.model.model_name}"
    labels = task.classifier_type
    facts = [
        ("version", evaluation.model.version),
        ("dataset", f"{provenance} ({provenance.dvc_md5})"),
        ("test images", f"{evaluation.metrics['images']:.0f}"),
        ("labels", labels if labels == "multi-class" else f"multi-label, threshold {evaluation.threshold}"),
    ]
    columns = ("precision", "recall", "f1", "auc", "support")
    verdict = "Passed" if evaluation.passed else "Failed"
    lines = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>",
        f"<p class='verdict {verdict.lower()}'>{verdict} the promotion gate</p>",
        "<ul>" + "".join(f"<li>{html.escape(reason)}</li>" for reason in evaluation.reasons) + "</ul>",
        "<table>"
        + "".join(f"<tr><th>{html.escape(n)}</th><td>{html.escape(v)}</td></tr>" for n, v in facts)
        + "</table>",
        "<h2>Metrics</h2><table>",
        *(
            f"<tr><th>{html.escape(name)}</th><td class='number'>{_cell(value, name)}</td></tr>"
            for name, value in evaluation.metrics.items()
        ),
        "</table><h2>Classes</h2><table>",
        "<tr><th>class</th>" + "".join(f"<th>{column}</th>" for column in columns) + "</tr>",
    ]
    for row in evaluation.per_class:
        cells = "".join(f"<td class='number'>{_cell(row[column], column)}</td>" for column in columns)
        lines.append(f"<tr><th>{html.escape(str(row['class']))}</th>{cells}</tr>")
    lines.append("</table><h2>Plots</h2>")
    for name, path in evaluation.plots.items():
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


def require_promotion(evaluation: Evaluation, model: ModelIdentity) -> None:
    """Refuses to go on without a passed evaluation of this very model version; in later runs too.

    Raises:
        VerdictError: the latest evaluation is of another version, or it failed.
    """
    if evaluation.model != model:
        raise VerdictError(
            f"Expected an evaluation of {model}. Received: one of {evaluation.model}. "
            "Materialise evaluation, then this asset."
        )
    if not evaluation.passed:
        raise VerdictError(
            f"Expected a model that passes its promotion gate. Received: {model}: "
            f"{'; '.join(evaluation.reasons)}. Train a better model, or change the limits in `evaluate`."
        )
