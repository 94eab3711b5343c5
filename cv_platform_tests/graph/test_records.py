"""Records between assets, by Dagster itself: two runs of one experiment at once, a retry, and what a record names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pytest

from cv_platform.defs.io_managers import RecordIOManager
from cv_platform.record_store import RecordStore
from cv_platform.records import Evaluation, ModelIdentity, TrainedModel
from cv_platform_tests.support.record_samples import evaluation, identity, trained_model


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CV_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


class Graph:
    """`pets/model` → `pets/evaluation` → `pets/deployment`, whose bodies tests give them.

    Attributes:
        served: the models that the deployment has been made from, in order.
        between: called while the evaluation is being made.
    """

    def __init__(self, home: Path) -> None:
        self.version = "v1"
        self.served: list[ModelIdentity] = []
        self.between: Callable[[], object] = lambda: None

        @dg.asset(key=["pets", "model"])
        def model() -> TrainedModel:
            return trained_model(home / "models" / self.version, model=identity(version=self.version))

        @dg.asset(key=["pets", "evaluation"], deps=[model], ins={})
        def judged() -> Evaluation:
            self.between()
            return evaluation(home / "evaluation")

        @dg.asset(
            key=["pets", "deployment"],
            ins={"trained": dg.AssetIn(key=["pets", "model"]), "judged": dg.AssetIn(key=["pets", "evaluation"])},
        )
        def deployment(trained: TrainedModel, judged: Evaluation) -> TrainedModel:
            self.served.append(trained.model)
            return trained

        self.assets = [model, judged, deployment]

    def run(self, *names: str, version: str | None = None) -> None:
        before, self.version = self.version, version or self.version
        try:
            dg.materialize(
                self.assets,
                resources={"io_manager": RecordIOManager()},
                selection=[dg.AssetKey(["pets", name]) for name in names],
            )
        finally:
            self.version = before


ALL = ("model", "evaluation", "deployment")


def test_a_concurrent_run_swaps_no_record_under_one_that_wrote_its_own(home: Path) -> None:
    graph = Graph(home)
    graph.between = lambda: graph.run("model", version="v2")
    graph.run(*ALL)
    assert [model.version for model in graph.served] == ["v1"]
    assert (latest := RecordStore(home, "pets").latest(TrainedModel)) is not None
    assert latest.model.version == "v2"


def test_a_concurrent_run_swaps_no_record_under_one_that_found_it_there(home: Path) -> None:
    graph = Graph(home)
    graph.run("model", version="v1")

    def both() -> None:
        graph.between = lambda: None
        graph.run(*ALL, version="v2")

    graph.between = both
    graph.run("evaluation", "deployment")
    # The inner run ends first.
    assert [model.version for model in graph.served] == ["v2", "v1"]


def test_a_deployment_names_the_versions_that_it_was_made_from(home: Path) -> None:
    graph = Graph(home)
    graph.run("model", version="v1")
    graph.run("evaluation")
    graph.run("model", version="v2")
    graph.run("deployment")
    store = RecordStore(home, "pets")
    (version,) = (path.stem for path in (store.folder / "deployment").iterdir())
    made_from = store.read("deployment", TrainedModel, version).made_from
    assert made_from.keys() == {"model", "evaluation"}
    assert store.read("model", TrainedModel, made_from["model"]).model.version == "v2"


def test_an_automatic_retry_sees_what_the_first_attempt_saw(home: Path) -> None:
    graph = Graph(home)
    graph.run("model", version="v1")
    graph.run("evaluation")
    job = dg.define_asset_job("serve", selection=[dg.AssetKey(["pets", "deployment"])])
    definitions = dg.Definitions(assets=graph.assets, jobs=[job], resources={"io_manager": RecordIOManager()})
    serve = definitions.resolve_job_def("serve")
    with dg.DagsterInstance.ephemeral() as instance:
        first = serve.execute_in_process(instance=instance)
        graph.run("model", version="v2")
        lineage = {"dagster/parent_run_id": first.run_id, "dagster/root_run_id": first.run_id}
        for tags in ({**lineage, "dagster/retry_number": "1"}, lineage):
            assert serve.execute_in_process(instance=instance, tags=tags).success
    assert [model.version for model in graph.served] == ["v1", "v1", "v2"]


def test_what_was_never_made_is_named(home: Path) -> None:
    with pytest.raises(Exception, match="Expected a materialised pets/"):
        Graph(home).run("deployment")
