"""The platform's own figures in Evidently's dashboards: https://docs.evidentlyai.com.

Evidently shows, it never decides: its embedding metrics with their default thresholds fire on most windows without
drift. Each report becomes one run of the experiment's project, at the end of its window. Evidently takes seconds to
import, so that happens inside the functions. Whoever calls must have exported `DO_NOT_TRACK=1`.
"""

# Evidently comes without complete types.
# pyright: basic

from __future__ import annotations

import logging
import types
import uuid
import warnings
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pandas as pd

from cv_platform.client.loopback import direct_transport
from cv_platform.drift.family import DETECTOR_NAMES
from cv_platform.errors import ServiceError
from cv_platform.properties import PROPERTY_NAMES

logger = logging.getLogger(__name__)

FIGURES: dict[str, str] = {
    "CalibratedDrift": "detector",
    "DriftEffect": "detector",
    "PropertyShift": "property_name",
    "PredictedShare": "class_name",
    "EstimatedAccuracy": "estimate",
    "WindowFigure": "figure",
}
"""The custom metrics, and the label by which the series of each are told apart."""
_NAMESPACE = uuid.UUID("6f6c7f4a-3f57-4f0e-9c0a-5a7d8f1f6f0e")
_MAX_ROWS = 5000


class Figure(NamedTuple):
    """One number of a run: which metric, the value of its label, the number."""

    metric: str
    label: str
    value: float


@dataclass(frozen=True)
class EvidentlyRun:
    """What one run of a project shows.

    Attributes:
        experiment: the project's name.
        window_end_utc: the run's time.
        figures: the numbers.
        metadata: texts shown with the run, such as the model's version.
        reference_properties, current_properties: `(N, 7)` float32 for the table of pixel statistics; none, no table.
        alpha: family-wise level of the verdict.
    """

    experiment: str
    window_end_utc: datetime
    figures: Sequence[Figure]
    metadata: Mapping[str, str]
    reference_properties: np.ndarray | None = None
    current_properties: np.ndarray | None = None
    alpha: float = 0.05


def publish_run(target: Path | str, run: EvidentlyRun) -> str:
    """Adds a run to its project, which is made with its dashboard on first use, and returns the run's id.

    Args:
        target: a workspace folder, or the URL of an Evidently server.
        run: what to show.

    Raises:
        ServiceError: the server cannot be reached, or refuses the run.
    """
    with _quiet():
        from evidently.errors import EvidentlyError

        try:
            workspace = _open(target)
            project_id = _project(workspace, run)
            return str(workspace.add_run(project_id, _snapshot(run), include_data=False, name=_name(run)).id)
        except (OSError, ValueError, EvidentlyError) as err:  # requests' errors are OSErrors.
            raise ServiceError(
                f"Expected an Evidently workspace at {target} that takes a run. Received: {err}. "
                "Start Evidently (make up), or unset EVIDENTLY_URL to use a folder."
            ) from err


def delete_run(target: Path | str, experiment: str, run_id: str) -> None:
    """Removes a run from its project; one that has gone is no problem, one that stays is logged.

    Call it when nothing refers to the run any more: it must not fail what has been published in its place.

    Args:
        target: a workspace folder, or the URL of an Evidently server.
        experiment: the project's name.
        run_id: of `publish_run`.
    """
    with _quiet():
        from evidently.errors import EvidentlyError

        try:
            workspace = _open(target)
            for project_id in _projects(workspace, experiment):
                _delete(target, workspace, str(project_id), run_id)
        except (OSError, ValueError, EvidentlyError, httpx.HTTPError) as err:  # requests' errors are OSErrors.
            logger.warning(
                "The earlier run %s of %s stays in Evidently at %s: %s. Delete it on the project's page.",
                run_id,
                experiment,
                target,
                err,
            )


def _delete(target: Path | str, workspace: Any, project_id: str, run_id: str) -> None:
    try:
        workspace.delete_run(project_id, run_id)
    except FileNotFoundError:
        return  # It has gone already.
    except NotImplementedError:  # RemoteWorkspace (0.7.23) has no such call, its server has.
        url = f"{str(target).rstrip('/')}/api/projects/{project_id}/{run_id}"
        with httpx.Client(transport=direct_transport(url), timeout=10.0) as client:
            answer = client.delete(url)
        if answer.status_code != httpx.codes.NOT_FOUND:
            answer.raise_for_status()


