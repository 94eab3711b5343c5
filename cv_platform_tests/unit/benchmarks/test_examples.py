from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from benchmarks.options import REPOSITORY
from cv_platform.config import json_schema, load_experiment

EXAMPLES = sorted((REPOSITORY / "configs" / "examples").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_valid_and_opens_with_its_command(path: Path) -> None:
    experiment = load_experiment(path)
    header = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert experiment.name == path.stem
    assert any(f"make run CONFIG=configs/examples/{path.name}" in line for line in header)
    assert any(f"--name {experiment.dataset.ds_name} --tag {experiment.dataset.dvc_tag}" in line for line in header)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_follows_the_schema_that_editors_complete_from(path: Path) -> None:
    jsonschema.validate(yaml.safe_load(path.read_text(encoding="utf-8")), json.loads(json.dumps(json_schema())))


def test_animals10_keeps_the_originals_experiment() -> None:
    experiment = load_experiment(REPOSITORY / "configs" / "examples" / "animals10.yaml")
    assert experiment.model.model_name == "animals10_classifier"
    assert len(experiment.model.classes) == 10
    assert experiment.model.image_size == (50, 50)
    assert experiment.model.drift_detection.uae_encoding_dims == 128
    assert experiment.model.drift_detection.reference_data_n_sample == 5000
    assert (experiment.dataset.ds_name, experiment.dataset.dvc_tag) == ("animals10", "v2.0.0")
