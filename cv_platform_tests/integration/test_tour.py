"""notebooks/tour.ipynb, executed as a new user would: on what `make demo` left, under `make up`.

It adds requests and reports to the installation of test_demo, which counts them: that module comes first, by its name.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from sqlalchemy import Row, text

from cv_platform.database.address import running_database_url
from cv_platform.database.connection import make_engine
from cv_platform.records import TrainedModel
from cv_platform_tests.support.demo_run import REPOSITORY, Demo, Stack

TEST_IMAGES = 359
pytestmark = [pytest.mark.whole, pytest.mark.xdist_group("demo"), pytest.mark.timeout(1200)]


@dataclass(frozen=True)
class Tour:
    """The executed notebook, and the installation that it ran against."""

    notebook: nbformat.NotebookNode
    demo: Demo
    model_version_before: str
    began_utc: datetime

    def output(self, cell_id: str) -> str:
        """Returns the text below a cell."""
        outputs = next(cell for cell in self.notebook.cells if cell.id == cell_id).outputs
        return "\n".join(output["text"] if "text" in output else output["data"]["text/plain"] for output in outputs)

    def media_types(self, cell_id: str) -> set[str]:
        outputs = next(cell for cell in self.notebook.cells if cell.id == cell_id).outputs
        return {media_type for output in outputs for media_type in output.get("data", {})}

    def rows(self, statement: str, **values: Any) -> list[Row[Any]]:
        url = running_database_url(self.demo.settings)
        assert url is not None
        engine = make_engine(url)
        try:
            with engine.connect() as connection:
                return list(connection.execute(text(statement), values))
        finally:
            engine.dispose()


@pytest.fixture(scope="module")
def tour(demo: Demo, stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Tour:
    jupyter = {
        "IPYTHONDIR": str(tmp_path_factory.mktemp("ipython")),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }
    began, version = datetime.now(UTC), demo.record(TrainedModel).model.version
    path = REPOSITORY / "notebooks" / "tour.ipynb"
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    )
    ours = {name: value for name, value in stack.variables.items() if name.startswith("CV_")}
    client.execute(env={**os.environ, **ours, **jupyter})
    return Tour(notebook, demo, version, began)


def test_every_cell_runs_and_none_raises(tour: Tour) -> None:
    code = [cell for cell in tour.notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    raised = [cell.id for cell in code for output in cell.outputs if output.output_type == "error"]
    assert raised == []


def test_it_reports_both_mistakes_of_a_config(tour: Tour) -> None:
    assert "2 mistake(s)" in tour.output("mistake")
    assert "train.epoch: unknown key" in tour.output("mistake")
    assert "train.init_lr: " in tour.output("mistake")


def test_it_shows_what_is_there_and_trains_nothing(tour: Tour) -> None:
    assert tour.model_version_before in tour.output("production")
    assert tour.demo.record(TrainedModel).model.version == tour.model_version_before
    assert "1797" in tour.output("dataset")
    assert tour.model_version_before in tour.output("evaluation")


def test_predictions_come_with_their_heat_maps(tour: Tour) -> None:
    assert "image/png" in tour.media_types("predictions")
    assert tour.output("feedback") == "10"
    (said,) = tour.rows("SELECT count(*) FROM feedback WHERE created_on >= :began", began=tour.began_utc)
    assert tuple(said) == (10,)


def test_every_prediction_is_in_the_request_log(tour: Tour) -> None:
    (sent,) = tour.rows("SELECT count(*) FROM predictions WHERE created_on >= :began", began=tour.began_utc)
    assert tuple(sent) == (10 + 2 * TEST_IMAGES,)


def test_drift_is_seen_on_the_shifted_images_only(tour: Tour) -> None:
    reports = tour.rows(
        "SELECT rows, verdict FROM drift_reports WHERE window_start_utc >= :began ORDER BY window_start_utc",
        began=tour.began_utc,
    )
    assert [tuple(report) for report in reports] == [(TEST_IMAGES, "no drift"), (TEST_IMAGES, "drift")]
    (verdicts,) = [line for line in tour.output("windows").splitlines() if line.startswith("verdict")]
    assert verdicts.split(maxsplit=1)[1].split("  ")[0] == "no drift"
    assert verdicts.endswith(" drift")
    assert "image/png" in tour.media_types("top-images")
