"""Which assets Dagster calls stale after an edit, of configs, of code and of data."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from dagster._core.definitions.data_version import CachingStaleStatusResolver, StaleStatus
from dagster._core.loader import LoadingContextForTest

from cv_platform.config import LoopConfig, TuneConfig, load_experiment
from cv_platform.definitions import build_defs
from cv_platform.defs import versions
from cv_platform.defs.branch import Branch
from cv_platform.defs.experiment import experiment_assets
from cv_platform.defs.observed import observation, repository_key
from cv_platform_tests.support.demo_run import REPOSITORY

DIGITS = REPOSITORY / "configs" / "digits.yaml"
GROWN = {"labeling_queue", "labelled_version"}
MONITORING = {"drift_report", "production_metrics", *GROWN}
REPLAYED = {"challenger_replay", "deployment", *MONITORING}
MADE_OF_DETECTORS = {"drift_detectors", "reference_data", "bento", *REPLAYED}
MADE_OF_MODEL = {"model", "evaluation", *MADE_OF_DETECTORS}
ALL = {"dataset", "embeddings", "validation_report", "packed_images", *MADE_OF_MODEL}


class Installation:
    """An instance on which every asset was made once from the config as it is."""

    def __init__(self, instance: dg.DagsterInstance, folder: Path) -> None:
        self.instance, self.folder = instance, folder
        self.content = yaml.safe_load(DIGITS.read_text())
        self.make({})

    def definitions(self, edit: dict[str, Any]) -> dg.Definitions:
        content = yaml.safe_load(yaml.safe_dump(self.content))
        for place, value in edit.items():
            *sections, field = place.split(".")
            section = content
            for name in sections:
                section = section.setdefault(name, {})
            section[field] = value
        path = self.folder / "digits.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return build_defs(path)

    def make(self, edit: dict[str, Any], *names: str, data: str = "the first") -> None:
        """Materialises assets with the versions and edges of ours, and other bodies; all of them by default."""
        graph = self.definitions(edit).resolve_asset_graph()

        def stand_in(key: dg.AssetKey) -> dg.AssetsDefinition:
            node = graph.get(key)

            @dg.asset(key=key, deps=list(node.parent_keys), code_version=node.code_version)
            def body() -> dg.MaterializeResult:
                return dg.MaterializeResult(data_version=dg.DataVersion(data))

            return body

        assets = [stand_in(key) for key in graph.get_all_asset_keys() if not graph.get(key).is_external]
        selection = [dg.AssetKey(["digits", name]) for name in names or ALL]
        assert dg.materialize(assets, instance=self.instance, selection=selection).success

    def stale(self, edit: dict[str, Any]) -> set[str]:
        graph = self.definitions(edit).resolve_asset_graph()
        resolver = CachingStaleStatusResolver(self.instance, graph, LoadingContextForTest(self.instance))
        keys = graph.get_all_asset_keys()
        return {key.path[-1] for key in keys if resolver.get_status(key) is StaleStatus.STALE}


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield Installation(instance, tmp_path_factory.mktemp("installation"))


@pytest.mark.parametrize(
    ("edit", "stale"),
    [
        ({}, set()),
        ({"monitor.schedule_cron": "0 7 * * *", "monitor.new_rows_trigger": 7, "description": "another"}, set()),
        ({"train.mlflow.exp_name": "elsewhere", "alerts.on_drift": False}, set()),
        ({"train.epochs": 3}, MADE_OF_MODEL),
        ({"train.augment.rotate_degrees": 44.0}, MADE_OF_MODEL),
        ({"train.pack_scale": 1.25}, {"packed_images", *MADE_OF_MODEL}),
        ({"model.resize": "pad"}, {"packed_images", *MADE_OF_MODEL}),
        ({"model.sample_bits": 16}, set()),
        ({"model.sample_bits": 12}, ALL),
        ({"model.classes": [*map(str, range(9)), "nine"]}, ALL),
        ({"dataset.dvc_tag": "v9.0.0"}, {"dataset"}),
        ({"dataset.split_seed": 5}, ALL),
        ({"encoder.input_px": 32}, ALL - {"dataset"}),
        ({"validate.duplicates": "error"}, ALL - {"dataset", "embeddings"}),
        ({"evaluate.min_accuracy": 0.5}, {"evaluation", "bento", *REPLAYED}),
        ({"model.drift_detection.uae_seed": 8}, MADE_OF_DETECTORS),
        ({"monitor.alpha": 0.02}, MADE_OF_DETECTORS),
        ({"monitor.permutations": 99}, {"drift_report", *GROWN}),
        ({"monitor.min_feedback": 99}, {"production_metrics"}),
        ({"deploy.replay": {"min_agreement": 0.9}}, REPLAYED),
        ({"deploy.runtime": "tensorflow"}, {"reference_data", "bento", *REPLAYED}),
        ({"deploy.exports": ["onnx"]}, {"bento", *REPLAYED}),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_an_edit_of_the_config_makes_stale_what_it_decides(
    installation: Installation, edit: dict[str, Any], stale: set[str]
) -> None:
    assert installation.stale(edit) == stale


def test_another_dataset_makes_stale_what_reads_it_and_the_same_one_under_another_tag_does_not(
    tmp_path: Path,
) -> None:
    edit = {"dataset.dvc_tag": "v9.0.0"}
    with dg.DagsterInstance.ephemeral() as instance:
        installation = Installation(instance, tmp_path)
        installation.make(edit, "dataset")
        assert installation.stale(edit) == set()
        installation.make(edit, "dataset", data="others")
        reading = {"embeddings", "validation_report", "packed_images", "evaluation", "labeling_queue"}
        assert installation.stale(edit) == reading


def test_a_moved_tag_makes_the_dataset_stale_before_it_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CV_HOME", str(tmp_path / "home"))
    repository = repository_key("digits")
    with dg.DagsterInstance.ephemeral() as instance:
        installation = Installation(instance, tmp_path)
        job = installation.definitions({}).resolve_job_def("digits_experiment")
        key = dg.AssetKey(["digits", "dataset"])
        made = job.execute_in_process(asset_selection=[key], instance=instance)
        (seen,) = made.asset_observations_for_node("digits__dataset")
        assert "dataset" not in installation.stale({})
        instance.report_runless_asset_event(observation(repository, seen.tags["dagster/data_version"], {}))
        assert "dataset" not in installation.stale({})
        instance.report_runless_asset_event(observation(repository, "another", {}))
        assert "dataset" in installation.stale({})


@pytest.mark.parametrize(
    ("module", "edit", "stale"),
    [
        ("training/schedules.py", "\nPEAK = 2\n", MADE_OF_MODEL),
        ("training/schedules.py", '\n# A comment.\n"""And a remark."""\n', set()),
        ("training/architectures/small_cnn.py", "\nPEAK = 2\n", MADE_OF_MODEL),
        ("encoders/encoder.py", "\nPEAK = 2\n", ALL - {"dataset"}),
        ("validation/checks/copies.py", "\nPEAK = 2\n", ALL - {"dataset", "embeddings"}),
        ("evaluation/gate.py", "\nPEAK = 2\n", {"evaluation", "bento", *REPLAYED}),
        ("drift/encoders.py", "\nPEAK = 2\n", MADE_OF_DETECTORS),
        ("serving/app.py", "\nPEAK = 2\n", {"bento", *REPLAYED}),
        ("serving/page/feedback.js", "\nconst PEAK = 2;\n", {"bento", *REPLAYED}),
        ("storage.py", "\nPEAK = 2\n", {"bento", *REPLAYED}),
        ("database/schema.py", "\nPEAK = 2\n", {"bento", *REPLAYED}),
        ("probation.py", "\nPEAK = 2\n", {"bento", *REPLAYED}),
        ("config/fields.py", "\n# A comment is shipped, too.\n", {"bento", *REPLAYED}),
        ("../bentofile.yaml", "\n# A comment.\n", {"bento", *REPLAYED}),
        ("monitoring/report_page.py", "\nPEAK = 2\n", {"drift_report", *GROWN}),
        ("images/decoders.py", "\nPEAK = 2\n", ALL),
        ("tracking.py", "\nPEAK = 2\n", set()),
    ],
)
def test_a_line_of_code_makes_stale_what_runs_it(
    installation: Installation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, edit: str, stale: set[str]
) -> None:
    for package in ("cv_platform", "bentos"):
        shutil.copytree(REPOSITORY / package, tmp_path / package)
    shutil.copy(REPOSITORY / "bentofile.yaml", tmp_path)
    edited = tmp_path / "cv_platform" / module
    assert edited.is_file()
    monkeypatch.setattr(versions, "_ROOT", tmp_path)
    clear_caches()
    try:
        with edited.open("a") as source:
            source.write(edit)
        assert installation.stale({}) == stale
    finally:
        monkeypatch.undo()
        clear_caches()


def test_a_line_in_the_file_of_a_users_function_makes_stale_what_it_decides(
    installation: Installation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "my_networks.py"
    source.write_text("raise RuntimeError('A definition of the graph runs no code of the user.')\n")
    monkeypatch.syspath_prepend(tmp_path)

    def code_versions() -> dict[str, str | None]:
        graph = installation.definitions({"model.architecture": "my_networks:tiny"}).resolve_asset_graph()
        return {name: graph.get(dg.AssetKey(["digits", name])).code_version for name in ALL}

    before = code_versions()
    assert code_versions() == before
    source.write_text("def tiny(image, model): ...\n")
    after = code_versions()
    assert {name for name in ALL if after[name] != before[name]} == MADE_OF_MODEL


def clear_caches() -> None:
    versions._module.cache_clear()
    versions._source.cache_clear()


ELSEWHERE = {
    "name": "whose",
    "description": "shown",
    "owners": "shown",
    "alerts": "who is told",
    "train.mlflow": "where runs go",
    "evaluate.mlflow": "where runs go",
    "monitor.window_days": "which requests",
    "monitor.window_by": "which requests",
    "monitor.window_start_utc": "",
    "monitor.window_end_utc": "",
    "monitor.schedule_cron": "when",
    "monitor.new_rows_trigger": "when",
    **{f"tune.{field}": "of `cv-platform tune`, which makes a config" for field in TuneConfig.model_fields},
    "labels.max_wrong_fraction": "of `cv-platform dataset grow`, which makes a version; nothing repeats it",
    "labels.keep_expired": "likewise",
    "deploy.takes_over": "whose service it may be",
    "deploy.confirm_timeout_seconds": "how long it may take",
    "score": "of `batch_scores`, which is there where it names a source",
    **{f"loop.{field}": "when" for field in LoopConfig.model_fields if field not in ("trust", "without")},
    "deploy.canary": "how it gets there",
    "deploy.shadow": "likewise",
}
"""Fields that decide no asset's content, with what they do."""


def test_every_field_of_the_config_is_in_a_version_or_decides_nothing() -> None:
    branch = Branch(load_experiment(DIGITS))
    assert {asset.key.path[-1] for asset in experiment_assets(branch)} == ALL
    read = {field for recipe in branch.recipes.values() for field in (*recipe.reads, *recipe.source)}

    def unknown(section: Any, place: str) -> list[str]:
        if place in read or place in ELSEWHERE:
            return []
        fields = getattr(type(section), "model_fields", None)
        if fields is None:
            return [place]
        names = {name: info.alias or name for name, info in fields.items()}
        return [
            u for name, alias in names.items() for u in unknown(getattr(section, name), f"{place}.{alias}".lstrip("."))
        ]

    assert unknown(branch.config, "") == []