def _open(target: Path | str) -> Any:
    from evidently.ui.workspace import RemoteWorkspace, Workspace

    if isinstance(target, str) and target.startswith(("http://", "https://")):
        return RemoteWorkspace(target)
    Path(target).mkdir(parents=True, exist_ok=True)
    return Workspace.create(str(target))


def _project(workspace: Any, run: EvidentlyRun) -> Any:
    """Returns the id of the project of that name; two processes that both find none make the same one."""
    from evidently.sdk.models import ProjectModel

    found = _projects(workspace, run.experiment)
    if found:
        _mend_share_panel(workspace, found[0])
        return found[0]
    model = ProjectModel(
        id=uuid.uuid5(_NAMESPACE, run.experiment), name=run.experiment, description="Drift reports of this experiment."
    )
    project = workspace.add_project(model)
    workspace.save_dashboard(project.id, _dashboard())
    return project.id


def _mend_share_panel(workspace: Any, project_id: Any) -> None:
    """Lets the panel of classes show all classes; it used to know those of the first report alone, or to be missing.

    All other panels stay as somebody may have arranged them.
    """
    dashboard, panel = workspace.get_dashboard(project_id), _share_panel()
    old = [each for each in dashboard.panels if each.title == panel.title]
    if any(not value.metric_labels for each in old for value in each.values):
        return
    gone = {each.id for each in old}
    dashboard.panels = [*(each for each in dashboard.panels if each.id not in gone), panel]
    for tab in dashboard.tabs:
        tab.panels = [each for each in tab.panels if each not in gone]
    for tab in dashboard.tabs[:1]:  # Somebody may have removed it.
        tab.panels.append(panel.id)
    workspace.save_dashboard(project_id, dashboard)


def _projects(workspace: Any, name: str) -> list[Any]:
    # `list_projects` of the server and of the folder agree; `search_project` puts the name into a URL path unescaped.
    return [project.id for project in workspace.list_projects() if project.name == name]


def _snapshot(run: EvidentlyRun) -> Any:
    from evidently import DataDefinition, Dataset, Report
    from evidently.metrics import ValueDrift

    metrics: list[Any] = [_metrics()[f.metric](**{FIGURES[f.metric]: f.label}) for f in run.figures]
    figures = pd.DataFrame(list(run.figures), columns=pd.Index(Figure._fields))
    definition = DataDefinition(numerical_columns=["value"], categorical_columns=["metric", "label"])
    additional: Any = {"figures": Dataset.from_pandas(figures, definition)}
    current, reference = Dataset.from_pandas(figures, definition), None
    if run.reference_properties is not None and run.current_properties is not None:
        properties = DataDefinition(numerical_columns=list(PROPERTY_NAMES))
        current, reference = (
            Dataset.from_pandas(pd.DataFrame(rows[:_MAX_ROWS], columns=pd.Index(PROPERTY_NAMES)), properties)
            for rows in (run.current_properties, run.reference_properties)
        )
        # Of all detectors and properties, so that none is marked in a window whose verdict is "no drift"; by default
        # one window in three without drift would have a marked property.
        threshold = run.alpha / (len(DETECTOR_NAMES) * len(PROPERTY_NAMES))
        metrics += [ValueDrift(column=name, method="ks", threshold=threshold) for name in PROPERTY_NAMES]
    return Report(metrics).run(
        current,
        reference,
        additional_data=additional,
        # Naive UTC: the page's date filter sends times without a zone, and its server cannot compare both kinds.
        timestamp=run.window_end_utc.astimezone(UTC).replace(tzinfo=None),
        metadata=dict(run.metadata),
        tags=[run.metadata["verdict"]] if "verdict" in run.metadata else [],
    )


@cache
def _metrics() -> dict[str, Any]:
    """Makes the custom metrics: a class for each of `FIGURES`, whose number comes from the run's table of figures.

    The number may not be a field: Evidently draws one line per combination of fields.
    """
    from evidently.core.metric_types import SingleValueCalculation, SingleValueMetric

    class CalibratedDrift(SingleValueMetric):
        detector: str

    class DriftEffect(SingleValueMetric):
        detector: str

    class PropertyShift(SingleValueMetric):
        property_name: str

    class PredictedShare(SingleValueMetric):
        class_name: str

    class EstimatedAccuracy(SingleValueMetric):
        estimate: str

    class WindowFigure(SingleValueMetric):
        figure: str

    def display_name(self: Any) -> str:
        name = type(self.metric).__name__
        return f"{_TITLES[name]}: {getattr(self.metric, FIGURES[name])}"

    def calculate(self: Any, context: Any, current_data: Any, reference_data: Any) -> Any:
        name = type(self.metric).__name__
        table = context.additional_data["figures"].as_dataframe()
        rows = table[(table["metric"] == name) & (table["label"] == getattr(self.metric, FIGURES[name]))]
        return self.result(float(rows["value"].iloc[0]))

    body = {"display_name": display_name, "calculate": calculate}
    classes = (CalibratedDrift, DriftEffect, PropertyShift, PredictedShare, EstimatedAccuracy, WindowFigure)
    for metric in classes:
        # Evidently finds a metric's calculation by the parameter of its generic base.
        types.new_class(
            f"{metric.__name__}Calculation", (SingleValueCalculation[metric],), exec_body=lambda ns: ns.update(body)
        )
    return {metric.__name__: metric for metric in classes}


_TITLES = {
    "CalibratedDrift": "Adjusted p-value",
    "DriftEffect": "Effect size",
    "PropertyShift": "Shift in reference standard deviations",
    "PredictedShare": "Share of predictions",
    "EstimatedAccuracy": "Accuracy",
    "WindowFigure": "Window",
}


def _share_panel() -> Any:
    from evidently.sdk.models import PanelMetric
    from evidently.sdk.panels import bar_plot_panel

    return bar_plot_panel(
        title="Share of predictions per class",
        # Without a class of its own it shows whatever classes the runs have, those of later models, too.
        values=[PanelMetric(metric="PredictedShare", metric_labels={}, legend="{{class_name}}")],
        size="half",
        stacked=True,
    )


def _dashboard() -> Any:
    """Returns the dashboard: one tab, since the server refuses more (Evidently 0.7.23)."""
    from evidently.sdk.models import DashboardModel, DashboardTabModel, PanelMetric
    from evidently.sdk.panels import bar_plot_panel, counter_panel, line_plot_panel

    def series(metric: str, labels: Sequence[str]) -> list[Any]:
        return [PanelMetric(metric=metric, metric_labels={FIGURES[metric]: label}, legend=label) for label in labels]

    panels = [
        # Not the verdict as 0 or 1: the page shows a counter of 0 as "no value" (0.7.23).
        counter_panel(
            title="Smallest adjusted p-value of the last window",
            values=series("WindowFigure", ["smallest adjusted p"]),
            size="half",
        ),
        counter_panel(title="Requests in the last window", values=series("WindowFigure", ["rows"]), size="half"),
        line_plot_panel(
            title="Adjusted p-values",
            description="Of all detectors together; drift from the level down that its report states.",
            values=series("CalibratedDrift", DETECTOR_NAMES),
            size="half",
        ),
        line_plot_panel(
            title="Effect sizes",
            description="Largest KS distance, and MMD: they do not grow with the number of requests.",
            values=series("DriftEffect", DETECTOR_NAMES),
            size="half",
        ),
        line_plot_panel(
            title="Pixel statistics: shift in reference standard deviations",
            values=series("PropertyShift", PROPERTY_NAMES),
            size="half",
        ),
        line_plot_panel(
            title="Accuracy",
            description="Estimates without labels hold only while there is no drift; feedback is measured.",
            values=series("EstimatedAccuracy", ["estimate (DoC)", "estimate (ATC)", "feedback", "reference"]),
            size="half",
        ),
        bar_plot_panel(title="Drift (1: yes)", values=series("WindowFigure", ["drifted"]), size="half"),
        bar_plot_panel(title="Requests per window", values=series("WindowFigure", ["rows"]), size="half"),
        _share_panel(),
    ]
    tab = DashboardTabModel(title="Drift", panels=[panel.id for panel in panels])
    return DashboardModel(tabs=[tab], panels=panels)


def _name(run: EvidentlyRun) -> str:
    return f"{run.metadata.get('verdict', 'report')} until {run.window_end_utc:%Y-%m-%d %H:%M} UTC"


@contextmanager
def _quiet():
    """Silences warnings of Evidently's own modules, which nobody here can act on (0.7.23)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
